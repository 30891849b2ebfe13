"""Wide Hessians on a real GPU: cuBLAS gives a block the same bits whoever asks for it, and the factor is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thread_comm import together

from exl2ray.quant import hessian
from exl2ray.quant.cholesky import BLOCK
from exl2ray.quant.factorising import factorise_together
from exl2ray.quant.hessian import DAMPING, HessianAccumulator, prepare
from exl2ray.quant.rows import SHARES, TreeSum, owner_shares, share_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

K, ROWS = 5 * BLOCK + 300, 19
GPU = torch.device("cuda")


def tree_of(shares: range) -> TreeSum:
    tree = TreeSum()
    for s in shares:
        h = HessianAccumulator(K, GPU)
        generator = torch.Generator(GPU).manual_seed(s)
        x = torch.randn(400, K, generator=generator, device=GPU) * torch.linspace(0.1, 3.0, K, device=GPU)
        h.add(x.half(), len(share_rows(ROWS)[s]))
        tree.add(s, h)
    return tree


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_group_finds_the_factor_of_a_worker_alone(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    total = tree_of(range(SHARES)).total()
    whole = prepare(total.h, rows=total.rows)  # float32
    monkeypatch.setattr(hessian, "FLOAT64_ROWS", K - 1)
    alone = prepare(total.h, rows=total.rows)

    def member(comm: Any) -> Any:
        tree = tree_of(owner_shares(comm.rank, size))
        return factorise_together(comm, tree, comm.gather(tree.counts()), 1, GPU, DAMPING, "here", [], False)

    found = together(size, member)
    assert [f is None for f in found] == [rank != 1 for rank in range(size)]
    assert alone.r is not None
    assert whole.r is not None
    assert torch.equal(found[1].r, alone.r)
    assert torch.equal(found[1].perm, alone.perm)
    assert (found[1].damping, found[1].mean_diagonal) == (alone.damping, alone.mean_diagonal)
    assert torch.allclose(alone.r, whole.r, rtol=1e-3, atol=1e-4 * float(whole.r.abs().max()))
