"""Attacks that other files of this folder do not have: each a few bytes, and what must happen."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounded import exl2ray
from safetensors.torch import load_file, save_file
from small_sources import HIDDEN, LLAMA, weights, write_exl2, write_source
from special_files import make_socket
from workdir_cases import Conversion

from exl2ray.store.job_file import decode_job, encode_job

RTL = "\x1b]0;title\x07\x1b[2J\u202e\u2066"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exl2(tmp_path_factory.mktemp("exl2"))


def dry_run(directory: Path, out: Path) -> Any:
    return exl2ray("convert", "-i", directory, "-o", out / "work", "-cf", out / "target", "-b", "4", "-l", "128",
                   "-ml", "128", "--device", "cpu", "--executor", "inline", "--dry-run")  # fmt: skip


# ---- files of a model that are none ---------------------------------------------------------------------------------------


def sparse(p: Path) -> None:
    with p.open("wb") as f:
        f.truncate(6 << 30)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "sparse": (sparse, "larger than"),
    "pipe": (os.mkfifo, "FIFO"),
    "socket": (make_socket, "socket"),
    "zeros without end": (lambda p: p.symlink_to("/dev/zero"), "device"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "links"),
    "the kernel's log": (lambda p: p.symlink_to("/proc/kmsg"), "/proc/kmsg"),
    "the environment": (lambda p: p.symlink_to("/proc/self/environ"), "/environ"),
}
NAMES = ("tokenizer_config.json", "added_tokens.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_model_that_is_none(name: str, kind: str, source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "model")
    make, says = KINDS[kind]
    make(directory / name)
    dry_run(directory, tmp_path).ends_with(3, name, says)


@pytest.mark.parametrize("kind", ["pipe", "socket", "zeros without end", "a link to itself", "the kernel's log"])
def test_a_shard_that_is_none(kind: str, source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "model")
    KINDS[kind][0](directory / "more.safetensors")
    dry_run(directory, tmp_path).ends_with(3, "more.safetensors")


# ---- FP8 ------------------------------------------------------------------------------------------------------------------

FP8_KEY = "model.layers.0.self_attn.q_proj.weight"
FP8: dict[str, tuple[tuple[int, ...], torch.Tensor | None, int, str]] = {  # codes, scale, status, words
    "one for each block": ((HIDDEN, HIDDEN), torch.ones(2, 2), 0, "no problem"),
    "not a number": ((HIDDEN, HIDDEN), torch.full((2, 2), float("nan")), 3, "NaN"),
    "infinite": ((HIDDEN, HIDDEN), torch.full((2, 2), float("inf")), 3, "beyond float16"),
    "huge": ((HIDDEN, HIDDEN), torch.full((2, 2), 1e38), 3, "beyond float16"),
    "no rows": ((HIDDEN, HIDDEN), torch.ones(0, 2), 3, "not per tensor"),
    "no columns": ((HIDDEN, HIDDEN), torch.ones(1, 0), 3, "not per tensor"),
    "more than weights": ((HIDDEN, HIDDEN), torch.ones(1000, 1000), 3, "not per tensor"),
    "three to a side": ((HIDDEN, HIDDEN), torch.ones(3, 3), 3, "not per tensor"),
    "whole numbers": ((HIDDEN, HIDDEN), torch.ones(2, 2, dtype=torch.int32), 3, "I32"),
    "all bytes set": ((HIDDEN, HIDDEN), torch.full((2, 2), 255, dtype=torch.uint8), 3, "NaN"),
    "missing": ((HIDDEN, HIDDEN), None, 3, "missing"),
    "codes without columns": ((HIDDEN, 0), torch.ones(HIDDEN, 1), 3, "no weights"),
    "codes without rows": ((0, HIDDEN), torch.ones(0, 1), 3, "no weights"),
    "a number": ((), torch.ones(1), 3, "no weights"),
}


@pytest.mark.parametrize("case", FP8)
def test_scales_of_fp8(case: str, source: Path, tmp_path: Path) -> None:
    shape, scale, status, says = FP8[case]
    directory = shutil.copytree(source, tmp_path / "model")
    codes = weights()[FP8_KEY] if shape == (HIDDEN, HIDDEN) else torch.zeros(shape)
    tensors = {**weights(), FP8_KEY: codes.to(torch.float8_e4m3fn)}
    save_file(tensors if scale is None else {**tensors, FP8_KEY + "_scale_inv": scale}, directory / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (directory / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": settings}))
    exl2ray("plan", "-i", directory, "-b", "4", "--device", "cpu").ends_with(status, says)


@pytest.mark.parametrize("size", [[0, 0], [-1, -1], ["a", 1], [10**200, 1]])
def test_sizes_of_blocks(size: Any, source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "model")
    tensors = {**weights(), FP8_KEY: weights()[FP8_KEY].to(torch.float8_e4m3fn), FP8_KEY + "_scale_inv": torch.ones(2, 2)}
    save_file(tensors, directory / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": size}
    (directory / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": settings}))
    exl2ray("plan", "-i", directory, "-b", "4", "--device", "cpu").ends_with(0, "no problem")


# ---- indices and groups of a quantised model ------------------------------------------------------------------------------

KEY = "model.layers.0.self_attn.q_proj"
QUANTISED: dict[str, tuple[str, torch.Tensor, str]] = {
    "row far outside": ("q_invperm", torch.full((HIDDEN,), 2**31 - 1, dtype=torch.int32), "permutation"),
    "row before the first": ("q_invperm", torch.full((HIDDEN,), -(2**31), dtype=torch.int32), "permutation"),
    "row twice": ("q_invperm", torch.zeros(HIDDEN, dtype=torch.int32), "permutation"),
    "few rows": ("q_invperm", torch.arange(32, dtype=torch.int32), "q_invperm has 32"),
    "group far outside": ("q_groups", torch.tensor([4, 32767], dtype=torch.int16), "starts at"),
    "group of negative width": ("q_groups", torch.tensor([-4, 0], dtype=torch.int16), "width -4"),
    "group of no width": ("q_groups", torch.tensor([0, 0], dtype=torch.int16), "width 0"),
    "group that goes back": ("q_groups", torch.tensor([4, 0, 4, -4], dtype=torch.int16), "width 4"),
    "a million groups": ("q_groups", torch.zeros(2_000_000, dtype=torch.int16), "2000000"),
    "scale not a number": ("q_scale_max", torch.tensor([float("nan")], dtype=torch.float16), "NaN"),
    "scale negative": ("q_scale_max", torch.tensor([-1.0], dtype=torch.float16), "negative"),
    "scales of other groups": ("q_scale", torch.zeros(5, 1, dtype=torch.int32), "q_scale has shape"),
    "three million columns": ("q_weight", torch.zeros(8, 3_200_000, dtype=torch.int32), "q_scale has shape"),
    "weights in one row": ("q_weight", torch.zeros(512, dtype=torch.int32), "2 dimensions"),
    "bias too short": ("bias", torch.zeros(3, dtype=torch.float16), "bias has 3"),
}


CHATTED = ("row far outside", "row before the first", "group far outside", "three million columns")  # that compute


@pytest.mark.parametrize(("command", "case"), [*(("verify", c) for c in QUANTISED), *(("chat", c) for c in CHATTED)])
def test_indices_that_lead_outside(command: str, case: str, model: Path, tmp_path: Path) -> None:
    name, tensor, says = QUANTISED[case]
    directory = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(directory / "output.safetensors")
    save_file({**tensors, f"{KEY}.{name}": tensor}, directory / "output.safetensors")
    more = ["--prompt", "x", "--max-tokens", "1", "--device", "cpu"] if command == "chat" else []
    exl2ray(command, directory, *more).ends_with(8, says)


# ---- tokens, texts, prompts -----------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["EXL2RAY_TEST_EVIL"],)


def array(header: str, size: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header.encode())
        if size:
            os.truncate(path, size)

    return write


def npy(shape: str, descr: str = "'<i8'", size: int = 0) -> Callable[[Path], None]:
    return array(f"{{'descr':{descr},'fortran_order':False,'shape':{shape}}}\n", size)


ARRAYS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "objects": (lambda p: np.save(p, np.array([Evil()], dtype=object), allow_pickle=True), 4, ""),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(Evil())), 4, "not a .npy"),
    "code for a shape": (npy("(__import__('os').mkdir('x'),)"), 4, "not a .npy"),
    "2^126 numbers": (npy(f"({2**63 - 1},{2**63 - 1})"), 4, ""),
    "less than none": (npy("(-5,)"), 4, ""),
    "deep": (array("(" * 9000), 4, "not a .npy"),
    "a thousand dimensions": (npy("(" + "1," * 1000 + ")"), 4, ""),
    "a length of 9000 digits": (npy("(" + "9" * 9000 + ",)"), 4, "not a .npy"),
    "texts": (npy("(1,)", "'<U8'", 1 << 12), 4, "integers"),
    "truths": (npy("(64,)", "'?'", 1 << 12), 4, "integers"),
    "5 GB, one row wanted": (npy("(5000000000,)", "'|u1'", 6 << 30), 0, "perplexity"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_tokens(case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXL2RAY_TEST_EVIL", str(tmp_path / "evil"))
    make, status, says = ARRAYS[case]
    make(tmp_path / "ids.npy")
    run = exl2ray("eval", "--model", model, "--tokens", tmp_path / "ids.npy", "--rows", "1", "--length", "32",
                  "--device", "cpu", env={"EXL2RAY_TEST_EVIL": str(tmp_path / "evil")}, cwd=tmp_path)  # fmt: skip
    run.ends_with(status, says)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy"], "something was run"


def test_all_of_a_huge_array_is_too_much(model: Path, tmp_path: Path) -> None:
    npy("(5000000000,)", "'|u1'", 6 << 30)(tmp_path / "ids.npy")
    exl2ray("eval", "--model", model, "--tokens", tmp_path / "ids.npy", "--device", "cpu").ends_with(4, "at most")


@pytest.mark.parametrize("kind", ["sparse", "zeros without end", "pipe", "the kernel's log"])
def test_texts_that_are_none(kind: str, model: Path, tmp_path: Path) -> None:
    KINDS[kind][0](tmp_path / "text.txt")
    exl2ray("eval", "--model", model, "--text", tmp_path / "text.txt", "--device", "cpu").ends_with(4, "text.txt")


PROMPTS = {
    "deep": (b"[" * 100_000, "not a JSON array"),
    "half a character": (b'["\\ud800"]', "not UTF-8"),
    "long": (json.dumps(["x" * 500_000]).encode(), "at most"),
    "zeros": (b"\0" * 100_000, "at most"),
    "numbers": (b"[1, 2]", "not a JSON array"),
    "bytes": (b"\xff\xfe\xfd", "not UTF-8"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_are_none(case: str, model: Path, tmp_path: Path) -> None:
    content, says = PROMPTS[case]
    (tmp_path / "prompts").write_bytes(content)
    exl2ray("chat", model, "--prompts", tmp_path / "prompts", "--max-tokens", "1", "--device", "cpu").ends_with(2, says)


# ---- arguments ------------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[list[str], int]] = {
    "escapes in -i": (["plan", "-i", f"a\n{RTL}"], 0),
    "escapes in a path": (["verify", f"/nonexistent/{RTL}"], 0),
    "escapes in a command": ([RTL], 2),
    "escapes in a flag": (["plan", f"--{RTL}"], 2),
    "escapes in --set": (["convert", "-i", "SOURCE", "-o", "w", "--set", f"{RTL}=4", "--dry-run"], 2),
    "escapes in --repo": (["publish", "MODEL", "--repo", f"me/{RTL}", "--dry-run"], 0),
    "no bytes of UTF-8": (["chat", "MODEL", "--prompt", "\udcff", "--device", "cpu"], 2),
    "a name of 300 letters for -o": (["convert", "-i", "SOURCE", "-o", "x" * 300, "--dry-run"], 2),
    "a name of 300 letters for -cf": (["convert", "-i", "SOURCE", "-o", "w", "-cf", "x" * 300, "--dry-run"], 2),
    "a path of 5000 letters": (["convert", "-i", "SOURCE", "-o", "x/" * 2500, "--dry-run"], 2),
    "a million letters of prompt": (["chat", "MODEL", "--prompt", "x" * 100_000 + "y" * 20_000, "--device", "cpu"], 2),
    "10^40 as seed": (["convert", "-i", "SOURCE", "-o", "w", "--seed", "1" + "0" * 40, "--dry-run"], 2),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, source: Path, model: Path, tmp_path: Path) -> None:
    arguments, status = ARGUMENTS[case]
    words = [{"SOURCE": str(source), "MODEL": str(model)}.get(a, a) for a in arguments]
    run = exl2ray(*words, cwd=tmp_path)
    assert not run.stopped, str(run)
    assert run.status == status if status else run.status in range(2, 11), str(run)
    assert not set(run.out + run.err) & set("\x1b\x07\u202e\u2066"), "control characters reached the terminal"


# ---- the job and the log of a work directory ------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = ({}, [[1]], 10**200)
FIELDS = (
    "identity.in_dir", "identity.rope_alpha", "measure.length", "measure.damping", "measure.rows", "quantize.bits",
    "quantize.sweeps", "quantize.target_correction", "output.compile_full", "output.shard_size",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_job_of_other_types(field: str, made: Conversion, tmp_path: Path) -> None:
    work = shutil.copytree(made.work, tmp_path / "work")
    section, name = field.split(".")
    sound = decode_job((work / "job.json").read_bytes(), "job.json")
    for i, value in enumerate(WRONG):
        job = {**sound.job, section: {**sound.job[section], name: value}}
        (work / "job.json").write_bytes(encode_job(dataclasses.replace(sound, job=job)))
        for command in (["convert", "-o"], ["status"])[: 2 if i == 1 else 1]:
            run = exl2ray(*command, work, *(["--dry-run"] if command[0] == "convert" else []))
            assert not run.stopped, f"{value!r}: {run}"
            assert "Traceback" not in run.text, f"{value!r}: {run}"
            assert run.status in range(2, 9) if command[0] == "convert" else run.status == 0, f"{value!r}: {run}"
            assert "\x1b" not in run.out + run.err


EVENTS: dict[str, dict[str, Any]] = {
    "2^30 items done": {"stage": "measure", "items": 2**30, "done": 2**30},
    "10^299 items done": {"stage": "measure", "items": 1, "done": 10**299},
    "fewer than none": {"stage": "measure", "items": -5, "done": -1},
    "10^400 seconds": {"stage": "measure", "items": 4, "done": 4, "worker": "w", "seconds": 10**400, "workers": 10**400},
    "10^400 bytes": {"stage": "measure", "bytes": 10**400, "received": -(10**400), "eta_seconds": 1e300, "bits": 10**300},
    "not a number": {"stage": "measure", "items": 4, "done": 1, "seconds": math.nan, "bytes": math.inf},
    "lists": {"stage": [], "items": [], "done": {}},
    "a script": {"stage": "<script>alert(1)</script>", "items": 4, "done": 2, "worker": "<script>alert(1)</script>"},
}


@pytest.mark.parametrize("case", EVENTS)
def test_a_log_of_other_numbers(case: str, made: Conversion, tmp_path: Path) -> None:
    work = shutil.copytree(made.work, tmp_path / "work")
    head = {"time": "2026-01-01T00:00:00.000Z", "host": "h", "pid": 1}
    lines = [
        {**head, "name": n, "fields": EVENTS[case]} for n in ("stage", "item", "written", "note", "allocated", "started")
    ]
    with (work / "events.jsonl").open("a") as f:
        f.writelines(json.dumps(x) + "\n" for x in lines)
    exl2ray("status", work).ends_with(0)
    exl2ray("report", work).ends_with(0)
    assert "<script>alert" not in (work / "report.html").read_text()


# ---- very many tensors ----------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_problems_are_not_printed(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"model.layers.{i}.mlp.experts.{i}.gate_proj.weight": empty for i in range(20_000)}).encode()
    (directory / "output.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    run = exl2ray("verify", directory)
    run.ends_with(8, "more; --json shows them all")
    assert len(run.out.splitlines()) < 1100
