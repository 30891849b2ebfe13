"""Everything a report says about one work directory, read once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from exl2ray.errors import FormatError
from exl2ray.evaluate.record import EVALUATION, MAX_BYTES, Evaluation, parse_evaluations, read_evaluations
from exl2ray.evaluate.standing import EARLIER, standing
from exl2ray.formats.json_file import as_number
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.measurement import ModuleProfile
from exl2ray.report.allocation import Allocation, allocation_of, linear_shapes
from exl2ray.report.chains import Chain, read_chain, recorded_bitrates
from exl2ray.report.curves import (
    Curve,
    curves_of,
    measured_experts,
    measured_notes,
    read_profiles,
    with_weights,
)
from exl2ray.report.time_spent import Timeline, read_timeline
from exl2ray.report.tuned import Tuning, is_solved, read_tuning
from exl2ray.report.values import mapping, nominal_bpw, parse_option, texts
from exl2ray.store.event_log import read_events
from exl2ray.store.fs import Store
from exl2ray.store.job_file import StoredJob
from exl2ray.store.open import open_store
from exl2ray.store.status import read_status

MAX_BITRATES = 16  # of one page


@dataclass(frozen=True)
class Bitrate:
    """One target. decoder_bpw, gap (to the proven optimum, a share), predicted_kl (nats per token): of the last allocation,
    None if there was none. head_bpw: of the quantised head, None if not known.

    modules: to quantise, 0 if not known. directory: of the written model, the tuned one with --tune; "" if none. evaluation:
    of that model as it is. was_evaluated: only before it was written again. tuning: None if it was not tuned. untuned: it is
    to be, and is not yet.
    """

    chain: Chain
    decoder_bpw: float | None
    head_bpw: float | None
    gap: float | None
    predicted_kl: float | None
    modules: int
    directory: str
    allocation: Allocation
    evaluation: Evaluation | None
    was_evaluated: bool = False
    tuning: Tuning | None = None
    untuned: bool = False

    @property
    def bits(self) -> float:
        return self.chain.bits

    @property
    def complete(self) -> bool:
        """Whether all modules are quantised: the head, which has no layer, comes last."""
        return any(m.layer is None for m in self.chain.modules) and len(self.chain.modules) >= self.modules

    @property
    def file_bytes(self) -> int:
        """Of the written model; 0 if there is none."""
        if self.tuning is not None and self.tuning.file_bytes:
            return self.tuning.file_bytes
        return self.chain.file_bytes or (self.evaluation.file_bytes if self.evaluation is not None else 0)


@dataclass(frozen=True)
class Note:
    """Something worth knowing that happened ``count`` times, at ``places`` (the first few)."""

    text: str
    places: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Facts:
    """earlier: evaluations of models that have been written again since, by a patch for one."""

    root: str
    state: str  # "running", "crashed", "stopped", "finished"
    job: StoredJob | None
    curves: tuple[Curve, ...]
    bitrates: tuple[Bitrate, ...]
    experts: Mapping[str, Mapping[int, tuple[int, ...]]]  # pass -> layer -> calibration tokens per expert
    evaluations: tuple[Evaluation, ...]
    timeline: Timeline | None
    warnings: tuple[str, ...]  # that concern the result, as the last run found them
    notes: tuple[Note, ...]
    problems: tuple[str, ...]
    earlier: tuple[Evaluation, ...] = ()


def read_facts(root: str, evaluation_files: Sequence[str] = ()) -> Facts:
    """Reads the work directory at ``root``, whatever it holds so far; writes nothing.

    Raises StoreError if there is no work directory, FormatError for an unusable file of ``evaluation_files``. Whatever is
    damaged inside the directory is left out and named in ``problems``.
    """
    status = read_status(root)
    store = open_store(root)
    problems = list(status.problems)
    events, _ = read_events(store)
    job = status.job.job if status.job is not None else {}
    given = job.get("measure", {}).get("measurement")
    profiles = read_profiles(store, given if isinstance(given, str) else None, problems)
    log = _Log(events)
    rates = sorted({*recorded_bitrates(store), *log.allocated})
    if len(rates) > MAX_BITRATES:
        problems.append(f"there are {len(rates)} bitrates; shown are the lowest {MAX_BITRATES}")
    chains = [read_chain(store, bits, problems, *log.written.get(bits, ())) for bits in rates[:MAX_BITRATES]]
    shapes = linear_shapes(store, chains, problems)
    linears = {m.key: tuple(m.options) for chain in chains for m in chain.modules}
    evaluations = _evaluations(store, evaluation_files, problems)
    directories = {c.bits: log.directory.get(c.bits, "") for c in chains}
    solved = [bits for bits, directory in directories.items() if is_solved(directory, bits)]
    tuned = {bits: found for bits in solved if (found := read_tuning(store, bits, problems)) is not None}
    directories |= {bits: found.directory for bits, found in tuned.items()}
    sizes = {c.bits: tuned[c.bits].file_bytes if c.bits in tuned else c.file_bytes for c in chains}
    evaluations, earlier = _by_standing(directories, sizes, evaluations)
    own, before = _own_evaluations(directories, evaluations), _own_evaluations(directories, earlier)
    return Facts(
        root=status.root,
        state=status.state,
        job=status.job,
        curves=tuple(with_weights(curves_of(profiles), linears, shapes)),
        bitrates=tuple(
            replace(
                _bitrate(c, log, shapes, own.get(c.bits), c.bits in before), directory=directories[c.bits],
                tuning=tuned.get(c.bits), untuned=c.bits in solved and c.bits not in tuned,
            )
            for c in chains
        ),
        experts=_experts(profiles, chains),
        evaluations=tuple(evaluations),
        timeline=read_timeline(events),
        warnings=tuple(log.warnings),
        notes=tuple(group_notes([*log.notes, *measured_notes(profiles), *_chain_notes(chains)])),
        problems=tuple(dict.fromkeys(problems)),
        earlier=tuple(earlier),
    )


def _evaluations(store: Store, files: Sequence[str], problems: list[str]) -> list[Evaluation]:
    """From ``files``, else from evaluation.json of the work directory; what is wrong with that becomes a problem."""
    if files:
        return [e for name in files for e in read_evaluations(name)]
    if not store.exists(EVALUATION) or store.size(EVALUATION) > MAX_BYTES:
        return []
    try:
        return parse_evaluations(store.get(EVALUATION), store.full_name(EVALUATION))
    except FormatError as e:
        problems.append(e.message)
        return []


def _by_standing(
    directories: Mapping[float, str], sizes: Mapping[float, int], evaluations: Iterable[Evaluation]
) -> tuple[list[Evaluation], list[Evaluation]]:
    """(of models as they are now, or as far as can be told; of what they were before they were written again)"""
    found: tuple[list[Evaluation], list[Evaluation]] = ([], [])
    for e in evaluations:
        bits = next(iter(_own_evaluations(directories, [e])), None)
        written = "" if bits is None else directories[bits]
        places = [p for p in (written, e.model) if p and not e.is_gguf]
        found[standing(e, places, sizes.get(bits or 0.0, 0)) == EARLIER].append(e)
    return found


def _own_evaluations(directories: Mapping[float, str], evaluations: Iterable[Evaluation]) -> dict[float, Evaluation]:
    """Bitrate -> results of the model that was written there; by its name, if that is unique, after it was moved."""
    paths = {PurePath(d): bits for bits, d in directories.items() if d}
    names = Counter(path.name for path in paths)
    moved = {path.name: bits for path, bits in paths.items() if names[path.name] == 1}
    found = ((paths.get(PurePath(e.model), moved.get(PurePath(e.model).name)), e) for e in evaluations)
    return {bits: e for bits, e in found if bits is not None}


class _Log:
    """What the events say besides times: the last allocation and the written directory of each bitrate, and notes."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self.allocated: dict[float, Mapping[str, Any]] = {}
        self.directory: dict[float, str] = {}
        self.written: dict[float, tuple[frozenset[str], int]] = {}  # hashes of modules, bytes
        self.items: dict[str, int] = {}  # stage -> items
        self.notes: list[tuple[str, str]] = []  # (place, text)
        self.warnings: dict[str, None] = {}
        for event in events:
            self._take(str(event["name"]), mapping(event["fields"]))

    def _take(self, name: str, f: Mapping[str, Any]) -> None:
        bits, key = as_number(f.get("bits")), str(f.get("key", ""))
        if name == "allocated" and bits is not None:
            self.allocated[bits] = f
        elif name == "written" and bits is not None:
            self.directory[bits] = str(f.get("directory") or "")
            self.written[bits] = (frozenset(texts(f.get("modules"))), int(as_number(f.get("bytes")) or 0))
        elif name == "stage":
            self.items[str(f.get("stage"))] = int(as_number(f.get("items")) or 0)
        elif name == "lost":
            self.notes.append((key, f"a worker was lost: {f.get('reason')}"))
        elif name == "retry":
            self.notes.append((key, f"tried again: {f.get('reason')}"))
        elif name == "note":
            self.notes.append(("", str(f.get("message"))))
        elif name == "warning":
            self.warnings[str(f.get("message"))] = None
        elif name == "opened":
            self.warnings.clear()  # every run finds all of its job again
            self.notes += [("", text) for text in texts(f.get("notes"))]


def _bitrate(
    chain: Chain, log: _Log, shapes: Mapping[str, LinearShape], evaluation: Evaluation | None, before: bool
) -> Bitrate:
    event, bits = log.allocated.get(chain.bits, {}), chain.bits
    return Bitrate(
        chain, as_number(event.get("bpw")), _head_bpw(chain, event, shapes), as_number(event.get("gap")),
        as_number(event.get("predicted_kl")), log.items.get(f"quantize {bits!r}", 0), "",
        allocation_of(chain.options, shapes), evaluation, before and evaluation is None,
    )  # fmt: skip


def _head_bpw(chain: Chain, event: Mapping[str, Any], shapes: Mapping[str, LinearShape]) -> float | None:
    """As stored, where the shape is known; else what its option says; None where neither is known."""
    found = ((key, text) for m in chain.modules if m.layer is None for key, text in m.options.items())
    key, text = next(found, ("", event.get("head")))
    option, shape = parse_option(str(text)), shapes.get(key)
    if option is None:
        return None
    if shape is None:
        return nominal_bpw(option)
    try:
        return option.bits_of(shape) / shape.padded_weights
    except FormatError:
        return None


def _experts(
    profiles: Sequence[ModuleProfile], chains: Iterable[Chain]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Coverage by pass. All bitrates are calibrated on the same rows; routing differs little, so one of them is shown."""
    out = {"measurement": measured_experts(profiles)}
    for chain in chains:
        found = {m.layer: m.experts for m in chain.modules if m.experts and m.layer is not None}
        if len(found) >= len(next((v for k, v in out.items() if k != "measurement"), {})) and found:
            out = {"measurement": out["measurement"], f"quantisation at {chain.bits:g} bpw": found}
    return {name: counts for name, counts in out.items() if counts}


def _chain_notes(chains: Iterable[Chain]) -> list[tuple[str, str]]:
    out = []
    for chain in chains:
        out += [(f"{m.key} ({chain.bits:g} bpw)", note) for m in chain.modules for note in m.notes]
        if chain.superseded:
            text = f"{chain.superseded} records of other settings, or from before a patch, are left out: the newest count"
            out.append((f"{chain.bits:g} bpw", text))
    return out


def group_notes(notes: Iterable[tuple[str, str]]) -> list[Note]:
    """Notes that differ in numbers only become one, with the text of the first: a model may have thousands of experts."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for place, text in notes:
        groups.setdefault(re.sub(r"\d+", "#", text), []).append((place, text))
    out = []
    for group in groups.values():
        places = tuple(dict.fromkeys(place for place, _ in group if place))
        out.append(Note(group[0][1], places, len(group)))
    return out
