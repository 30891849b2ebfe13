"""One step: both models forward on the same rows, the loss, and the way back, module by module.

A step's rows are cut into shares (`exl2ray.tune.sums`), each computed by itself in tensors of one shape; gradients are summed
along a tree. So the results do not depend on who computes which share. On the way forward the states before every module are
kept; on the way back a module is computed once more with gradients, unless there is memory to keep what that takes the first
time (the same numbers, earlier). A module is updated as soon as the gradients of all shares are there: those of one exist at
a time, or in a group those of the next ones too, while the first are on their way (`exl2ray.tune.updates`). So modules may
come and go (`exl2ray.tune.shelves`); then the states wait on the host.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exl2ray.model.blocks import Block, MoeBlock
from exl2ray.model.half import AttentionHalf
from exl2ray.quant.group import Comm, Solo
from exl2ray.team.packed_files import recorded
from exl2ray.tune.divergence import divergence_backward
from exl2ray.tune.module import TunedModule
from exl2ray.tune.recording import RecordedStep
from exl2ray.tune.sums import SHARES, Gradients, TreeOfSums, shares_of
from exl2ray.tune.updates import Updates

TRIED_TOKENS = 1024  # of a row, to see whether attention gives the same gradients twice
GRAPH_BYTES = 6  # kept for the way back by a token in a module, for each input and output of its linears
GRAPH_SHARE = 0.35  # of the free memory of a GPU that may be used so
GRAPH_BYTES_ON_CPU = 1 << 30
STEPS_AHEAD = 2  # that the host may be in front of a GPU: enough to keep it busy, and a stop does not wait for more


@dataclass(frozen=True)
class Rates:
    """Of Adam: latents in steps of the grid, gains relative to the size of what they scale; ``factor``: of the schedule."""

    latents: float
    gains: float
    factor: float = 1.0


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the rate at ``step`` (from 0): up along a line, then down to 0 along a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Trainer:
    """The model that is tuned, and its source. ``skip``: positions at the start of a row that do not count (BOS).
    ``record``: whether steps are replayed on GPUs (`exl2ray.tune.recording`); ``keep``: whether graphs may be kept for the
    way back; ``streamed``: whether modules come and go, and states wait on the host."""

    def __init__(
        self, modules: Sequence[TunedModule], source: Sequence[Block], device: torch.device, skip: int = 0,
        record: bool = True, comm: Comm | None = None, keep: bool = True, streamed: bool = False,
    ) -> None:  # fmt: skip
        self.modules, self.source, self.device, self.skip = modules, source, device, skip
        self.comm, self.streamed = comm or Solo(), streamed
        self._keep = keep and not streamed
        self.first = next((i for i, m in enumerate(self.modules) if m.trained), len(self.modules))
        self.fused = self._fused_attention_is_reproducible()
        self._fitting: dict[tuple[int, int], bool] = {}
        self._rates = torch.zeros(2, device=device)
        self._running: deque[torch.cuda.Event] = deque()
        wanted = record and device.type == "cuda" and not streamed and self.comm.size == 1 and not self._waits_for_the_gpu()
        self.recording = RecordedStep(self._step, wanted)

    def step(self, ids: Tensor, rates: Rates) -> Tensor:
        """ids (R, T), the same on all members -> what the rows of this one add to the mean divergence before the step,
        float64 on the device; the model is updated."""
        now = torch.tensor([rates.factor * rates.latents, rates.factor * rates.gains])
        self._rates.copy_(self._to_be_copied(now), non_blocking=True)
        result = self.recording(self._to_be_copied(ids).to(self.device, non_blocking=True))
        if self.device.type == "cuda":
            self._running.append(recorded())
            if len(self._running) > STEPS_AHEAD:
                self._running.popleft().synchronize()
        return result

    def _to_be_copied(self, t: Tensor) -> Tensor:
        """In memory that a GPU reads when the steps before are done, while the host goes on."""
        return t.pin_memory() if self.device.type == "cuda" else t

    def _step(self, ids: Tensor) -> Tensor:
        shares = [share for share in ids.tensor_split(min(SHARES, len(ids))) if len(share)]
        mine = {s: shares[s] for s in shares_of(self.comm.rank, self.comm.size, len(shares))}
        source = self._source_states(list(mine.values()))
        counted = ids.shape[0] * (ids.shape[1] - self.skip)
        kept, last = self._forward(list(mine.values()))
        return self._backward(kept, last, source, list(mine), len(shares), counted) / counted

    def _waits_for_the_gpu(self) -> bool:
        """Whether the host has to see numbers in the middle of a step, as to route tokens to experts."""
        return any(isinstance(b, MoeBlock) or b.spec.arch.noise_rows is not None for b in self.source)

    @torch.no_grad()
    def _source_states(self, xs: list[Tensor]) -> list[Tensor]:
        """(positions, hidden) before the head of the source, those that count, of each share."""
        for i in range(len(self.source) - 1):
            block = self.source[i]
            xs = [block.forward(x) for x in xs]
        return [x[:, self.skip :].flatten(0, 1) for x in xs]

    def _forward(self, shares: list[Tensor]) -> tuple[list[list[_Pass]], list[Tensor]]:
        """By module but the head, by share: what goes into it, and what comes out; the states before the head."""
        keep = bool(shares) and self._graphs_fit(sum(s.numel() for s in shares), shares[0].shape[1])
        kept: list[list[_Pass]] = []
        xs = shares
        for i in range(len(self.modules) - 1):
            module = self.modules[i]
            with self._attention(module):
                passes = [_forward(module, x, i >= self.first, i > self.first, keep) for x in xs]
            xs = [p.after.detach() for p in passes]
            kept.append([_Pass(p.before.cpu(), p.after[:0]) for p in passes] if self.streamed else passes)
        return kept, xs

    def _backward(
        self, kept: list[list[_Pass]], last: list[Tensor], source: list[Tensor], shares: Sequence[int], count: int,
        counted: int,
    ) -> Tensor:  # fmt: skip
        """``shares``: the numbers of those that are computed here, of ``count``."""
        head, total = self.modules[-1], torch.zeros((), dtype=torch.float64, device=self.device)
        updates = Updates(self.comm, self._rates, count, behind=not self.streamed)
        gradients, sums, source_head = [], TreeOfSums(), self.source[-1]
        for share, after, theirs in zip(shares, last, source, strict=True):
            states = after[:, self.skip :]
            kl, gradient, of_leaves = divergence_backward(
                head.block, head.leaves, source_head, states.flatten(0, 1), theirs, 1 / counted
            )
            whole = torch.zeros_like(after)
            whole[:, self.skip :] = gradient.view_as(states)
            gradients.append(whole)
            sums.add(share, of_leaves)
            total += kl
        updates.add(head, sums)
        for i in range(len(self.modules) - 2, self.first - 1, -1):
            module, passes, sums = self.modules[i], kept.pop(), TreeOfSums()
            with self._attention(module):
                for s, p in enumerate(passes):
                    gradients[s], of_leaves = _backward(module, p, gradients[s], i > self.first)
                    sums.add(shares[s], of_leaves)
            updates.add(module, sums)
        updates.finish()
        return total

    def _attention(self, module: TunedModule) -> AbstractContextManager[None]:
        return _reproducible(self.fused) if _attends(module) else nullcontext()

    def _fused_attention_is_reproducible(self) -> bool:
        """Whether the fused forms of attention give the same gradients twice on this device, and take this model."""
        module = next((m for m in self.modules if _attends(m)), None)
        if self.device.type != "cuda" or module is None:
            return False
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (2, TRIED_TOKENS, module.block.spec.hyper.hidden_size)
        x, g = (torch.randn(shape, generator=generator, device=self.device) for _ in range(2))
        try:
            with _reproducible(True):
                first, second = (_backward(module, _forward(module, x, True, True, True), g, True)[0] for _ in range(2))
        except RuntimeError:
            return False
        return bool(torch.equal(first, second))

    def _graphs_fit(self, tokens: int, length: int) -> bool:
        """Whether there is memory to keep the graphs of a step; asked once."""
        if (tokens, length) not in self._fitting:
            self._fitting[tokens, length] = self._room_for_graphs(tokens, length)
        return self._fitting[tokens, length]

    def _room_for_graphs(self, tokens: int, length: int) -> bool:
        if not self._keep:
            return False
        widths = sum(x.in_features + x.out_features for m in self.modules[:-1] for x in m.block.module.linears)
        needed = GRAPH_BYTES * widths * tokens
        if self.device.type != "cuda":
            hyper = self.modules[0].block.spec.hyper
            needed = 2 * needed + 8 * hyper.num_layers * hyper.heads * length * tokens
            return needed <= GRAPH_BYTES_ON_CPU
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return needed <= GRAPH_SHARE * free


def _attends(module: TunedModule) -> bool:
    return any(isinstance(half, AttentionHalf) for half in module.block.halves)


@dataclass(eq=False)
class _Pass:
    """States before a module and after it; if the graph is kept, ``before`` is a leaf and ``after`` hangs on it."""

    before: Tensor
    after: Tensor


def _forward(module: TunedModule, x: Tensor, trained: bool, inputs: bool, keep: bool) -> _Pass:
    if not (trained and keep):
        with torch.no_grad():
            return _Pass(x, module.block.forward(x))
    with torch.enable_grad():
        before = x.detach().requires_grad_(inputs)
        return _Pass(before, module.block.forward(before))


def _backward(module: TunedModule, p: _Pass, gradient: Tensor, inputs: bool) -> tuple[Tensor, Gradients]:
    """Gradients at the states before a module, if they are asked for (else as given), and at its leaves, float32; 0 for
    experts that saw no token."""
    if not p.after.requires_grad and (module.leaves or inputs):
        p = _forward(module, p.before.to(gradient.device), True, inputs, True)
    wanted = [p.before, *module.leaves] if inputs else module.leaves
    found = torch.autograd.grad(p.after, wanted, gradient.to(p.after.dtype), allow_unused=True)
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
    mine = filled.pop(0) if inputs else gradient
    return mine, [g.float() for g in filled]


@contextmanager
def _reproducible(fused: bool) -> Iterator[None]:
    """Attention whose backward pass adds up in a fixed order.

    The plain form does. On GPUs the fused ones have a backward pass that does, too, when torch is told to be deterministic.
    """
    if not fused:
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    settings: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filling
