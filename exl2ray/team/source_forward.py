"""Running the source model as a group, so that every member gets what its work begins with.

Work on reference states is independent but for the states at the entry of a module (`exl2ray.driver.independent`). A worker
alone has to run every module before its own, and to read it, which takes longer. A group shares both out: every member runs
its own rows (`exl2ray.quant.rows`), and reads its own part of each weight, the rest of which comes from the others. Between
GPUs of one machine that is many times faster than reading. Batches and the order of sums are those of a worker alone, so all
results have the same bits.

Measured with 8 layers of 70B on four H200: measuring was 2.66 times as fast as on one while every worker found its own way,
and 3.71 times with this. A layer takes 0.06 s for the measurement rows in place of 0.25.

The modules that a member begins with are *prepared* for it: their Hessians are summed in the sweep too, and it gets them with
the states before and after. So nothing of a reference pass is done twice. Prepared modules wait on the GPU, so their number
is limited; before later ones a member makes the reference passes alone, from the states that it has. With few rows nothing is
prepared: adding up K x K matrices over members takes longer than the pass alone (1.1 s against 0.2 and 0.6). Where partial
sums would not fit on the GPU (70B on 24 GB), neither. Only members of one machine do this: moving Hessians through a network
would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.model.blocks import Block, check_states
from exl2ray.quant.entering import add_share, empty_trees
from exl2ray.quant.group import Comm
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.memory import context_bytes
from exl2ray.quant.rows import SHARES, gather_sums, owner_shares, share_rows
from exl2ray.team.messages import Meeting, RowSet
from exl2ray.team.runner import Runner
from exl2ray.team.shared_reading import SharedReading

PREPARE_TOKENS = 1 << 17  # of calibration rows: with fewer, adding up Hessians over members takes longer than a pass alone


@dataclass
class Prepared:
    """A module whose reference pass is done: states before and after it (R, T, hidden), Hessians by input."""

    x: Tensor
    y: Tensor
    hessians: dict[str, HessianAccumulator]


@dataclass
class Found:
    """What a sweep leaves with a member. x: states at the entry of module ``index``, unless that one is prepared."""

    index: int
    x: Tensor | None
    prepared: dict[int, Prepared]


def begin_reading(run: Runner, meeting: Meeting, stretches: Sequence[Sequence[int]]) -> SharedReading:
    """Starts to read what `source_forward` will load, which may be before the group has met."""
    reading = SharedReading(run, meeting.rank, meeting.size)
    reading.expect(0, max(stretch[0] for stretch in stretches))
    return reading


def source_forward(
    run: Runner, comm: Comm, rows: RowSet, stretches: Sequence[Sequence[int]], reading: SharedReading
) -> Found:
    """Runs the source model with the group, as far as any stretch begins; what this member's modules begin with.

    stretches: by rank, indices of the modules that a member will work on, ascending. All members call it. A member's first
    modules are prepared, as far as it has room; to the rest it finds its own way. reading: of the whole group.
    """
    reading.meet(comm)
    ids = run.rows(rows)
    nbytes = run.state_bytes(rows)
    rooms: list[int] = comm.gather(run.room(nbytes, rows))
    owners = _owners(run, stretches, rooms, nbytes) if ids.numel() >= PREPARE_TOKENS else {}
    starts = [stretch[0] for stretch in stretches]
    own = stretches[comm.rank]
    run.expect(own[0])  # what this member goes on with
    end = max([*starts, *(index + 1 for index in owners)])
    reading.expect(0, end)
    states = run.embedded(rows, run.load_from(reading, run.spec.modules[0]))
    sweep = _Sweep(run, comm, rows, states)
    del states
    found = Found(own[0], None, {})
    for module in run.spec.modules[1 : end + 1]:
        for rank, start in enumerate(starts):
            if start == module.index and owners.get(start) != rank:
                collected = sweep.collect(rank)
                found.x = collected if rank == comm.rank else found.x
        if module.index == end:
            break
        reading.expect(module.index, end)
        block = run.load_from(reading, module)
        owner = owners.get(module.index)
        if owner is None:
            sweep.advance(block)
            continue
        before = found.prepared.get(module.index - 1)
        known = owners.get(module.index - 1) == owner
        x = None if known else sweep.collect(owner)
        y, hessians = sweep.enter(block, owner)
        if owner == comm.rank and y is not None:
            entry = before.y if before is not None else x
            if entry is None:
                raise AssertionError("the owner of a module has collected its states")
            found.prepared[module.index] = Prepared(entry, y, hessians)
    return found


def _owners(run: Runner, stretches: Sequence[Sequence[int]], rooms: Sequence[int], nbytes: int) -> dict[int, int]:
    """Module index -> rank of the member that it is prepared for."""
    out: dict[int, int] = {}
    for rank, stretch in enumerate(stretches):
        room = rooms[rank]
        for index in stretch:
            module = run.spec.modules[index]
            room -= context_bytes(module, nbytes)
            if index in out or room < 0 or module.kind == "head" or run.settings(module, 1, 1).sums_on_host:
                break
            out[index] = rank
    return out


class _Sweep:
    """A member's rows on their way through the model."""

    def __init__(self, run: Runner, comm: Comm, rows: RowSet, states: Tensor) -> None:
        self._run, self._comm, self._rows = run, comm, rows
        self._ranges = share_rows(len(states))
        shares = owner_shares(comm.rank, comm.size)
        self._shares = {s: states[self._ranges[s].start : self._ranges[s].stop].clone() for s in shares}

    def advance(self, block: Block) -> None:
        for s, x in self._shares.items():
            if len(x):
                self._shares[s] = self._run.advance(block, x)

    def enter(self, block: Block, owner: int) -> tuple[Tensor | None, dict[str, HessianAccumulator]]:
        """Goes through a block. The owner gets the states after it and the Hessians of its inputs."""
        run, comm = self._run, self._comm
        sizes = {x.input_group: x.in_features for x in block.module.linears}
        trees = empty_trees(block)
        for s, x in self._shares.items():
            if len(x):
                settings = run.settings(block.module, len(x), x.shape[1])
                self._shares[s] = add_share(trees, s, block, x, settings, check_states, self._ranges[s].start)
        held = comm.gather({group: tree.counts() for group, tree in trees.items()})
        for group, tree in trees.items():
            gather_sums(comm, tree, [member[group] for member in held], owner, sizes[group], run.device)
        y = self.collect(owner)
        return y, {group: tree.total() for group, tree in trees.items()} if owner == comm.rank else {}

    def collect(self, to: int) -> Tensor | None:
        """All rows of the states, for one member; None for the others."""
        run, comm, shares = self._run, self._comm, self._shares
        if comm.rank != to:
            comm.exchange([(x.to(run.device).contiguous(), to) for x in shares.values()], [])
            return None
        some = next(iter(shares.values()))
        shape = (self._ranges[SHARES - 1].stop, *some.shape[1:])
        home = run.home(some.element_size() * torch.Size(shape).numel(), self._rows)
        out = torch.empty(shape, dtype=some.dtype, device=home)
        for source in range(comm.size):
            own = owner_shares(source, comm.size)
            places = [out[self._ranges[s].start : self._ranges[s].stop] for s in own]
            if source == comm.rank:
                for s, place in zip(own, places, strict=True):
                    place.copy_(shares[s])
                continue
            received = [torch.empty_like(p, device=run.device) if p.device.type != run.device.type else p for p in places]
            comm.exchange([], [(t, source) for t in received])
            for t, place in zip(received, places, strict=True):
                if t is not place:
                    place.copy_(t)
        return out
