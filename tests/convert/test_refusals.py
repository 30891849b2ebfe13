"""Conversions that are refused: other settings than before, places that are taken, results that are broken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import Quiet, again, assert_sound, contents, items, messages, recipe, run

from exl2ray.calibration.soundness import Baseline
from exl2ray.convert import OutputSummary, convert, dry_run
from exl2ray.errors import JobMismatchError, NumericError, StoreError, UsageError
from exl2ray.events import Silent
from exl2ray.result_warnings import output_warnings
from exl2ray.steps.producing import judge

# ---- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"head_bits": 4}, "-hb: 6 -> 4"),
        ({"bits": (4.0,)}, "-b: [4.0, 5.0] -> [4.0]"),
        ({"shard_size": 1}, "-ss: 8192 -> 1"),
        ({"length": 256}, "-l: 128 -> 256"),
        ({"seed": 3}, "--seed: 0 -> 3"),
        ({"damping": 0.05}, "--damping: 0.12 -> 0.05"),
        ({"rope_alpha": 2.0}, "-ra: (not set) -> 2.0"),
    ],
)
def test_changed_settings_are_refused(quiet: Quiet, finished: Path, changes: dict[str, Any], flag: str) -> None:
    before = contents(finished)
    with pytest.raises(JobMismatchError, match=re.escape(flag)):
        again(quiet, finished, **changes)
    assert contents(finished) == before


def test_reuse_keeps_the_measurement(quiet: Quiet, finished: Path) -> None:
    reporter = again(quiet, finished, reuse=True, head_bits=4)
    assert items(reporter) == ["quantize 4.0: lm_head.linear", "quantize 5.0: lm_head.linear"]
    assert_sound(quiet.model, finished / "out-4.0")
    reporter = again(quiet, finished, reuse=True, bits=(4.5,), compile_full=str(finished / "out"))
    assert {i.split(":")[0] for i in items(reporter)} == {"quantize 4.5"}
    assert_sound(quiet.model, finished / "out")


def test_reuse_with_longer_quantisation_rows_keeps_the_measurement(quiet: Quiet, finished: Path) -> None:
    reporter = again(quiet, finished, reuse=True, length=256)
    assert not any(i.startswith("measure") for i in items(reporter))


@pytest.mark.parametrize("changes", [{"measurement_length": 256}, {"seed": 1}, {"damping": 0.2}, {"rope_scale": 2.0}])
def test_reuse_does_not_cover_what_the_measurement_depends_on(quiet: Quiet, finished: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(JobMismatchError):
        again(quiet, finished, reuse=True, **changes)


# ---- places ------------------------------------------------------------------------------------------------------------


def test_output_directory_must_not_be_the_source(llama: Path, tmp_path: Path) -> None:
    before = contents(llama)
    (tmp_path / "link").symlink_to(llama)
    for changes in ({"compile_full": str(llama)}, {"compile_full": str(tmp_path / "link")}):
        with pytest.raises(UsageError, match=r"is the source model"):
            run(llama, tmp_path / "work", **changes)
    with pytest.raises(UsageError, match=r"is the source model"):
        run(llama, llama)
    assert contents(llama) == before
    assert not (tmp_path / "work").exists()


def test_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    reporter = Silent()
    dry_run(recipe(llama, tmp_path / "work", compile_full=str(tmp_path / "out")), reporter)
    assert list(tmp_path.iterdir()) == []
    assert any("nothing was computed" in m for m in messages(reporter, "note"))


def test_two_drivers_on_one_directory(quiet: Quiet, tmp_path: Path) -> None:
    class Second(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "item" and fields["done"] == 1 and fields["stage"] == "measure":
                with pytest.raises(StoreError, match="driver"):
                    run(quiet.model, tmp_path / "work")
                self.refused = True

    reporter = Second()
    convert(recipe(quiet.model, tmp_path / "work", output_measurement=str(tmp_path / "m.json")), reporter)
    assert reporter.refused
    assert (tmp_path / "m.json").read_bytes() == (quiet.work / "measurement.json").read_bytes()


# ---- perplexity limits -------------------------------------------------------------------------------------------------


class Judge:
    """`judge` needs nothing of a job; what does not stop it is a warning."""

    def __call__(self, after: float | None, before: float | None) -> list[str]:
        out = OutputSummary(4.0, 3.99, "/out", ("/out/output.safetensors",), 1000, after, before)
        judge([out])
        return output_warnings(after, before, Baseline(50000, 20000.0, 100000))


@pytest.mark.parametrize(("after", "before"), [(12.0, 10.0), (30.0, 29.0), (100.0, 40.0), (5000.0, 2000.0), (900.0, 800.0)])
def test_perplexities_that_pass(after: float, before: float) -> None:
    assert Judge()(after, before) == []


@pytest.mark.parametrize(("after", "before"), [(30.1, 10.0), (99.0, 29.9)])
def test_perplexities_that_are_suspicious(after: float, before: float) -> None:
    (message,) = Judge()(after, before)
    assert f"{after:.4g}" in message
    assert f"{before:.4g}" in message


@pytest.mark.parametrize(
    ("after", "before"), [(None, 10.0), (101.0, 10.0), (1001.0, 900.0), (1001.0, 500.0), (20001.0, 2000.0), (None, None)]
)
def test_perplexities_of_broken_models(after: float | None, before: float | None) -> None:
    with pytest.raises(NumericError, match="the quantised model is broken") as caught:
        Judge()(after, before)
    assert "/out/output.safetensors" in caught.value.hint
    assert "4 bpw" in caught.value.message


def test_a_broken_model_is_an_error_that_keeps_the_files(
    quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exl2ray.result_warnings.BROKEN_RATIO", 0.5)
    for _ in range(2):  # a resume says the same
        with pytest.raises(NumericError, match=r"calibration perplexity \d+.*of the source model \d+"):
            run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(quiet.outputs[4.0])
