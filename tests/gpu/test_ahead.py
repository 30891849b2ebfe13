"""Factors that are made on a stream of their own, while the input before is solved: the same bytes as one after another."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import check_states, load_block
from exl2ray.quality import PRESETS, Settings
from exl2ray.quant import hessian
from exl2ray.quant.entering import enter_module
from exl2ray.quant.module import cut, measure_module, quantize_module
from exl2ray.quant.qparams import parse

pytestmark = pytest.mark.gpu

class Packed(dict[str, PackedLinear]):
    """Keeps what is packed."""

    add = dict[str, PackedLinear].update

    def flush(self) -> None:
        pass


ROWS, TOKENS, HIDDEN, WIDE = 9, 512, 2560, 5120  # both Hessians are summed on one side of their diagonals


@pytest.mark.parametrize("quality", ["reference", "balanced"])
@pytest.mark.parametrize("experts", [0, 4])
def test_same_bytes(experts: int, quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
    models: Any = importlib.import_module("random_models")
    monkeypatch.setattr(hessian, "FLOAT64_ROWS", HIDDEN)  # the wide one block by block
    for room in ("module", "measure_moe"):
        monkeypatch.setattr(f"exl2ray.quant.{room}.lanes_of", lambda block: 1)
    models.build(tmp_path, models.Shape(1, HIDDEN, WIDE, 20, 20, experts=experts, vocab=272))
    source = SourceModel(tmp_path)
    spec = load_spec(source)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(ROWS, TOKENS, HIDDEN, generator=generator, device="cuda").half()
    other = (x.float() * 1.01).half()
    settings = replace(Settings(batch_rows=2), numerics=PRESETS[quality], budget_bytes=8 << 30)
    for module in spec.modules[1:3]:
        found = []
        for ahead in (False, True, True):
            own = replace(settings, ahead=ahead)
            block = load_block(spec, module, source, "cuda", torch.float16)
            profile = measure_module(enter_module(block, x, own, check_states), print)
            packed, params = Packed(), {y.key: parse("1:4b_32g") for y in module.linears}
            result = quantize_module(block, cut(x), cut(other), ROWS, params, own, check_states, packed)
            found.append((profile.to_json(), dict(profile.extra), result.error, packed))
        for profile, extra, error, packed in found[1:]:
            assert (profile, extra, error) == found[0][:3]
            for key, p in packed.items():
                expected = found[0][3][key].tensors()
                assert all(torch.equal(t.cpu(), expected[name].cpu()) for name, t in p.tensors().items()), key
