"""Whether the source is still the model that a work directory began with."""

from __future__ import annotations

from dataclasses import asdict

from exl2ray.errors import JobMismatchError
from exl2ray.formats.file_states import HASHED_BYTES, FileState, Hashing, compare_states, file_states, from_json
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.side_files import needed_files
from exl2ray.store.file_names import MEASURE, SOURCE_KEY
from exl2ray.store.records import Record, hash_inputs, reading
from exl2ray.store.workdir import WorkDir
from exl2ray.timeline import step
from exl2ray.wording import some

MEANWHILE = "while it was converted, so the result mixes two models"
HINT = "restore the files, or measure anew: another -o, or -nr"


class SourceState:
    """Remembers the files of the source in the work directory, and compares them with what is there later.

    Sizes and times are remembered at once, hashes (`HASHED_BYTES`) when the first result arrives: 2 GB take 1 to 4 s, and
    the first module does not wait for them.
    ``warnings``: what cannot be decided, of this run and of earlier ones of the job.
    """

    def __init__(self, work: WorkDir, source: SourceModel, fingerprint: str, beside: tuple[FileState, ...]) -> None:
        """``beside``: ``needed_files`` before anything was read."""
        self._beside = beside
        self._work, self._source = work, source
        self._paths = [source.path / name for name in source.files]
        self._key = hash_inputs(source=fingerprint)
        self.warnings: list[str] = []
        self._states: tuple[FileState, ...] = ()
        self._hashing: Hashing | None = None

    def open(self) -> None:
        """At the start of a run. Raises JobMismatchError for a file whose content is another one than when the job began."""
        record = self._work.records.find(MEASURE, SOURCE_KEY, self._key)
        now = file_states(self._paths)
        if record is None:
            self._states = now
            self._commit()
        else:
            with reading(self._work.store, record) as payload:
                self.warnings, before = list(payload["warnings"]), from_json(payload["files"])
            self._compare(before, now, "since this work directory was begun")
        if not all(s.sha256 for s in self._states):  # also after a run that was stopped before it had them
            self._hashing = Hashing(self._states, self._source.path, HASHED_BYTES)

    def settle(self) -> None:
        """Waits for the hashes, and remembers them. Raises JobMismatchError if a file was written meanwhile: its hash does
        not say what was read before."""
        if self._hashing is None:
            return
        with step("hashes waited for"):
            states, self._hashing = self._hashing.result(), None
        written = [s.name for s, now in zip(self._states, file_states(self._paths), strict=True) if not now.is_as(s)]
        if written:
            raise JobMismatchError(f"{self._source.path}: {some(written)} was changed {MEANWHILE}", HINT)
        if states != self._states:
            self._states = states
            self._commit()

    def close(self) -> None:
        """Ends what is still being hashed."""
        if self._hashing is not None:
            self._hashing.cancel()

    def check(self) -> None:
        """Before what was made is called finished. Raises JobMismatchError if a file was changed meanwhile."""
        self.settle()
        self._compare(self._states, file_states(self._paths), MEANWHILE)
        now = needed_files(self._source.path)
        altered = {state.name for state in set(self._beside) ^ set(now)}
        if altered:
            raise JobMismatchError(f"{self._source.path}: {some(sorted(altered))} was changed {MEANWHILE}", HINT)

    def _compare(self, before: tuple[FileState, ...], now: tuple[FileState, ...], when: str) -> None:
        found = compare_states(before, now, self._source.path)
        if found.altered:
            raise JobMismatchError(f"{self._source.path}: {some(found.altered)} was changed {when}", HINT)
        self._states = found.states
        if found.unproven:
            text = found.doubt("the conversion")
            self.warnings += [] if text in self.warnings else [text]
        if found.states != before:
            self._commit()

    def _commit(self) -> None:
        payload = {"files": [asdict(s) for s in self._states], "warnings": self.warnings}
        self._work.records.commit(Record(MEASURE, SOURCE_KEY, self._key, payload))
