"""Sampling finds what is broken, looks at the same places for the same seed, and reads little."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from header_models import LLAMA_8B, write_header_model, write_shard
from safetensors.torch import save_file

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.plan import scan
from exl2ray.plan.scan import MOST_PIECES, PIECE_BYTES, scan_values, stored_names

LARGE = 1 << 20  # values: far more than are looked at


def model_with(directory: Path, **tensors: torch.Tensor) -> SourceModel:
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file(tensors, directory / "model.safetensors")
    return SourceModel(directory)


@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "holds 1 NaN"), (float("inf"), "beyond float16"), (7e4, "1 values beyond float16")]
)
def test_small_tensors_are_read_whole(value: float, says: str, tmp_path: Path) -> None:
    broken = torch.zeros(64, 48)
    broken[63, 47] = value
    source = model_with(tmp_path / "m", good=torch.ones(64, 48), broken=broken)
    (error,) = scan_values(source, source.names())
    assert "tensor broken " in error.message
    assert "looked at" not in error.message
    assert says in error.message


def test_a_sample_says_how_much_was_looked_at_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    broken = torch.zeros(LARGE, dtype=torch.bfloat16)
    broken[:: PIECE_BYTES] = float("nan")  # every other piece meets one
    source = model_with(tmp_path / "m", broken=broken)
    first, again, other = (scan_values(source, ["broken"], seed)[0].message for seed in (0, 0, 1))
    looked = MOST_PIECES * PIECE_BYTES // 2
    assert f"({looked} of its {LARGE} values looked at)" in first
    assert first == again
    counts = [int(text.split("holds ")[1].split()[0]) for text in (first, other)]
    assert 0 < counts[0] < looked // 100
    assert counts[0] != counts[1]


def test_a_lone_value_may_be_missed(tmp_path: Path) -> None:
    """What the sample cannot promise; the conversion reads everything."""
    broken = torch.zeros(LARGE)
    broken[LARGE // 3] = float("nan")
    source = model_with(tmp_path / "m", broken=broken)
    found = [bool(scan_values(source, ["broken"], seed)) for seed in range(8)]
    assert not all(found)


def test_other_dtypes_and_empty_tensors(tmp_path: Path) -> None:
    packed, empty = torch.zeros(4, 4, dtype=torch.int8), torch.zeros(0, 4)
    source = model_with(tmp_path / "m", packed=packed, empty=empty, fine=torch.ones(4))
    messages = {e.message.split("tensor ")[1].split()[0]: e for e in scan_values(source, source.names())}
    assert set(messages) == {"packed", "empty"}
    assert "quantised already" in messages["packed"].hint


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", a=torch.ones(512), b=torch.ones(512))
    file = tmp_path / "m" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    (error,) = scan_values(source, ["a", "b"])
    assert "tensor b: " in error.message
    assert "ends early" in error.message


def test_models_with_very_many_tensors_take_no_more_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_header_model(tmp_path / "m", {**LLAMA_8B, "num_hidden_layers": 4}, shards=2)
    source = SourceModel(directory)
    names = stored_names(load_spec(source))
    assert len(names) == 4 * 9 + 3
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: (reads.append(args[1]), pread(*args))[1])
    assert scan_values(source, names) == []
    assert len(reads) <= MOST_PIECES * len(names)
    assert max(reads) <= MOST_PIECES * PIECE_BYTES
    reads.clear()
    monkeypatch.setattr(scan, "READS", len(names))
    assert scan_values(source, names) == []
    assert len(reads) == len(names)


def test_tensors_that_nobody_reads_are_not_looked_at(tmp_path: Path) -> None:
    directory = write_header_model(tmp_path / "m", {**LLAMA_8B, "num_hidden_layers": 1}, shards=1)
    write_shard(directory / "extra.safetensors", {"model.layers.0.self_attn.rotary_emb.inv_freq": (64,)}, "F32")
    assert not any("rotary" in name for name in stored_names(load_spec(SourceModel(directory))))
