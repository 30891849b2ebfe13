"""Every problem is listed, not only the first; `convert` refuses with the same list before it touches anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from header_models import LLAMA_8B, tensors_of, write_header_model
from tiny_models import edit_tensors

from exl2ray.convert import convert
from exl2ray.errors import Exl2RayError, SourceError, StoreError, UnknownArchitectureError, UsageError
from exl2ray.events import Silent
from exl2ray.plan import problems
from exl2ray.plan.findings import Examination
from exl2ray.plan.problems import BUILTIN_ROWS, examine
from exl2ray.recipe import Recipe

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def recipe(model: Path, tmp_path: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "bits": (4.0,), "length": 128, "measurement_length": 128, "executor": "inline", "device": "cpu",
        "compile_full": str(tmp_path / "out-{bpw}"), "quality": "reference",
    }  # fmt: skip
    return Recipe(**{"in_dir": str(model), "out_dir": str(tmp_path / "work"), **settings, **changes})


def topics(found: Examination) -> list[str]:
    return [p.topic for p in found.problems]


def test_a_sound_job_has_none_and_everything_is_known(tiny: Path, tmp_path: Path) -> None:
    found = examine(recipe(tiny, tmp_path))
    assert found.problems == []
    found.raise_any()
    assert found.spec is not None
    assert found.tokenizer is not None
    assert {name: tuple(r.ids.shape) for name, r in found.rows.items()} == {"measure": (19, 128), "quantize": (115, 128)}
    assert [need.what for need in found.disks] == ["work directory", "output 4.0"]
    assert list(tmp_path.iterdir()) == []


def test_everything_is_wrong_at_once(model: Path, text: Path, tmp_path: Path) -> None:
    """Seven problems of different kinds, in one go, and nothing written."""

    def damage(tensors: Tensors) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
        tensors["model.embed_tokens.weight"][5, 5] = 1e6

    edit_tensors(model, damage)
    (tmp_path / "out-9.0").mkdir()
    (tmp_path / "out-9.0" / "adapter.safetensors").write_bytes(b"x")
    (tmp_path / "work").write_text("a file")
    (tmp_path / "m.json").write_text("{}")
    job = recipe(
        model, tmp_path, bits=(2.0, 9.0), cal_dataset=str(text), dataset_rows=10_000, measurement=str(tmp_path / "m.json"),
        overrides=("nothing.*=6",),
    )  # fmt: skip
    before = {p.name for p in tmp_path.iterdir()}
    found = examine(job)
    assert topics(found) == [
        "output", "work directory", "--set", "bitrate", "bitrate", "measurement", "calibration", "values", "values",
    ]  # fmt: skip
    with pytest.raises(StoreError) as caught:
        convert(job, Silent())
    for part in ("8 problems would stop", "adapter.safetensors", "work is not a directory", "-b 2:", "-b 9:", "m.json",
                 "-r 10000", "--set", "model.norm.weight", "embed_tokens"):  # fmt: skip
        assert part in caught.value.message, part
    assert {p.name for p in tmp_path.iterdir()} == before


def test_one_problem_is_raised_as_it_is(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    found = examine(recipe(model, tmp_path))
    assert topics(found) == ["tokenizer"]
    with pytest.raises(SourceError) as caught:
        found.raise_any()
    assert caught.value is found.problems[0].error


def test_an_unknown_architecture_hides_no_other_problem(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    (model / "config.json").write_text(json.dumps(config))
    edit_tensors(model, lambda t: t[DOWN].fill_(float("inf")))
    (model / "tokenizer_config.json").write_text("[]")
    found = examine(recipe(model, tmp_path))
    assert topics(found) == ["architecture", "tokenizer", "values"]
    with pytest.raises(UnknownArchitectureError, match="3 problems"):
        found.raise_any()


def test_all_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tensors = tensors_of({**LLAMA_8B, "num_hidden_layers": 3})
    for name in [n for n in tensors if ".layers.1." in n]:
        del tensors[name]
    tensors["model.layers.2.mlp.up_proj.weight"] = (4096, 4096)
    model = write_header_model(tmp_path / "model", {**LLAMA_8B, "num_hidden_layers": 3}, 2, tensors)
    found = examine(recipe(model, tmp_path))
    assert topics(found) == ["tensors"] * 10
    assert "up_proj.weight has shape (4096, 4096), expected (14336, 4096)" in found.problems[-1].error.message
    with pytest.raises(SourceError, match="and 5 more") as caught:
        found.raise_any()
    assert caught.value.message.count(str(model)) == 1


def test_all_broken_files_are_named(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{")
    (model / "model.safetensors").write_bytes(b"version https://git-lfs")
    (model / "more.safetensors").write_bytes(b"")
    found = examine(recipe(model, tmp_path))
    assert topics(found) == ["source"] * 3
    names = [p.error.message.split(":")[0].rsplit("/", 1)[1] for p in found.problems]
    assert names == ["model", "config.json", "more.safetensors"]
    assert "model.safetensors is a Git LFS pointer" in found.problems[0].error.message


def test_a_problem_of_both_passes_is_told_once(tiny: Path, tmp_path: Path) -> None:
    found = examine(recipe(tiny, tmp_path, cal_dataset=str(tmp_path / "none.parquet")))
    assert topics(found) == ["calibration"]
    found = examine(recipe(tiny, tmp_path, length=512, measurement_length=384))
    assert topics(found) == ["calibration"] * 2, "two different rows that are too long"


LATE_TEXT: dict[str, tuple[dict[str, str], str, str]] = {  # settings, topic, words of message and hint
    "tuning, too little of -c": ({"tune": "6k"}, "--tune", r"-c: the text to tune on has 4096 tokens; .*--tune-text builtin"),
    "tuning, missing": ({"tune": "6k", "tune_text": "nowhere.txt"}, "--tune", r"--tune-text nowhere\.txt: does not exist"),
    "tuning, built-in": ({"tune": "6k", "tune_text": "builtin"}, "", ""),
    "best, too little": ({"quality": "best"}, "--tune", r"at least 20 rows of 512 are needed"),
    "evaluation, missing": ({"evaluate": "always", "eval_text": "nowhere.txt"}, "--eval-text", "of 2048 tokens"),
    "evaluation, a device": ({"evaluate": "always", "eval_text": "/dev/null"}, "--eval-text", r"not a regular file"),
    "evaluation, not wanted": ({"evaluate": "never", "eval_text": "nowhere.txt"}, "", ""),
}


@pytest.mark.parametrize("case", LATE_TEXT)
def test_text_that_is_read_at_the_end_is_looked_at_before(case: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    settings, topic, words = LATE_TEXT[case]
    job = recipe(tiny, tmp_path, cal_dataset=str(text), dataset_rows=3, measurement_rows=2, **settings)
    found = examine(job)
    assert topics(found) == ([topic] if topic else [])
    if topic:
        assert re.search(words, f"{found.problems[0].error} ".replace("\n", " ")), found.problems[0].error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compile_full": None, "evaluate": "always"}, "--evaluate always: nothing is evaluated"),
        ({"compile_full": None, "eval_text": "text.txt"}, "models are with -cf"),
        ({"eval_text": "text.txt"}, "with --evaluate always"),
        ({"evaluate": "always"}, ""), ({"eval_text": "text.txt", "evaluate": "never"}, ""), ({"compile_full": None}, ""),
        ({"compile_full": None, "evaluate": "always", "output_measurement": "m.json"}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_an_evaluation_that_comes_to_nothing_is_told(tiny: Path, tmp_path: Path, settings: Any, words: str) -> None:
    (tmp_path / "text.txt").write_text("A few words. " * 4000)
    place = {k: str(tmp_path / v) if k in ("eval_text", "output_measurement") else v for k, v in settings.items()}
    found = examine(recipe(tiny, tmp_path, **{"compile_full": str(tmp_path / "out"), **place}))
    assert not found.problems
    told = [w for w in found.warnings if "evaluated" in w]
    assert [words in w for w in told] == [True] * bool(words), found.warnings


def test_rows_that_are_those_of_other_data_are_told(tiny: Path, text: Path, tmp_path: Path) -> None:
    told = examine(recipe(tiny, tmp_path, dataset_rows=16, measurement_rows=4)).warnings
    own = "{1} to quantise on and {0} to measure on".format(*BUILTIN_ROWS)
    assert f"-r 16, -mr 4: for the data of -c; the built-in text has rows of its own, {own}" in told
    given = recipe(tiny, tmp_path, dataset_rows=3, measurement_rows=2, cal_dataset=str(text))
    for quiet in (given, recipe(tiny, tmp_path)):
        assert not any("for the data of -c" in w for w in examine(quiet).warnings)


def test_the_model_is_not_written_over(tiny: Path, tmp_path: Path) -> None:
    found = examine(recipe(tiny, tmp_path, out_dir=str(tiny), compile_full=str(tiny)))
    assert topics(found) == ["output", "work directory"]
    assert all(isinstance(p.error, UsageError) for p in found.problems)


class Disk:
    """os.statvfs with chosen room."""

    def __init__(self, free: int, shm: int | None = None) -> None:
        self.free, self.shm, self.real = free, shm, os.statvfs

    def __call__(self, path: Any) -> Any:
        real = self.real("/")
        free = self.shm if str(path) == "/dev/shm" and self.shm is not None else self.free
        fields = list(real)
        fields[4] = free // real.f_frsize  # f_bavail
        return os.statvfs_result(fields)


def test_too_little_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = recipe(tiny, tmp_path, bits=(4.0, 5.0))
    needs = examine(job).disks
    least = sum(n.least_bytes for n in needs)
    assert {n.device for n in needs} == {tmp_path.stat().st_dev}
    monkeypatch.setattr(os, "statvfs", Disk(least - 4096))
    found = examine(job)
    assert topics(found) == ["disk"], "one for the file system that all three share"
    message = found.problems[0].error.message
    assert all(name in message for name in ("work directory", "output 4.0", "output 5.0", "together need"))
    monkeypatch.setattr(os, "statvfs", Disk(least + 4096))
    assert examine(job).problems == []


def test_what_is_there_already_needs_no_room(tiny: Path, text: Path, tmp_path: Path) -> None:
    job = recipe(tiny, tmp_path, cal_dataset=str(text), dataset_rows=3, measurement_rows=2)
    before = examine(job).disks
    convert(job, Silent())
    after = examine(job).disks
    assert [n.what for n in after] == [n.what for n in before]
    assert all(n.least_bytes < 10_000 for n in (before[1], after[1]))  # shards are made in the work directory, and linked
    assert after[0].least_bytes < before[0].least_bytes - 40_000


def test_shared_memory_matters_between_gpus(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "statvfs", Disk(1 << 40, 64 << 20))
    several = {"device": "cuda", "executor": "auto"}
    found = examine(recipe(tiny, tmp_path, **several))
    assert topics(found) == ["shared memory"]
    assert "8 GPUs" in found.problems[0].error.message
    assert "--shm-size" in found.problems[0].error.hint
    for harmless in ({"gpus": 1}, {"gpus": 2}, {"ray_address": "head:6379"}, {"executor": "inline"}, {"device": "cpu"}):
        assert examine(recipe(tiny, tmp_path, **{**several, **harmless})).problems == [], harmless


def test_measuring_alone_needs_no_bitrate(tiny: Path, tmp_path: Path) -> None:
    job = recipe(tiny, tmp_path, compile_full=None, output_measurement=str(tmp_path / "m.json"), bits=(2.0,))
    assert examine(job).problems == []


def test_an_error_of_many_keeps_kind_and_hint(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(Exl2RayError) as caught:
        convert(recipe(model, tmp_path, bits=(2.0,)), Silent())
    assert caught.value.exit_code == 5, "of the first problem"
    assert "exl2ray plan" in caught.value.hint


def test_samples_of_weights_are_taken_beside_the_rows_of_tokens(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not where reading may take long: a stop would wait for it."""
    main, seen = threading.current_thread(), []

    def noted(*given: Any) -> list[Any]:
        seen.append(threading.current_thread() is main)
        return []

    monkeypatch.setattr(problems, "scan_values", noted)
    monkeypatch.setattr(problems, "flat_warnings", noted)
    assert not examine(recipe(tiny, tmp_path)).problems
    monkeypatch.setattr(problems, "mount_at", lambda folder: object())
    assert not examine(recipe(tiny, tmp_path)).problems
    assert seen == [False, False, True, True]


def test_what_a_sample_fails_with_comes_up(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> list[Any]:
        raise RuntimeError("a defect")

    monkeypatch.setattr(problems, "flat_warnings", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        examine(recipe(tiny, tmp_path))


def test_a_stop_waits_for_no_samples_that_are_yet_to_begin(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, seen = threading.Event(), []

    def stopped(*given: Any) -> None:
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(problems, "scan_values", lambda *given: seen.append(go_on.wait(60)) or [])
    monkeypatch.setattr(problems, "flat_warnings", lambda *given: seen.append("flat") or [])
    monkeypatch.setattr(problems, "pick_device", stopped)
    with pytest.raises(KeyboardInterrupt):
        examine(recipe(tiny, tmp_path))
    assert seen == [True]  # what had begun is over


def test_a_variable_that_makes_kernels_crawl_is_a_warning(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    warnings = examine(recipe(tiny, tmp_path)).warnings
    assert any(w.startswith("NUMBA_DISABLE_JIT=1: kernels are not compiled") for w in warnings)
