"""Hessians of the layer-wise least-squares problem, and their factorisation.

For inputs X (tokens x K) the error of a quantised weight W' is tr((W-W')^T H (W-W')) with H = X^T X / rows. GPTQ
(Frantar et al. 2022, eq. 3) feeds the rounding error of each row forward through U, the upper Cholesky factor of
H^-1 = U^T U. The reference gets U by Cholesky, inverse, Cholesky. Reversing the order of rows and columns gives the
same in one step: H = R R^T with R upper triangular, hence U = R^-1 (both have a positive diagonal, and the factors
are unique). R is what this module hands out; no inverse of H is ever formed.

Differences from ExLlamaV2: the sort of the act-order is stable, failures of the factorisation are retried in float64 before
damping grows, and CUDA errors are not mistaken for them.

The reference's own route is kept as the oracle (`prepare_reference`): they agree to 3e-6 on the golden Hessians. Above
`FLOAT64_ROWS` inputs the factor is computed in float64, block by block (`exl2ray.quant.cholesky`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.cuda.small_batches import device_bytes, with_room
from exl2ray.errors import NumericError
from exl2ray.quality import DAMPING, Settings
from exl2ray.quant import cholesky
from exl2ray.quant.block import Block, Module, device_of, has_experts

_DAMPING_FLOOR = 1e-5  # for an input that is always zero
ATTEMPTS = 10  # to factorise, each with more damping
_BLOCK_ROWS = 2048  # that are put into order at a time
_FACTOR_SHARE = 0.3  # of a GPU's memory, for a whole matrix of float64
ALL_EXPERTS = "w13"  # among the inputs of experts: the sum over those of w1 and w3
TRIANGLE_ROWS = 2048  # of X^T X that a GPU computes at a time, from the diagonal to the right; fewer do not fill it
FLOAT64_ROWS = 8192  # above this K, float32 loses too much of the small pivots (speed-study, precision)


class HessianAccumulator:
    """Sum of X^T X over calibration rows for one distinct input; K x K float32 on ``device``.

    Also of X^T Y, K x ``columns``, for products with something else.

    X^T X is symmetric. On a GPU a wide one is summed in panels of TRIANGLE_ROWS rows, each from the diagonal to the right;
    what is left of them is filled in when the sum is read. That is 0.75 of all products with 4096 inputs, 0.59 with 11008.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", columns: int | None = None) -> None:
        self._shape, self._device = (in_features, columns or in_features), device
        self._h: Tensor | None = None
        self._one_sided = False  # what is left of the panels' diagonals is not filled in
        self.rows = 0
        self.tokens = 0
        self.routed = 0  # of these, tokens that the router sent here; all of them but with --moe-all-experts

    @property
    def h(self) -> Tensor:
        """The sum so far."""
        if self._h is None:
            self._h = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        if self._one_sided:
            for panel in _panels(len(self._h)):
                self._h[panel.stop :, panel] = self._h[panel, panel.stop :].T
            self._one_sided = False
        return self._h

    @h.setter
    def h(self, value: Tensor) -> None:
        self._h, self._one_sided = value, False

    def add(self, x: Tensor, rows: int = 1, routed: int | None = None, y: Tensor | None = None) -> None:
        """Adds inputs ``x`` (..., K), any float dtype, that stem from ``rows`` calibration rows.

        routed: tokens that the input would hold if every expert saw only its own; None: all of ``x``. y: (..., columns) in
        x's dtype, where X^T Y is summed.
        Half inputs on a GPU go through the tensor cores with a float32 result: products of halves are exact there, so
        only the order of summation differs from a float32 product. Float32 inputs are multiplied in float32.
        """
        x = x.reshape(-1, x.shape[-1])
        self.rows += rows
        self.tokens += x.shape[0]
        self.routed += x.shape[0] if routed is None else routed
        if x.shape[0] == 0:
            return
        if not _on_tensor_cores(x):
            self.h.addmm_(x.float().T, (x if y is None else y.reshape(-1, y.shape[-1])).float())
        elif y is None and x.shape[1] > TRIANGLE_ROWS:
            self._add_one_side(x)
        else:
            product = _product(x, x if y is None else y.reshape(-1, y.shape[-1]))
            self.h = product if self._h is None else self.h.add_(product)

    def _add_one_side(self, x: Tensor) -> None:
        """X^T X of half inputs x (tokens, K) on a GPU."""
        first = self._h is None
        total = torch.empty(self._shape, dtype=torch.float32, device=x.device) if self._h is None else self._h
        for panel in _panels(x.shape[1]):
            place, product = total[panel, panel.start :], _product(x[:, panel], x[:, panel.start :])
            place.copy_(product) if first else place.add_(product)
        self._h, self._one_sided = total, True

    def include(self, other: HessianAccumulator) -> None:
        """Adds another sum of this shape, on the same device, which is used up."""
        if self._h is not None and other._h is not None and self._one_sided and other._one_sided:
            for panel in _panels(len(self._h)):
                self._h[panel, panel.start :] += other._h[panel, panel.start :]
        else:
            self.h += other.h
        self.rows += other.rows
        self.tokens += other.tokens
        self.routed += other.routed

    def finish(self) -> Tensor:
        """H (K, K) float32, divided by the number of rows; the identity if no token was seen."""
        if self.tokens == 0:
            return torch.eye(self.h.shape[0], dtype=torch.float32, device=self.h.device)
        return self.h / self.rows


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """X^T Y of halves on a GPU, float32."""
    return torch.mm(x.T, y, out_dtype=torch.float32)


def _panels(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + TRIANGLE_ROWS, rows)) for start in range(0, rows, TRIANGLE_ROWS))


@dataclass(frozen=True)
class Factor:
    """A factorised Hessian. ``r`` is None where no feedback is wanted (round to nearest)."""

    perm: Tensor  # (K,) int64, perm[k] = input feature in act-order row k
    r: Tensor | None  # (K, K) float32, upper; H[perm][:, perm] + damping I = R R^T
    damping: float  # what was added to the diagonal
    attempts: int  # factorisations tried; 1 is the normal case
    mean_diagonal: float = 0.0  # of H, before damping

    @property
    def note(self) -> str:
        """Text for the report if the factorisation needed help, else empty."""
        if self.r is None:
            return "round to nearest (no error feedback)"
        return f"damping raised to {self.damping:.3g} after {self.attempts} attempts" if self.attempts > 1 else ""


@dataclass(frozen=True)
class FactorPlan:
    """What the diagonal of H tells of its factorisation: the order of rows, the mean, the first damping."""

    perm: Tensor  # (K,) int64
    mean: float
    step: float

    def dampings(self) -> Iterator[float]:
        """One after another, until there is a factor."""
        return (self.step * times for times in range(1, ATTEMPTS + 1))

    def failure(self, where: str) -> NumericError:
        """The error if none of the `dampings` gives a factor."""
        k = len(self.perm)
        return NumericError(
            f"Hessian of {where or 'a linear layer'} ({k} x {k}) has no Cholesky factor "
            f"even with damping {self.step * ATTEMPTS:.3g}",
            "check the calibration data; a higher damping or round-to-nearest for this layer may be needed",
        )


def plan_factor(diagonal: Tensor, rows: int, damping: float, where: str, natural: bool) -> FactorPlan:
    """diagonal (K,) float32: of the sum over ``rows`` calibration rows. Raises NumericError if it is not finite."""
    mean_of_rows = diagonal / rows
    finite, mean = torch.stack([torch.isfinite(mean_of_rows).all().double(), mean_of_rows.double().mean()]).tolist()
    if not finite:
        raise NumericError(
            f"Hessian of {where or 'a linear layer'} is not finite",
            "the calibration states hold NaN or infinity; look at the module before this one",
        )
    return FactorPlan(act_order(diagonal, natural), mean, max(damping * mean, _DAMPING_FLOOR))


def act_order(diagonal: Tensor, natural: bool = False) -> Tensor:
    """(K,) int64: features by falling diagonal of H, ties in natural order; ``natural``: all as they are."""
    if natural:
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def prepare(h: Tensor, damping: float = DAMPING, where: str = "", rows: int = 1, natural: bool = False) -> Factor:
    """Act-order and factor of H (K, K) float32, or of h / rows for a sum over calibration rows (spares a K x K copy).

    Damping ``max(damping * mean(diag H), 1e-5)`` is added to the diagonal; on failure the same factorisation is tried in
    float64, then with 2, 3, ... times the damping. ``natural`` keeps the natural order instead of the act-order. Raises
    NumericError if H is not finite or every attempt fails.
    """
    plan = plan_factor(h.diagonal(), rows, damping, where, natural)
    attempts = 0
    for added in plan.dampings():
        for dtype in _precisions(h):
            attempts += 1
            r = with_room(lambda d=added, t=dtype: _upper_factor(h, rows, plan.perm, d, t))  # type: ignore[misc]
            if r is not None:
                return Factor(plan.perm, r, added, attempts, plan.mean)
    raise plan.failure(where)


def _precisions(h: Tensor) -> tuple[torch.dtype, ...]:
    """Precisions to factorise in, in order: float64 at once for large K, unless a GPU lacks the memory for it.

    That takes half a matrix of float64 beside H and R, and something for blocks on their way (`exl2ray.quant.cholesky`).
    """
    k = h.shape[0]
    if h.is_cuda and k > FLOAT64_ROWS and k * k * 8 > _FACTOR_SHARE * device_bytes(h.device):
        return (torch.float32,)
    return (torch.float64,) if k > FLOAT64_ROWS else (torch.float32, torch.float64)


def _upper_factor(h: Tensor, rows: int, perm: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """R (K, K) float32 with H[perm][:, perm] + damping I = R R^T, H = h / rows, computed in ``dtype``; None if there is none.

    Both axes reversed: a lower factor of the flipped matrix is an upper factor of the matrix itself. Blocks of rows keep
    the peak at two matrices of ``dtype`` beside H (the factorisation makes a copy of its own on GPUs).
    """
    k = h.shape[0]
    if dtype == torch.float64 and k > FLOAT64_ROWS:
        return cholesky.upper_factor(h, rows, perm, damping)
    order = perm.flip(0)
    a = torch.empty(k, k, dtype=dtype, device=h.device)
    for start in range(0, k, _BLOCK_ROWS):
        block = order[start : start + _BLOCK_ROWS]
        a[start : start + len(block)] = h[block][:, order].div_(rows)
    a.diagonal().add_(damping)
    info = torch.empty(0, dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(a, out=(a, info))
    if not bool((info == 0) & torch.isfinite(a.diagonal()).all()):  # one wait for the GPU
        return None
    r = torch.empty(k, k, dtype=torch.float32, device=h.device)
    for start in range(0, k, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, k)
        r[start:stop] = a[k - stop : k - start].flip(0, 1)
    return r


def prepare_reference(h: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The reference's own route, kept as the oracle of `prepare`: (perm, U) with H^-1 = U^T U, U upper, float32."""
    perm = act_order(h.diagonal())
    a = h[perm][:, perm].clone()
    a.diagonal().add_(max(damping * float(h.diagonal().mean()), _DAMPING_FLOOR))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(a))
    return perm, torch.linalg.cholesky(inverse, upper=True)


def round_to_nearest(diagonal: Tensor, natural: bool = False, rows: int = 1) -> Factor:
    """Act-order of H (or the natural order) without feedback: the fallback for a layer whose Hessian cannot be factorised.

    diagonal (K,): of H, or of a sum over ``rows``.
    """
    return Factor(act_order(diagonal, natural), None, 0.0, 0, float(diagonal.double().mean()) / rows)


def factorise(
    accumulator: HessianAccumulator, settings: Settings, where: str, notes: list[str], natural: bool = False
) -> Factor:
    """Factor of a Hessian; falls back to round-to-nearest, with a note, where no damping helps. ``natural``: no act-order."""
    h, rows = (accumulator.h, accumulator.rows) if accumulator.tokens else (accumulator.finish(), 1)
    try:
        factor = prepare(h, settings.damping, where, rows, natural)
    except NumericError as e:
        if not bool(torch.isfinite(h).all()):
            raise
        notes.append(f"{e.message}: rounded to nearest without error feedback")
        return round_to_nearest(h.diagonal(), natural, rows)
    if factor.note:
        notes.append(f"{where}: {factor.note}")
    return factor


def input_factor(
    block: Block, hessians: dict[str, HessianAccumulator], group: str, settings: Settings, notes: list[str]
) -> Factor:
    """Factor for the linears on an input of a block. Its Hessian is used up, unless other experts may borrow it."""
    own = hessians[group]
    own.h = own.h.to(device_of(block))
    if has_experts(block):
        factor = expert_factor(block, hessians, group, settings, notes)
        if not group.startswith("w13."):
            del hessians[group]
        return factor
    del hessians[group]
    return factorise(own, settings, input_name(block.module, group), notes, keeps_order(block.module, group))


def prepare_borrowing(block: Block, hessians: dict[str, HessianAccumulator]) -> None:
    """To be called once before `input_factor` for the experts of a block, which may then run on several streams: brings what
    they borrow from to the device, and adds it up where one of them will."""
    inputs = [own for name, own in hessians.items() if name.startswith("w13.")]
    for own in inputs:
        own.h = own.h.to(device_of(block))
    if any(own.tokens < own.h.shape[0] for own in inputs):
        hessians[ALL_EXPERTS] = _of_all_experts(hessians)


def _of_all_experts(hessians: Mapping[str, HessianAccumulator]) -> HessianAccumulator:
    """The sum over the experts on w1 and w3. Added up for each one that borrows, it took time in proportion to the square of
    their number."""
    if ALL_EXPERTS in hessians:
        return hessians[ALL_EXPERTS]
    others = [own for name, own in hessians.items() if name.startswith("w13.")]
    total = HessianAccumulator(others[0].h.shape[0], others[0].h.device)
    for own in others:
        total.h += own.h
    total.tokens = sum(own.tokens for own in others)
    return total


def expert_factor(
    block: Block, hessians: dict[str, HessianAccumulator], group: str, settings: Settings, notes: list[str]
) -> Factor:
    """Factor of one expert's Hessian. For w1/w3 an expert with fewer tokens than dimensions adds the Hessian of all experts.

    The sum over experts of the routed tokens' Hessians is that of all tokens, each counted once per choice. It is mixed in
    with the weight that makes up the missing tokens, so a starved expert degrades smoothly towards the all-token Hessian.
    """
    where = input_name(block.module, group)
    own = hessians[group]
    dimensions = own.h.shape[0]
    if group.startswith("w13.") and own.tokens < dimensions:
        everybody = _of_all_experts(hessians)
        if everybody.tokens:
            mixed = HessianAccumulator(dimensions, own.h.device)
            mixed.h = everybody.h.mul((dimensions - own.tokens) / everybody.tokens).add_(own.h)
            mixed.rows, mixed.tokens = max(own.rows, 1), dimensions
            notes.append(f"{group}: {own.tokens} tokens for {dimensions} dimensions, completed from all experts")
            return factorise(mixed, settings, where, notes)
    if own.tokens == 0:
        notes.append(f"{group}: no calibration token reached this expert, rounded without feedback")
    return factorise(own, settings, where, notes)


def keeps_order(module: Module, group: str) -> bool:
    """Whether the linear on this input must stay in natural order: down_proj of an MLP with biases.

    Loaders put the columns of up and gate into the order of down's rows, but leave their biases as they are.
    """
    return group == "down" and any(x.has_bias for x in module.linears if x.role in ("gate_proj", "up_proj"))


def input_name(module: Module, group: str) -> str:
    """An input of a module, for messages."""
    return module.linears[0].key if module.kind == "head" else f"{module.profile_key} ({group})"
