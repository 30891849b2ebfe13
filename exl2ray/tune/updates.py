"""Updates of modules on the way back of a step, in the order in which their gradients are found.

In a group a module goes three ways: its gradients to who owns the tensors, there a step of the optimiser, the new weights to
the others. Nothing of this is needed for the gradients of the module before it. So what is sent is on its way meanwhile:
with an update every module finishes what the ones behind it have begun, and the numbers are the same as if each had waited.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from exl2ray.quant.group import Comm, Exchange
from exl2ray.tune.module import TunedModule
from exl2ray.tune.sums import TreeOfSums, bring_to_owners, give_to_others


class Updates:
    """rates: (2,) of `exl2ray.tune.module.TunedModule.update`. shares: of the step. behind: whether up to two modules may be
    on their way behind the one in hand, with their gradients; if not, each is updated at once."""

    def __init__(self, comm: Comm, rates: Tensor, shares: int, behind: bool) -> None:
        self._comm, self._rates, self._shares = comm, rates, shares
        self._behind = behind and comm.size > 1
        self._brought: deque[tuple[TunedModule, Callable[[], list[Tensor | None]]]] = deque()
        self._given: deque[tuple[TunedModule, Exchange]] = deque()

    def add(self, module: TunedModule, sums: TreeOfSums) -> None:
        """``sums``: the gradients of this member's shares. All members add the same modules in the same order."""
        if not module.trained:
            return
        self._brought.append((module, bring_to_owners(self._comm, sums, module.leaves, module.owners, self._shares)))
        if self._behind:
            self._advance(1)
        else:
            self.finish()

    def finish(self) -> None:
        """Every module that was added has been updated, on all members."""
        while self._brought:
            self._advance(0)
        self._end(0)

    def _advance(self, kept: int) -> None:
        """Updates the module whose gradients come next, unless only ``kept`` are on their way."""
        if len(self._brought) <= kept:
            return
        module, sums = self._brought.popleft()
        module.update(sums(), self._rates[0], self._rates[1])
        self._end(0)  # its weights were sent before those of this one
        self._given.append((module, give_to_others(self._comm, module.leaves, module.owners)))

    def _end(self, kept: int) -> None:
        while len(self._given) > kept:
            module, weights = self._given.popleft()
            weights.wait()
            module.updated(module)
