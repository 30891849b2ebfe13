"""Every family of the table through a whole conversion at 4 bpw: names, soundness, config, and distance to the source.

The models are random (tests/oracles.py), so the perplexity is about that of guessing; what shows a wrong tensor is the
KL divergence from the source, which a swapped, unscaled or missing part raises to the order of 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from convert_helpers import assert_sound, messages, run
from oracles import ORACLES, VOCAB, complete_model

from exl2ray.convert import Summary
from exl2ray.evaluate.compare import evaluate
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.tensorfile import TensorFile
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config, resolve_hyper
from exl2ray.model.table import ARCHITECTURES
from exl2ray.progress import Silent

ROWS, LENGTH = 4, 128
# nats per token, of random models at 4 bpw; see the module docstring
KL_BOUND = 0.1
QUANTISED = ("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups")


@dataclass(frozen=True)
class Converted:
    model: Path
    output: Path
    work: Path
    summary: Summary
    reporter: Silent


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small calibration file: random letters, so that every row reaches most of the byte tokens."""
    g = torch.Generator().manual_seed(0)
    rows = ["".join(chr(32 + i) for i in torch.randint(0, 95, (256,), generator=g).tolist()) for _ in range(16)]
    path = tmp_path_factory.mktemp("calibration") / "rows.parquet"
    pq.write_table(pa.table({"text": rows}), path)
    return path


@pytest.fixture(scope="module")
def converted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """A conversion per family, made once."""

    @cache
    def get(name: str) -> Converted:
        root = tmp_path_factory.mktemp(name)
        complete_model(name, root / "model")
        summary, reporter = run(
            root / "model", root / "work", compile_full=str(root / "out"), cal_dataset=str(text),
            dataset_rows=ROWS, measurement_rows=ROWS, length=LENGTH, measurement_length=LENGTH,
        )  # fmt: skip
        return Converted(root / "model", root / "out", root / "work", summary, reporter)

    return get


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_conversion_is_sound_and_close_to_its_source(name: str, converted: Callable[[str], Converted]) -> None:
    c = converted(name)
    assert_sound(c.model, c.output)
    assert [o.bits for o in c.summary.outputs] == [4.0]
    assert 3.7 < c.summary.outputs[0].achieved_bpw <= 4.0
    ids = torch.randint(3, VOCAB, (2, 64), generator=torch.Generator().manual_seed(5))
    result = evaluate(c.output, c.model, ids, "cpu")
    assert result.kl is not None; print("KL", name, result.kl.value, result.top1.value, result.perplexity.value, c.summary.outputs[0].achieved_bpw)
    assert 0 < result.kl.value < KL_BOUND
    assert math.isfinite(result.perplexity.value)
