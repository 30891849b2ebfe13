"""Whether the source is still the model that a work directory began with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from exl2ray.errors import JobMismatchError
from exl2ray.formats.file_states import HASHED_BYTES, FileState, compare_states, file_states, from_json, with_hashes
from exl2ray.formats.hf import SourceModel
from exl2ray.store.layout import MEASURE, SOURCE_KEY
from exl2ray.store.records import Record, hash_inputs
from exl2ray.store.workdir import WorkDir

HINT = "restore the files, or measure anew: another -o, or -nr"


class SourceState:
    """Remembers the files of the source in the work directory, and compares them with what is there later.

    ``warnings``: what cannot be decided, of this run and of earlier ones of the job.
    """

    def __init__(self, work: WorkDir, source: SourceModel, fingerprint: str) -> None:
        self._work, self._source = work, source
        self._paths = [source.path / name for name in source.files]
        self._key = hash_inputs(source=fingerprint)
        self.warnings: list[str] = []
        self._states: tuple[FileState, ...] = ()

    def open(self) -> None:
        """At the start of a run. Raises JobMismatchError for a file whose content is another one than when the job began."""
        record = self._work.records.find(MEASURE, SOURCE_KEY, self._key)
        now = file_states(self._paths)
        if record is None:
            self._states = with_hashes(now, self._source.path, HASHED_BYTES)
            self._commit()
            return
        self.warnings = list(record.payload["warnings"])
        self._compare(from_json(record.payload["files"]), now, "since this work directory was begun")

    def check(self) -> None:
        """Before what was made is called finished. Raises JobMismatchError if a file was changed meanwhile."""
        self._compare(self._states, file_states(self._paths), "while it was converted, so the result mixes two models")

    def _compare(self, before: tuple[FileState, ...], now: tuple[FileState, ...], when: str) -> None:
        found = compare_states(before, now, self._source.path)
        if found.altered:
            raise JobMismatchError(f"{self._source.path}: {_some(found.altered)} was changed {when}", HINT)
        self._states = found.states
        if found.unproven:
            text = (
                f"weights were written again after the conversion had begun ({_some(found.unproven)}); samples of them are "
                "as before, but their content was not hashed then: if they were edited, the result mixes two models"
            )
            self.warnings += [] if text in self.warnings else [text]
        if found.states != before:
            self._commit()

    def _commit(self) -> None:
        payload = {"files": [asdict(s) for s in self._states], "warnings": self.warnings}
        self._work.records.commit(Record(MEASURE, SOURCE_KEY, self._key, payload))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
