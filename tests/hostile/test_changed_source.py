"""A source that changes while a job is in the work directory: refused, whatever the fingerprint can see of it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bad_models import EMBED, edited, recipe, run

from exl2ray.convert import convert
from exl2ray.errors import JobMismatchError
from exl2ray.events import Silent
from exl2ray.formats.hf import SourceModel
from exl2ray.recipe import Recipe
from exl2ray.store.event_log import read_events
from exl2ray.store.file_names import MEASURE, SOURCE_KEY
from exl2ray.store.open import open_store
from exl2ray.store.records import Records


def change_between_samples(file: Path) -> None:
    """Another value for one weight, where no sample of the fingerprint looks."""
    data = bytearray(file.read_bytes())
    place = 8 + int.from_bytes(data[:8], "little") + json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[EMBED][
        "data_offsets"
    ][0] + 3000  # fmt: skip
    data[place] ^= 1
    file.write_bytes(data)


@pytest.fixture
def begun(tiny: Path, text: str, tmp_path: Path) -> Recipe:
    """A job whose measurement is done, of a model of its own."""
    model = edited(tiny, tmp_path / "m")
    job = recipe(model, tmp_path / "work", text, compile_full=str(tmp_path / "out"))
    convert(replace(job, compile_full=None, output_measurement=str(tmp_path / "work" / "measurement.json")), Silent())
    return job


def measured_again(reporter: Silent) -> bool:
    return any(name == "stage" and f["stage"] == "measure" for name, f in reporter.events)


def test_an_edit_between_the_samples_is_refused(begun: Recipe) -> None:
    before = SourceModel(begun.in_dir).fingerprint()
    change_between_samples(Path(begun.in_dir) / "model.safetensors")
    assert SourceModel(begun.in_dir).fingerprint() == before
    with pytest.raises(JobMismatchError, match=r"model\.safetensors was changed since") as caught:
        run(begun)
    assert caught.value.exit_code == 7
    assert "-nr" in caught.value.hint
    summary, reporter = run(replace(begun, no_resume=True))
    assert measured_again(reporter)
    assert not any("written again" in w for w in summary.warnings)


def test_a_touched_or_copied_source_is_the_same(begun: Recipe, tmp_path: Path) -> None:
    os.utime(Path(begun.in_dir) / "model.safetensors", ns=(1, 1))
    summary, reporter = run(begun)
    assert not measured_again(reporter)
    moved = tmp_path / "moved"
    shutil.copytree(begun.in_dir, moved)
    os.utime(moved / "model.safetensors", ns=(2, 2))
    again, reporter = run(replace(begun, in_dir=str(moved)))
    assert summary.warnings == again.warnings
    assert not any("written again" in w for w in again.warnings)
    assert not measured_again(reporter)


def test_what_was_too_large_to_hash_is_a_warning_that_stays(
    tiny: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exl2ray.source_state.HASHED_BYTES", 1000)
    model = edited(tiny, tmp_path / "m")
    job = recipe(model, tmp_path / "work", text, compile_full=str(tmp_path / "out"))
    first, _ = run(job)
    assert not any("written again" in w for w in first.warnings)
    os.utime(model / "model.safetensors", ns=(1, 1))
    for _ in range(2):  # the second time the file is as at the first
        summary, _ = run(job)
        assert sum("written again" in w for w in summary.warnings) == 1
        assert "written again" in (tmp_path / "out" / "README.md").read_text()


class Editing(Silent):
    """Changes a weight of the source when an event is told."""

    def __init__(self, job: Recipe, when: str) -> None:
        super().__init__()
        self._file, self._when = Path(job.in_dir) / "model.safetensors", when

    def event(self, name: str, **fields: Any) -> None:
        super().event(name, **fields)
        if f"{name} {fields.get('done')}" == self._when:
            change_between_samples(self._file)


def test_an_edit_while_it_is_converted(begun: Recipe) -> None:
    with pytest.raises(JobMismatchError, match="while it was converted"):
        convert(begun, Editing(begun, "item 2"))


def test_an_edit_while_it_is_hashed(begun: Recipe) -> None:
    """Hashes are waited for when the first result is there; what was written before that is known by its time."""
    anew, reporter = replace(begun, no_resume=True), Editing(begun, "stage 0")
    with pytest.raises(JobMismatchError, match="while it was converted"):
        convert(anew, reporter)
    assert not any(name == "item" for name, _ in reporter.events)


def test_a_source_is_hashed_once_and_the_start_is_told_of(begun: Recipe) -> None:
    store = open_store(begun.out_dir)
    (record,) = [r for (key, _), r in Records(store).scan(MEASURE).items() if key == SOURCE_KEY]
    assert [len(f["sha256"]) for f in record.payload["files"]] == [64]
    (told,) = [e["fields"] for e in read_events(store)[0] if e["name"] == "start"]
    assert {"checks", "work directory", "workers"} <= {s["step"] for s in told["steps"]}
    assert all(0 <= s["begin"] <= s["end"] <= told["seconds"] for s in told["steps"])
