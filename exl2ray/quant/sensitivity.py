"""How much an error in one linear's output changes what the whole model says.

To second order the KL divergence between the source's next-token distributions and those of a model in which one linear
makes an error e_t at token t is 1/2 E[(sum_t g_t . e_t)^2], where g_t is the gradient of the log-likelihood with respect to
the linear's output, and the expectation runs over next tokens drawn from the model itself: 1/2 e' F e with the Fisher
information F. Errors of rounding are about independent from token to token and from output to output, and those of an output
have the scale of its column of the weight. So one number per linear is enough, the sensitivity

    a = KL / squared error = 1/2 mean_t sum_n c_n g_tn^2 / N,    c_n: mean square of column n over that of the matrix,

the mean over tokens with weights that say where errors are small: where next to nothing goes into a linear. A norm behind it
has gradients that are the larger the smaller what it divides by, and such tokens alone made sensitivities up to 185 times
too large (down_proj of Gemma 3 at BOS, docs/log.md). All of them follow from one backward pass, module by module, whose
cost grows linearly with the depth.

The gradient at the logits is not that of a sampled token but (diag(sqrt p) - p sqrt(p)') z with random signs z. Its second
moment is the Fisher information of a categorical distribution too, diag(p) - p p', and its fourth moment is smaller: fewer
tokens are needed.

The linears of one role in a module (the experts of a mixture) count together.

What was tried instead: perturbing every linear once, forward only, takes time that grows with the square of the depth (12
minutes of two cores for SmolLM2-135M) and is no better: at equal bytes the backward pass has 0.96 and 0.92 times its KL (3
and 4 bits). Weighting each output by its column of the weight counts for 0.96 of it at 3 bits; weighting tokens by their
input, by their leverage, or squaring the gradient of the weight is worse: 0.98 to 1.07 (docs/log.md). On GPUs the linears
are bfloat16 here, since gradients leave the range of float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from exl2ray.quant.block import Block, device_of

POSITIONS = 256  # whose logits exist at once
SMALL = 0.1  # of the median of the mean squares of a linear's inputs: errors are as small, in proportion, where one has less

Sums = dict[str, list[float]]  # role -> [sum over tokens of 1/2 sum_n c_n g_n^2, the squared error sum_n c_n behind it]


def column_weights(block: Block) -> dict[str, Tensor]:
    """Linear key -> c (N,) float32, mean 1: mean square of each column of its weight (K, N), relative to the whole matrix."""
    out = {}
    for key, weight in block.weights.items():
        squares = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).square()
        mean = squares.mean()
        out[key] = torch.where(mean > 0, squares / mean, torch.ones_like(squares))
    return out


def token_weights(x: Tensor) -> Tensor:
    """(tokens,) float32, at most 1: the squared error to expect at each token of inputs x (..., K), relative to the usual."""
    squares = torch.linalg.vector_norm(x.reshape(-1, x.shape[-1]), dim=1, dtype=torch.float32).square()
    usual = SMALL * squares.sort().values[len(squares) // 2]
    return torch.where(usual > 0, (squares / usual).clamp(max=1), torch.ones_like(squares))


def module_backward(
    block: Block,
    x: Tensor,  # (R, T, hidden) float32: states before the module
    gradient: Tensor,  # (R, T, hidden) float32: of the log-likelihood with respect to the states after it
    columns: Mapping[str, Tensor],
    device: torch.device | None = None,  # of the block; None: that of its linears or, if it has none, of x
) -> tuple[Tensor, Sums]:
    """The gradient with respect to the states before a module, float32, where x is, and what it says about the module's
    linears.

    The same bytes in every run only inside `exl2ray.model.half.attention_by_products`.
    """
    if device is None:
        device = device_of(block) if block.weights else x.device
    return _backward(block, x, lambda y: gradient.to(y.device, y.dtype), columns, device)


def head_backward(
    head: Block,
    states: Tensor,  # (R, T, hidden) float32: what the final norm gives
    generator: torch.Generator,  # of the random signs, on the head's device
    columns: Mapping[str, Tensor],
) -> tuple[Tensor, Sums]:
    """As `module_backward` for the output head, where the gradient begins. A few positions at a time: logits are large."""
    gradients, total = torch.empty_like(states), Sums()
    for rows, positions in _slices(states):
        some = states[rows, positions]
        part, sums = _backward(head, some, lambda y: fisher_root(y.detach(), generator), columns, device_of(head))
        gradients[rows, positions] = part
        add(total, sums)
    return gradients, total


def fisher_root(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random vectors (..., V) whose second moment is diag(p) - p p' of p = softmax(logits (..., V))."""
    p = torch.softmax(logits.float(), dim=-1)
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
    root = p.sqrt().mul_(signs.mul_(2).sub_(1))
    return root - p * root.sum(-1, keepdim=True)


def add(total: Sums, more: Mapping[str, list[float]]) -> None:
    """Adds sums of other tokens, in place."""
    for role, values in more.items():
        known = total.setdefault(role, [0.0, 0.0])
        for i, v in enumerate(values):
            known[i] += v


def _backward(
    block: Block, x: Tensor, gradient: Callable[[Tensor], Tensor], columns: Mapping[str, Tensor], device: torch.device
) -> tuple[Tensor, Sums]:
    seen: list[tuple[str, Tensor, Tensor]] = []
    block.bank.watch = lambda *linear: seen.append(linear)
    try:
        with torch.enable_grad():
            inputs = x.detach().to(device).requires_grad_()
            y = block.forward(inputs)
            mine, *others = torch.autograd.grad(y, [inputs, *(out for *_, out in seen)], gradient(y))
    finally:
        block.bank.watch = None
    found: list[Tensor] = []
    for (key, entering, out), g in zip(seen, others, strict=True):
        expected = token_weights(entering.detach())
        halves = 0.5 * (g.reshape(-1, g.shape[-1]).float().square() @ columns[key]) * expected
        found += [halves.double().sum(), expected.double().sum() * out.shape[-1]]
    roles = {linear.key: linear.role for linear in block.module.linears}
    numbers = torch.stack(found).tolist() if found else []  # one wait for the GPU
    sums = Sums()
    for (key, *_), kl, error in zip(seen, numbers[::2], numbers[1::2], strict=True):
        add(sums, {roles[key]: [kl, error]})
    return mine.detach().to(x.device), sums


def _slices(states: Tensor) -> Iterator[tuple[slice, slice]]:
    """One row and up to `POSITIONS` positions at a time."""
    for r in range(states.shape[0]):
        for start in range(0, states.shape[1], POSITIONS):
            yield slice(r, r + 1), slice(start, start + POSITIONS)
