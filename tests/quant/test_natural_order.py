"""An MLP with biases keeps down_proj in natural order: loaders permute the columns of up and gate, not their biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_helpers import hessian, load, quantized, states

from exl2ray.quality import Settings
from exl2ray.quant.hessian import keeps_order, prepare, round_to_nearest
from exl2ray.quant.qparams import parse


def test_factor_in_natural_order() -> None:
    h = hessian(64)
    factor = prepare(h, natural=True)
    assert factor.perm.tolist() == round_to_nearest(h.diagonal(), natural=True).perm.tolist() == list(range(64))
    assert prepare(h).perm.tolist() != list(range(64))
    assert factor.r is not None
    assert torch.allclose(factor.r @ factor.r.T, h + factor.damping * torch.eye(64), rtol=1e-4, atol=1e-3 * float(h.max()))


@pytest.mark.parametrize(("bias", "natural"), [(True, True), (False, False)])
def test_down_proj_of_a_biased_mlp_is_not_reordered(tmp_path: Path, bias: bool, natural: bool) -> None:
    from tiny_models import write_model

    spec, block = load(write_model(tmp_path / "model", mlp_bias=bias), 2)
    assert keeps_order(block.module, "down") is natural
    assert not keeps_order(block.module, "gate_up")
    params = {x.key: parse("1:4b_32g s4") for x in block.module.linears}
    _, packed, _ = quantized(block, states(spec), params, Settings())
    orders = {p.key.rsplit(".", 1)[1]: p.q_invperm.tolist() for p in packed.values()}
    assert (orders["down_proj"] == list(range(96))) is natural
    assert orders["up_proj"] != list(range(64))
    assert orders["up_proj"] == orders["gate_proj"]
