"""What is sent of a module is on its way while the gradients of the ones before it are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from thread_comm import together
from torch import Tensor

from exl2ray.tune.sums import TreeOfSums, owners_of
from exl2ray.tune.updates import Updates


class Plain:
    """A module with two leaves, which gradients are taken from; ``log`` hears of its updates."""

    def __init__(self, name: str, size: int, rank: int, log: list[str], trained: bool = True) -> None:
        self.name, self.rank, self.log, self.trained = name, rank, log, trained
        self.leaves = [torch.arange(4.0), torch.arange(3.0)]
        self.owners = owners_of([4, 3], size)

    def update(self, gradients: Sequence[Tensor | None], rate: Tensor, gain_rate: Tensor) -> None:
        self.log.append(f"update {self.name}")
        for leaf, owner, g in zip(self.leaves, self.owners, gradients, strict=True):
            assert (g is not None) == (owner == self.rank)
            if g is not None:
                leaf -= rate * g

    def updated(self, module: Plain) -> None:
        self.log.append(f"updated {self.name}")


class Logged:
    """A member of a group whose exchanges are told."""

    def __init__(self, comm: Any, log: list[str]) -> None:
        self.rank, self.size, self._comm, self._log = comm.rank, comm.size, comm, log

    def start(self, sends: Any, receives: Any) -> Any:
        self._log.append("start")
        return self._comm.start(sends, receives)


@pytest.mark.parametrize("behind", [True, False])
def test_modules_are_updated_in_order_with_their_own_sums(behind: bool) -> None:
    rates = torch.tensor([0.5, 0.5])

    def steps(comm: Any) -> tuple[list[str], list[list[Tensor]]]:
        log: list[str] = []
        modules = [Plain(name, comm.size, comm.rank, log) for name in "abcd"]
        modules.insert(2, Plain("not trained", comm.size, comm.rank, log, trained=False))
        updates = Updates(Logged(comm, log), rates, comm.size, behind)  # type: ignore[arg-type]
        for k, module in enumerate(modules):
            log.append(f"gradients {module.name}")
            sums = TreeOfSums()
            sums.add(comm.rank, [torch.full((4,), float(10 * k + comm.rank)), torch.full((3,), 1.0 + k)])
            updates.add(module, sums)  # type: ignore[arg-type]
        updates.finish()
        return log, [m.leaves for m in modules]

    for log, leaves in together(2, steps):
        for k, (wide, narrow) in enumerate(leaves):
            factor = 0.0 if k == 2 else 0.5
            assert torch.equal(wide, torch.arange(4.0) - factor * (20 * k + 1))
            assert torch.equal(narrow, torch.arange(3.0) - factor * (2 + 2 * k))
        assert [x for x in log if x.startswith("updated")] == [f"updated {n}" for n in "abcd"]
        for before, after in zip("abcd", "bcd", strict=False):
            late = log.index(f"update {before}") > log.index(f"gradients {after}")
            assert late == behind
        assert log.count("start") == 8
