"""Whether both models of a tuning are still those that it began with.

Their tensors are read again and again, at the latest when the output is written, and not only by one process. Sizes and
times of the files are compared before every checkpoint, so that none is of a mixture, before the decision, and before
config.json of the output. What a fingerprint cannot see, single weights, the hash of the content shows
(`exl2ray.formats.file_states`): of models that are small enough it is taken while the first steps are done, and kept with
what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exl2ray.errors import Exl2RayError, JobMismatchError, StoreError
from exl2ray.evaluate.forward import OpenModel, open_model
from exl2ray.formats.file_states import FileState, Hashing, compare_states, file_states, from_json
from exl2ray.formats.hf import weight_files
from exl2ray.formats.side_files import needed_files
from exl2ray.store.fs import Store
from exl2ray.tune.opening import Pair, open_pair
from exl2ray.wording import some

FILE = "inputs.json"  # in the work directory
HINT = "put the files back, and the same command goes on from the last checkpoint; or tune the new ones into another folder"


@dataclass(frozen=True)
class Begun:
    """How the weights of both models were when a tuning began, and their fingerprints."""

    weights: tuple[tuple[FileState, ...], ...]
    fingerprints: tuple[str, ...]


@dataclass(frozen=True)
class _Look:
    """Files of a model at one moment. beside: those that are no weights, by their content."""

    weights: tuple[FileState, ...] = ()
    beside: tuple[FileState, ...] = ()


def _look(path: Path, copied: bool) -> _Look:
    """copied: with what belongs to the output, too. Raises SourceError and FormatError."""
    beside = tuple(s for s in needed_files(path) if copied or s.name == "config.json")
    return _Look(file_states(weight_files(path)), beside)


class Inputs:
    """Opens both models, and remembers what their files were before. directory: of the start. reference: its source."""

    def __init__(self, directory: str | Path, reference: str | Path) -> None:
        """Raises what `exl2ray.tune.opening.open_pair` does."""
        looks = []
        for path, copied in ((Path(directory), True), (Path(reference), False)):
            look = _Look()
            with suppress(Exl2RayError, OSError):  # opening says it better
                look = _look(path, copied)
            looks.append(look)
        self.pair: Pair = open_pair(directory, reference)
        self._models: tuple[OpenModel, OpenModel] = (self.pair.start, self.pair.source)
        self._looks = [self._own(m, look) for m, look in zip(self._models, looks, strict=True)]
        self._fingerprints: tuple[str, ...] = ()
        self._hashing: list[Hashing] = []
        self._store: Store | None = None
        self._identity = ""

    @staticmethod
    def _own(model: OpenModel, look: _Look) -> _Look:
        """Without weights that lie there and are not read."""
        return replace(look, weights=tuple(s for s in look.weights if s.name in model.source.files))

    def begin(self, store: Store, identity: str) -> list[str]:
        """Compares them with what the tuning of this identity began with, if it is one that goes on, and begins to hash them;
        what cannot be decided, in words. Raises JobMismatchError for other content."""
        self._store, self._identity = store, identity
        self._fingerprints = tuple(m.source.fingerprint() for m in self._models)
        notes = []
        for n, before in enumerate(self._kept()):
            notes += self._compared(n, before, self._looks[n].weights, "since this tuning was begun")
        self._keep()
        self._hashing = [Hashing(self._unhashed(n), m.path) for n, m in enumerate(self._models)]
        return notes

    def begun(self) -> Begun:
        """For workers: what they `follow`."""
        return Begun(tuple(look.weights for look in self._looks), self._fingerprints)

    def follow(self, begun: Begun) -> None:
        """In a worker: raises JobMismatchError if its files, perhaps on another machine, are those of another model."""
        self._fingerprints = begun.fingerprints
        for n, before in enumerate(begun.weights):
            self._compared(n, before, self._looks[n].weights, self._meanwhile(n))

    def _unhashed(self, n: int) -> tuple[FileState, ...]:
        states = self._looks[n].weights
        return () if all(s.sha256 for s in states) else states

    def settle(self) -> None:
        """Waits for the hashes and keeps them. Raises as `check`."""
        if not self._hashing:
            return
        found, self._hashing = [h.result() for h in self._hashing], []
        self._same_now()  # else a hash does not say what was read before
        for n, states in enumerate(found):
            if states and all(a.is_as(b) for a, b in zip(states, self._looks[n].weights, strict=True)):
                self._looks[n] = replace(self._looks[n], weights=states)
        with suppress(StoreError):  # a full disk: the next run cannot tell a copy from another model, no more
            self._keep()

    def close(self) -> None:
        """Ends what is still being hashed."""
        for hashing in self._hashing:
            hashing.cancel()
        self._hashing = []

    def check(self) -> list[str]:
        """Raises JobMismatchError if a file has other content than in the beginning; what cannot be decided, in words."""
        self.settle()
        return self._same_now()

    def _same_now(self) -> list[str]:
        notes = []
        for n, model in enumerate(self._models):
            when = self._meanwhile(n)
            try:
                now = self._own(model, _look(model.path, copied=n == 0))
            except Exl2RayError as e:
                raise JobMismatchError(f"{model.path}: was changed {when}: {e.message}", HINT) from e
            before = self._looks[n]
            gone = {s.name for s in before.weights} - {s.name for s in now.weights}
            altered = sorted(gone | {s.name for s in set(before.beside) ^ set(now.beside)})
            if altered:
                raise JobMismatchError(f"{model.path}: {some(altered)} was changed {when}", HINT)
            notes += self._compared(n, before.weights, now.weights, when)
        return notes

    def _meanwhile(self, n: int) -> str:
        return f"while {'it' if n == 0 else self._models[0].path} was tuned, so the result would mix two models"

    def _compared(self, n: int, before: Sequence[FileState], now: Sequence[FileState], when: str) -> list[str]:
        """Remembers what is the same although it was written again."""
        model = self._models[n]
        found = compare_states(before, now, model.path)
        altered = found.altered
        if found.unproven and not altered and not self._is_alike(n):
            altered = found.unproven
        if altered:
            raise JobMismatchError(f"{model.path}: {some(altered)} was changed {when}", HINT)
        self._looks[n] = replace(self._looks[n], weights=found.states)
        return [f"{model.path}: {found.doubt('tuning')}"] if found.unproven else []

    def _is_alike(self, n: int) -> bool:
        """Whether samples of the tensors are as in the beginning."""
        with suppress(Exl2RayError):
            return open_model(self._models[n].path).source.fingerprint() == self._fingerprints[n]
        return False

    # ---- what is kept for the next run ---------------------------------------------------------------------------

    def _kept(self) -> list[tuple[FileState, ...]]:
        """By model; empty if there is nothing of this identity."""
        assert self._store is not None
        try:
            found: Any = json.loads(self._store.get(FILE))
            if found["identity"] != self._identity:
                return []
            states = [from_json(files) for files in found["files"]]
        except (StoreError, ValueError, KeyError, TypeError, RecursionError):
            return []
        return states if len(states) == len(self._models) else []

    def _keep(self) -> None:
        assert self._store is not None
        files = [[asdict(s) for s in look.weights] for look in self._looks]
        self._store.put(FILE, json.dumps({"identity": self._identity, "files": files}).encode())
