"""On a GPU: a step that is replayed from a recording gives what it gives when its kernels are launched one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exl2ray.tune.opening import load_source, load_tuned, open_pair
from exl2ray.tune.training import Rates, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
Pairs = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize(("family", "recorded"), [("Llama", True), ("Gemma2", True), ("Qwen2", True), ("Mixtral", False)])
@torch.no_grad()
def test_replayed_steps_are_those_that_are_launched(
    pair: Pairs, family: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, (source, exl2) = torch.device("cuda"), pair(family)
    found = open_pair(exl2, source)
    rows = torch.randint(0, found.start.vocab_size, (5, 8, 32), generator=torch.Generator().manual_seed(5))
    states: list[list[Tensor]] = []
    for record in (True, False):
        modules = [load_tuned(found, m, device, torch.bfloat16) for m in found.start.spec.modules]
        source_blocks = [load_source(found, m, device) for m in found.start.spec.modules]
        one = Trainer(modules, source_blocks, device, int(found.start.bos_id is not None), record)
        losses = [one.step(ids, Rates(2e-2, 5e-3, 1 / (1 + i))) for i, ids in enumerate(rows)]
        assert one.recording.recorded == (record and recorded), one.recording.problem
        states.append([*losses, *(p.cpu() for m in modules for p in m.state().values())])
        assert len({float(loss) for loss in losses}) == len(rows)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*states, strict=True))
