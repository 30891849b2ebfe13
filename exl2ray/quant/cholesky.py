"""Cholesky factors of wide Hessians in float64, block by block, by one device or by a team.

The matrix is cut into block rows, each held by one member up to its diagonal block. For one block column after another
(right-looking block Cholesky; Golub and Van Loan, Matrix Computations, section 4.2)

1. whoever holds the diagonal block factorises it and inverts the factor; everybody gets both,
2. all members multiply their blocks below it with the inverse: these are final, and everybody gets them,
3. all members subtract products of those from their blocks to the right.

The shape of a product depends on its block alone, so the factor has the same bits whoever takes part. A device alone takes
half a matrix of float64 besides the result; torch's factorisation takes two whole ones (7.4 and 13.2 GB beside H at 28672
inputs, in 0.210 and 0.216 s; some milliseconds slower at 11008), so that a card of 24 GB need not do with float32.

What a team gains: on two H200, four layers of a 70B shape take 6.78 s in place of 6.95 (2.4 %); on four and eight, which were
never measured since, the simulation of docs/scaling.md says 3.1 against 2.7 times, and 4.3 against 3.4 times, as fast as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exl2ray.quant.group import Comm, Solo

BLOCK = 1024  # rows; the same for every device and group, since results depend on it


def block_count(k: int) -> int:
    return -(-k // BLOCK)


def holders(k: int, size: int) -> list[int]:
    """Rank that holds each block row: from the last and longest one, back and forth over the members."""
    there_and_back = [*range(size), *reversed(range(size))]
    return [there_and_back[i % len(there_and_back)] for i in reversed(range(block_count(k)))]


def block_row(h: Tensor, order: Tensor, i: int) -> Tensor:
    """Block row ``i`` of h[order][:, order] up to its diagonal block, in h's dtype; of `block_shape`."""
    lines = order[i * BLOCK : (i + 1) * BLOCK]
    return h[lines][:, order[: (i + 1) * BLOCK]]


def block_shape(k: int, i: int) -> tuple[int, int]:
    """(b, i * BLOCK + b), where b is BLOCK, but for the last block row of a K x K matrix."""
    end = min((i + 1) * BLOCK, k)
    return end - i * BLOCK, end


def prepared(row: Tensor, i: int, rows: int, damping: float) -> Tensor:
    """`block_row` over ``rows`` plus damping on the diagonal, float64; filled up to whole blocks like an identity matrix."""
    out = torch.zeros(BLOCK, (i + 1) * BLOCK, dtype=torch.float64, device=row.device)
    out[: row.shape[0], : row.shape[1]] = row / rows
    diagonal = out[:, i * BLOCK :].diagonal()
    diagonal[: row.shape[0]].add_(damping)
    diagonal[row.shape[0] :].fill_(1.0)
    return out


def upper_factor(h: Tensor, rows: int, perm: Tensor, damping: float) -> Tensor | None:
    """R (K, K) float32, upper, with H[perm][:, perm] + damping I = R R^T for H = h / rows, computed in float64.

    None if the matrix is not positive definite. Both axes reversed: a lower factor of the flipped matrix is an upper factor
    of the matrix itself.
    """
    order, team = perm.flip(0), Solo()
    held = {i: prepared(block_row(h, order, i), i, rows, damping) for i in range(block_count(len(order)))}
    r = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    return r if factorise_rows(held, len(order), team, h.device, r) else None


def factorise_rows(held: dict[int, Tensor], k: int, team: Comm, device: torch.device, r: Tensor | None) -> bool:
    """Factorises the K x K matrix whose block rows (`prepared`) the members hold; whether it is positive definite.

    held: this member's block rows by index; used up. r: (K, K) float32 zeros that get the factor of the matrix with both axes
    reversed, on members that want it.
    """
    owners = holders(k, team.size)
    fine = torch.ones((), dtype=torch.bool, device=device)
    for j, owner in enumerate(owners):
        columns = slice(j * BLOCK, (j + 1) * BLOCK)
        pair = torch.empty(2, BLOCK, BLOCK, dtype=torch.float64, device=device)
        if owner == team.rank:
            _factorise_block(held.pop(j)[:, columns], pair)
        factor, inverse = team.broadcast(pair, owner)
        fine &= torch.isfinite(factor.diagonal()).all()
        own = sorted(held)
        places = _places(owners[j + 1 :], team.size)
        mine = torch.empty(max((slot + 1 for _, slot in places), default=0), BLOCK, BLOCK, dtype=torch.float64, device=device)
        for slot, i in enumerate(own):
            torch.mm(held[i][:, columns], inverse.T, out=mine[slot])
        blocks = team.gather_tensors(mine) if places else mine[None]
        below = _column(blocks, places)
        for slot, i in enumerate(own):
            held[i][:, columns.stop :].addmm_(mine[slot], below[: (i - j) * BLOCK].T, alpha=-1)
        if r is not None:
            rest = k - columns.start
            column = torch.cat([factor, below])[:rest, :rest]
            r[:rest, max(0, k - columns.stop) : rest] = column.flip(0, 1)
    return bool(fine)


def _factorise_block(block: Tensor, pair: Tensor) -> None:
    """The lower factor of a block and its inverse; NaN if there is none. Waits for nothing."""
    factor, info = torch.linalg.cholesky_ex(block)
    pair[0] = torch.where(info == 0, factor, torch.nan)
    pair[1] = torch.linalg.solve_triangular(pair[0], torch.eye(BLOCK, dtype=block.dtype, device=block.device), upper=False)


def _places(owners: Sequence[int], size: int) -> list[tuple[int, int]]:
    """(rank, its how manieth) of block rows with these owners."""
    seen = [0] * size
    out = []
    for owner in owners:
        out.append((owner, seen[owner]))
        seen[owner] += 1
    return out


def _column(blocks: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """Blocks of all members, (size, most, BLOCK, BLOCK), below each other (rows * BLOCK, BLOCK). Waits for nothing."""
    if len(blocks) == 1:
        return blocks[0].view(len(places) * BLOCK, BLOCK)
    return torch.cat([blocks[rank, slot] for rank, slot in places])
