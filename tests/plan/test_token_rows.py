"""Rows of zeros that the calibration text asks for: found, and without a read for each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exl2ray.formats.hf import SourceModel
from exl2ray.plan import doubts


@pytest.mark.parametrize("near", [1, 300, 1 << 18])
def test_rows_of_zeros_are_found_with_few_reads(near: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 64 float16, 128 bytes: one, two, or all of them at a time; a row behind the last is nobody's."""
    weight = torch.ones(40, 64, dtype=torch.float16)
    weight[[0, 7, 8, 39]] = 0
    weight[7, 63] = -0.0
    weight[9, :63] = 0
    save_file({"w": weight}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    source, reads = SourceModel(tmp_path), []
    load = source.load
    monkeypatch.setattr(source, "load", lambda name, rows: (reads.append(rows), load(name, rows))[1])
    monkeypatch.setattr(doubts, "NEAR_BYTES", near)
    wanted = [0, 1, 7, 8, 9, 10, 39, 40, 99]
    assert doubts._zero_rows(source, "w", wanted) == [0, 7, 8, 39]
    assert len(reads) == {1: 7, 300: 4, 1 << 18: 1}[near]
