"""How far a tuning is, in a work directory: what has been trained, the optimiser, the best state so far.

A file for each module and worker, with what that worker owns of it, and one that names them all, which is replaced when they
are there: whoever is killed goes on from the last state that was whole, in a group of any size, and comes to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from exl2ray.errors import StoreError, UnfitError, why_not_read
from exl2ray.quant.group import Comm
from exl2ray.store.faults import MissingFileError
from exl2ray.store.fs import CHUNK_BYTES, Store
from exl2ray.store.tensors import file_parts, get_tensors
from exl2ray.tune.module import Snapshot, TunedModule

FILE = "state.json"
FOLDER = "states"


@dataclass
class Progress:
    """identity: of everything that the result depends on. step: how many are done. start: divergences of the held-out rows at
    step 0. scores: (step, any kind of text worse than at the start, held-out score); best: index into them, whose state
    ``snapshots`` are, by module, of what this worker owns. over: whether no more steps are to come."""

    identity: str
    step: int = 0
    start: list[float] = field(default_factory=list)
    scores: list[tuple[int, bool, float]] = field(default_factory=list)
    best: int = -1
    over: bool = False
    snapshots: dict[str, Snapshot] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A state in a store. files: by module key."""

    store: Store
    progress: Progress
    files: Mapping[str, tuple[str, ...]]

    def into(self, module: TunedModule) -> Snapshot:
        """Puts the state of a module into it; the best one so far, as far as this worker owns the module."""
        if module.key not in self.files:  # nothing is trained of it
            return Snapshot({}, {})
        found = self._tensors(module.key)
        module.restore(found, self.progress.step)
        best = self._best(found)
        return Snapshot(
            {key: t.clone() for key, t in best.codes.items() if key in module.owned},
            {name: t.clone() for name, t in best.values.items() if name in module.owned},
        )

    def best(self, key: str) -> Snapshot:
        """The best state of a module."""
        return self._best(self._tensors(key) if key in self.files else {})

    def _tensors(self, key: str) -> dict[str, Tensor]:
        return {name: t for file in self.files[key] for name, t in get_tensors(self.store, file).items()}

    @staticmethod
    def _best(found: Mapping[str, Tensor]) -> Snapshot:
        of = {kind: {n.removeprefix(f"{kind}/"): t for n, t in found.items() if n.startswith(f"{kind}/")}
              for kind in ("codes", "values")}  # fmt: skip
        return Snapshot(of["codes"], of["values"])


def save(store: Store, comm: Comm, progress: Progress, states: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """All members of a group call it together. states: of all modules, `TunedModule.state`; empty if no steps are to come.
    Raises StoreError, in all members, if one of them cannot write; what was saved before is untouched then."""
    files, checked, problem = dict[str, str](), dict[str, int](), None
    try:
        for number, (key, state) in enumerate(states):
            tensors = dict(state)
            if key in progress.snapshots:
                tensors.update({f"codes/{name}": t for name, t in progress.snapshots[key].codes.items()})
                tensors.update({f"values/{name}": t for name, t in progress.snapshots[key].values.items()})
            if tensors:
                which = f"{progress.step}{'-over' if progress.over else ''}-{comm.size}-{comm.rank}-{number}"
                files[key] = f"{FOLDER}/{which}.safetensors"
                checked[files[key]] = _put(store, files[key], tensors)
    except StoreError as e:
        problem = e
    told = comm.gather((files, checked, problem))
    problem = next((p for *_, p in told if p is not None), None)
    if comm.rank == 0:
        sums = {name: crc for _, of, _ in told for name, crc in of.items()}
        try:
            if problem is None:
                _name_files(store, progress, [f for f, *_ in told], sums)
        except StoreError as e:
            problem = e
        _delete_unnamed(store)
    problem = comm.gather(problem)[0]
    if problem is not None:
        raise problem


def _name_files(store: Store, progress: Progress, every: list[dict[str, str]], sums: Mapping[str, int]) -> None:
    named = {key: [f[key] for f in every if key in f] for key in dict.fromkeys(k for f in every for k in f)}
    facts = {k: v for k, v in asdict(replace(progress, snapshots={})).items() if k != "snapshots"}
    facts |= {"files": named, "checksums": sums}
    store.put(FILE, json.dumps({**facts, "sha256": _digest(facts)}).encode())


def _delete_unnamed(store: Store) -> None:
    """Frees the room of files that are of no use: older ones, and those of a checkpoint that could not be made."""
    with suppress(StoreError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known: set[str] = set()
        with suppress(MissingFileError):
            known = {file for files in json.loads(store.get(FILE))["files"].values() for file in files}
        for old in store.list(FOLDER):
            if old not in known:
                store.delete(old)


def _put(store: Store, rel: str, tensors: Mapping[str, Tensor]) -> int:
    """Writes a file; its CRC-32, which takes a fraction of the time of a hash and finds what a disk does to it."""
    parts = list(file_parts(store.full_name(rel), tensors))
    with ThreadPoolExecutor(1, thread_name_prefix="checksum") as pool:
        checksum = pool.submit(_checksum, parts)
        store.put_parts(rel, parts)
        return checksum.result()


def _checksum(parts: Iterable[bytes | memoryview]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(part, total)
    return total


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_whole(store: Store, rel: str, checksum: Any) -> bool:
    with store.reader(rel) as f:
        return bool(_checksum(iter(lambda: f.read(CHUNK_BYTES), b"")) == checksum)


def steps_of_another(path: Path, identity: str) -> int:
    """Steps that were done and kept of a tuning with another identity; 0 if there are none that anything could go on from."""
    try:
        facts = json.loads(path.read_bytes())
        other, steps, own = facts.pop("identity"), facts["step"], facts.get("sha256")
        whole = own == _digest({k: v for k, v in facts.items() if k != "sha256"} | {"identity": other})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0
    return steps if whole and other != identity and type(steps) is int else 0


def restore(store: Store, comm: Comm, identity: str, notes: list[str] | None = None) -> Saved | None:
    """What was saved of ``identity``, if anything; all members of a group call it together. What is damaged counts for
    nothing: ``notes`` gets the reason, and training begins anew."""
    problems: list[str] = []
    mine = _found(store, identity, problems) if comm.rank == 0 else None
    found, problems = comm.gather((mine, problems))[0]
    if notes is not None:
        notes += problems
    if found is None:
        return None
    progress, files = found
    return Saved(store, progress, files)


def _found(store: Store, identity: str, problems: list[str]) -> tuple[Progress, dict[str, tuple[str, ...]]] | None:
    try:
        facts = json.loads(store.get(FILE))
        if facts["identity"] != identity:
            problems.append("what was trained with other settings or other text, or by an earlier version, is left behind")
            return None
        if facts.pop("sha256", "") != _digest(facts):
            raise UnfitError("not as it was written")
        scores = [(int(s), bool(w), float(v)) for s, w, v in facts["scores"]]
        step, best, over = int(facts["step"]), int(facts["best"]), bool(facts["over"])
        start = [float(v) for v in facts["start"]]
        files = {str(key): tuple(map(str, names)) for key, names in facts["files"].items()}
        if not (0 <= step < 1 << 31 and -1 <= best < len(scores) and all(0 <= s[0] <= step for s in scores)):
            raise UnfitError("numbers that no tuning has")
        for names in files.values():
            for name in names:
                if name.rpartition("/")[0] != FOLDER:
                    raise UnfitError(f"{name[:80]!r} is no file of it")
                get_tensors(store, name)
                if not _is_whole(store, name, facts["checksums"][name]):
                    raise UnfitError(f"{name} is not as it was written")
    except MissingFileError as e:
        if FILE in e.message:
            return None
        problems.append(f"the last checkpoint cannot be used, so training begins anew: {e.message}")
        return None
    except (StoreError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        text = e.message if isinstance(e, StoreError) else f"{FILE}: {why_not_read(e)}"
        problems.append(f"the last checkpoint cannot be used, so training begins anew: {text[:300]}")
        return None
    return Progress(identity, step, start, scores, best, over), files
