"""The recipe refuses contradictions with the flag that the user typed; what of it makes a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exl2ray.errors import UsageError
from exl2ray.recipe import JOB_FLAGS, Recipe, bpw_name
from exl2ray.store.job_file import SECTIONS, compare_jobs


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"in_dir": "model", "out_dir": "work", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": ()}, "-b: no bitrate"),
        ({"bits": (1.5,)}, "-b 1.5: "),
        ({"bits": (float("nan"),)}, "-b nan: "),
        ({"bits": (4.0, 4.0)}, "-b: a bitrate is given twice"),
        ({"head_bits": 7}, "-hb 7: .*2, 3, 4, 5, 6, 8"),
        ({"dataset_rows": 0}, "-r 0: "),
        ({"measurement_rows": -1}, "-mr -1: "),
        ({"length": 0}, "-l 0: "),
        ({"measurement_length": 200}, "-ml 200: .*multiple of 128"),
        ({"rope_scale": 0.0}, "-rs 0: "),
        ({"rope_alpha": float("inf")}, "-ra inf: "),
        ({"output_measurement": "m.json", "compile_full": "out"}, "-om .*-cf"),
        ({"output_measurement": "m.json", "measurement": "n.json"}, "-m .*-om"),
        ({"bits": (3.0, 4.0), "compile_full": "out"}, "-cf out: 2 bitrates"),
        ({"damping": 0.0}, "--damping 0: "),
        ({"gpus": 0}, "--gpus 0: "),
        ({"shard_size": float("-inf")}, "-ss -inf: "),
        ({"device": "tpu"}, "--device tpu: one of auto, cuda, cpu"),
        ({"executor": "inlin"}, "--executor inlin: "),
        ({"propagate": "fp16"}, "--propagate fp16: "),
        ({"objective": "cubed"}, "--objective cubed: "),
        ({"objective_power": float("nan")}, "--objective-power nan: "),
        ({"objective_power": 0.0}, "--objective-power 0: "),
        ({"objective_power": 500.0}, "--objective-power 500: "),
        ({"checkpoint_seconds": -1.0}, "--checkpoint-seconds -1: "),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(**changes)


def test_own_data_may_have_any_length() -> None:
    assert recipe(length=200, cal_dataset="text.parquet").length == 200


def test_output_directories() -> None:
    r = recipe(bits=(3.0, 4.125), compile_full="out/{bpw}")
    assert [r.output_dir(b) for b in r.bits] == ["out/3.0", "out/4.125"]
    assert recipe().output_dir(4.125) is None
    named = recipe(bits=(6.0,), head_bits=8, compile_full="out/{bpw}-h{head}")
    assert named.output_dir(6.0) == "out/6.0-h8"
    assert recipe(quality="reference", compile_full="out-h{head}").output_dir(4.0) == "out-h6"  # what convert.py takes
    with pytest.raises(UsageError, match="found with those of the rest"):
        recipe(allocation="linear", compile_full="out/{bpw}-h{head}")
    assert bpw_name(4) == "4.0"


def test_a_field_that_stands_for_nothing_is_no_part_of_a_folder_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"-cf .*/\{bits\}: \{bits\} stands for nothing") as e:
        recipe(compile_full=f"{tmp_path}/{{bits}}")
    assert "{bpw}" in e.value.hint
    with pytest.raises(UsageError, match=r"\{bpw:.2f\} stands for nothing"):
        recipe(compile_full="out/{bpw:.2f}")
    (tmp_path / "{bits}").mkdir()
    assert recipe(compile_full=f"{tmp_path}/{{bits}}").output_dir(4.0) == f"{tmp_path}/{{bits}}"


def changed(**changes: Any) -> dict[str, set[str]]:
    """Sections of the job that a change of settings touches, and the settings in them."""
    before, after = recipe().job({"fingerprint": "f"}, None), recipe(**changes).job({"fingerprint": "f"}, None)
    out: dict[str, set[str]] = {}
    for change in compare_jobs(before, after):
        out.setdefault(change.section, set()).add(change.name)
        assert f"{change.section}.{change.name}" in JOB_FLAGS
    return out


@pytest.mark.parametrize(
    ("changes", "sections"),
    [
        ({"bits": (3.0,)}, {"quantize"}),
        ({"head_bits": 8}, {"quantize"}),
        ({"length": 1024}, {"quantize"}),
        ({"propagate": "reference"}, {"quantize"}),
        ({"objective": "product"}, {"quantize"}),
        ({"quality": "best", "compile_full": "out"}, {"quantize", "output"}),
        ({"allocation": "module"}, {"quantize"}),
        ({"target_correction": 0.3}, {"quantize"}),
        ({"scale_search": "error"}, {"quantize"}),
        ({"sweeps": 1}, {"quantize"}),
        ({"shard_size": 100}, {"output"}),
        ({"compile_full": "out"}, {"output"}),
        ({"measurement_length": 1024}, {"measure"}),
        ({"damping": 0.2}, {"measure"}),
        ({"seed": 1}, {"measure", "quantize"}),
        ({"chat_rows": False}, {"measure", "quantize"}),
        ({"rope_alpha": 2.0}, {"identity"}),
        ({"rope_scale": 2.0}, {"identity"}),
        ({"rotate": True}, {"identity"}),
        ({"device": "cpu", "gpus": 2, "executor": "inline", "checkpoint_seconds": 1.0, "no_resume": True}, set()),
    ],
)
def test_what_depends_on_a_setting(changes: dict[str, Any], sections: set[str]) -> None:
    assert changed(**changes).keys() == sections


def test_every_setting_of_a_job_has_a_flag() -> None:
    job = recipe().job({}, None)
    assert set(job) == set(SECTIONS)
    assert {f"{section}.{name}" for section in SECTIONS for name in job[section]} <= set(JOB_FLAGS)
