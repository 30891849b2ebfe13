"""Shard planning and writing, side files, config.json."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from exl2ray.errors import FormatError, StoreError, UsageError
from exl2ray.formats import shards
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.shards import (
    TensorEntry,
    output_config,
    plan_shards,
    shard_names,
    write_config,
    write_shards,
    write_tensor_file,
)
from exl2ray.formats.side_files import copy_side_files


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=40), st.integers(-1, 120))
def test_plan_properties(sizes: list[int], limit: int) -> None:
    plan = plan_shards(sizes, limit)
    assert [i for shard in plan for i in shard] == list(range(len(sizes)))
    assert len(plan) == 1 or all(plan)
    if limit > 0:
        totals = [sum(sizes[i] for i in shard) for shard in plan]
        assert all(total <= limit or len(shard) == 1 for total, shard in zip(totals, plan, strict=True))
        # no shard is closed early: the first tensor of the next one did not fit any more
        assert all(t + sizes[nxt[0]] > limit for t, nxt in zip(totals, plan[1:], strict=False))
    else:
        assert len(plan) == 1


def test_shard_names() -> None:
    assert shard_names(1) == ["output.safetensors"]
    assert shard_names(3)[1] == "output-00002-of-00003.safetensors"


DTYPES = [torch.int32, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.int64]


def random_tensors(seed: int, count: int = 12) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(count):
        shape = tuple(int(n) for n in rng.integers(0, 7, rng.integers(0, 4)))
        data = torch.from_numpy(rng.integers(0, 2, (*shape, 8)).astype(np.uint8))
        dtype = DTYPES[i % len(DTYPES)]
        out[f"tensor.{i}.é"] = data[..., 0].to(dtype) if dtype != torch.bool else data[..., 0] > 0
    return out


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_safetensors_library_reads_our_files(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    tensors = random_tensors(seed)
    path = tmp_path_factory.mktemp("w") / "t.safetensors"
    write_tensor_file(path, [TensorEntry.of(n, t) for n, t in tensors.items()])
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, t in tensors.items():
        assert read[name].dtype == t.dtype
        assert torch.equal(read[name], t)
    with safe_open(path, "pt") as f:
        assert f.metadata() is None


def test_non_contiguous_tensors_are_written_in_logical_order(tmp_path: Path) -> None:
    t = torch.arange(12, dtype=torch.int32).reshape(3, 4).T
    write_tensor_file(tmp_path / "t.safetensors", [TensorEntry.of("t", t)])
    assert torch.equal(load_file(tmp_path / "t.safetensors")["t"], t)


def test_shards_are_streamed_one_tensor_at_a_time(tmp_path: Path) -> None:
    buffers: list[weakref.ref[np.ndarray]] = []
    alive_before: list[int] = []

    def make(i: int) -> torch.Tensor:
        alive_before.append(sum(ref() is not None for ref in buffers))
        data = np.full((4, 8), i, dtype=np.int16)  # lives as long as the tensor's storage
        buffers.append(weakref.ref(data))
        return torch.from_numpy(data)

    entries = [TensorEntry(f"t{i}", "I16", (4, 8), lambda i=i: make(i)) for i in range(9)]
    shards = write_shards(tmp_path / "out", entries, limit_bytes=150)
    assert alive_before == [0] * 9
    assert [s.name for s in shards] == shard_names(5)
    paths = [tmp_path / "out" / s.name for s in shards]
    assert [(s.size, s.sha256) for s in shards] == [
        (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths
    ]
    assert all(p.stat().st_size < 150 + 400 for p in paths)
    read = {k: v for p in paths for k, v in load_file(p).items()}
    assert all((read[f"t{i}"] == i).all() for i in range(9))


def test_stale_shards_go_only_if_they_are_ours(tmp_path: Path) -> None:
    entries = [TensorEntry.of(f"t{i}", torch.zeros(8)) for i in range(3)]
    first = write_shards(tmp_path, entries, limit_bytes=32)
    assert len(first) == 3
    with pytest.raises(StoreError, match=r"output-00001-of-00003\.safetensors and 2 more"):
        write_shards(tmp_path, entries)
    assert sorted(p.name for p in tmp_path.iterdir()) == shard_names(3)
    write_shards(tmp_path, entries, ours=[p.name for p in first])
    assert [p.name for p in tmp_path.iterdir()] == ["output.safetensors"]


def test_leftover_temporary_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".output-00001-of-00002.safetensors.0123abcd.tmp").write_bytes(b"x" * 99)
    (tmp_path / ".mine.tmp").write_bytes(b"x")
    write_shards(tmp_path, [TensorEntry.of("t", torch.zeros(8))])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "output.safetensors"]


def test_lying_callable_leaves_no_file(tmp_path: Path) -> None:
    entry = TensorEntry("t", "F16", (4,), lambda: torch.zeros(5, dtype=torch.float16))
    with pytest.raises(FormatError, match=r"'t' was announced as F16 \[4\] and is F16 \[5\]"):
        write_shards(tmp_path, [entry])
    assert list(tmp_path.iterdir()) == []


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'t' would be written twice"):
        write_shards(tmp_path, [TensorEntry.of("t", torch.zeros(1))] * 2)


def test_disk_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(StoreError, match="the output needs 32 B, 10 B are free"):
        write_shards(tmp_path, [TensorEntry.of("t", torch.zeros(8))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_while_writing_has_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        return real("/dev/full", os.O_WRONLY) if flags & os.O_EXCL else real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(StoreError, match="No space left") as e:
        write_shards(tmp_path, [TensorEntry.of("t", torch.zeros(1 << 16))])
    assert "free space" in e.value.hint


def test_unwritable_directory_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        write_shards(tmp_path / "file" / "out", [TensorEntry.of("t", torch.zeros(1))])


# -- side files and config -----------------------------------------------------------------------------------------


def test_side_files(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    (src / "sub").mkdir(parents=True)
    kept = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_x.py", "README.md", "LICENSE"]
    left = ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "a.pt", "b.pth"]
    left += ["pytorch_model.bin.index.json", "c.GGUF", "consolidated.00.pth", "consolidated.json", ".gitattributes"]
    left += ["tf_model.h5", "flax_model.msgpack", "sub/tokenizer.model"]
    for name in kept + left:
        (src / name).write_text(f"content of {name}")
    (src / "tokenizer.model").symlink_to(src / "sub" / "tokenizer.model")
    (src / "dangling.txt").symlink_to(src / "nowhere")
    names = copy_side_files(src, dst)
    assert sorted(names) == sorted([*kept, "tokenizer.model"])
    assert sorted(p.name for p in dst.iterdir()) == sorted(names)
    assert (dst / "tokenizer.model").read_text() == "content of sub/tokenizer.model"
    assert not (dst / "tokenizer.model").is_symlink()


def test_same_directory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("x")
    os.symlink(tmp_path, tmp_path.parent / "alias")
    with pytest.raises(UsageError, match="-cf"):
        copy_side_files(tmp_path, tmp_path.parent / "alias")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_config_equals_the_references(shared_dir: Path, tmp_path: Path) -> None:
    source = SourceModel(shared_dir / "models" / "tiny-llama-7m")
    write_config(tmp_path, output_config(source.config, 3.0, 6, 115, 2048, None))
    reference = shared_dir / "golden" / "tiny-llama-7m-exl2-3.0bpw" / "config.json"
    assert (tmp_path / "config.json").read_bytes() == reference.read_bytes()


def test_config_replaces_an_old_quantization_config(tmp_path: Path) -> None:
    source = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}, "name": "ü"}
    written = output_config(source, 4, 8, 10, 512, "data.parquet")
    assert written["quantization_config"] == {
        "quant_method": "exl2",
        "version": "0.3.2",
        "bits": 4.0,
        "head_bits": 8,
        "calibration": {"rows": 10, "length": 512, "dataset": "data.parquet"},
    }
    assert source["quantization_config"] == {"quant_method": "gptq"}
    raw = write_config(tmp_path, written).read_bytes()
    assert raw.isascii()
    assert json.loads(raw) == written


def test_fingerprint_does_not_depend_on_sharding(shared_dir: Path, tmp_path: Path) -> None:
    source = SourceModel(shared_dir / "models" / "tiny-llama-7m")
    shutil.copy(source.path / "config.json", tmp_path)
    entries = [TensorEntry(n, source.dtype(n), source.shape(n), lambda n=n: source.load(n)) for n in source.names()]
    assert len(write_shards(tmp_path, entries, limit_bytes=3 << 20)) > 3
    resharded = SourceModel(tmp_path)
    assert resharded.fingerprint() == source.fingerprint()
    assert resharded.names() == source.names()
