"""Divergences of held-out rows, each worker of a group doing some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exl2ray.model.blocks import Block
from exl2ray.quant.group import Comm
from exl2ray.tune.divergence import divergences

EVALUATED_AT_ONCE = 8192  # tokens


class Evaluator:
    """The held-out rows, ids (H, T), and the source model. skip: positions at the start of a row that do not count.

    on_host: whether states wait there while blocks go by, which pass one after another, all rows through each.
    """

    def __init__(
        self, ids: Tensor, source: Sequence[Block], device: torch.device, skip: int, comm: Comm, on_host: bool = False
    ) -> None:
        self._source, self._device, self._skip, self._comm, self._on_host = source, device, skip, comm, on_host
        count = max(1, EVALUATED_AT_ONCE // ids.shape[1])
        pieces = [ids[i : i + count] for i in range(0, len(ids), count)]
        self._numbers = range(comm.rank, len(pieces), comm.size)
        self._pieces = [pieces[i] for i in self._numbers]
        self._states: list[Tensor] | None = None

    @torch.no_grad()
    def __call__(self, blocks: Sequence[Block]) -> Tensor:
        """Mean divergence of each row, (H,) float64, of the model that the blocks are; all members call it together."""
        if self._states is None:
            self._states = [x.cpu() for x in self._through(self._source)]
        found: list[Tensor] = []
        states, head, source_head = self._through(blocks), blocks[-1], self._source[-1]
        for x, theirs in zip(states, self._states, strict=True):
            each = divergences(head, source_head, x.to(self._device), theirs.to(self._device))
            found.append(each.double().view(-1, self._pieces[len(found)].shape[1] - self._skip).mean(1).cpu())
        mine = {number: rows.tolist() for number, rows in zip(self._numbers, found, strict=True)}
        every = {number: rows for member in self._comm.gather(mine) for number, rows in member.items()}
        return torch.tensor([x for _, rows in sorted(every.items()) for x in rows], dtype=torch.float64)

    def _through(self, blocks: Sequence[Block]) -> list[Tensor]:
        """(positions, hidden) in front of the head, those that count, of each piece."""
        xs = list(self._pieces)
        for i in range(len(blocks) - 1):
            block = blocks[i]
            xs = [self._home(block.forward(x.to(self._device))) for x in xs]
        return [x[:, self._skip :].flatten(0, 1) for x in xs]

    def _home(self, x: Tensor) -> Tensor:
        return x.cpu() if self._on_host else x
