"""What attention and MLP have in common: norm, first linears, a core without weights, second linear, residual.

``Half`` exposes the stages one by one, so that quantisation options can be scored without recomputing what they share:
``post(x, linear(second, mid({role: linear(first, pre(x))})))`` is the whole of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.model.norms import Norm
from exl2ray.model.spec import LinearSpec

Capture = Callable[[str, Tensor], None]  # (input group, inputs (tokens, K) in compute dtype)


class LinearBank:
    """Weights of the linears of one module, replaceable one by one.

    weights[key]: (K, N) in compute dtype. biases[key]: (N,) in compute dtype. watch: sees the output of every linear, for
    gradients.
    """

    def __init__(self, linears: tuple[LinearSpec, ...], dtype: torch.dtype) -> None:
        self.specs = {x.key: x for x in linears}
        self.dtype = dtype
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.watch: Callable[[str, Tensor], None] | None = None  # called with key and output (..., N) of every linear

    def set_weight(self, key: str, weight: Tensor) -> None:
        """Replace a weight by (K, N), or by (K, N32) whose padding columns are cut off."""
        device = self.weights[key].device if key in self.weights else weight.device
        self.weights[key] = self.fitted(self.specs[key], weight).to(device, self.dtype)

    def fitted(self, linear: LinearSpec, weight: Tensor) -> Tensor:
        """``weight`` without padding columns; NumericError if it does not fit the linear."""
        k, n = linear.in_features, linear.out_features
        if weight.dim() != 2 or weight.shape[0] != k or weight.shape[1] not in (n, linear.padded_out):
            raise NumericError(f"weight of {linear.key} has shape {tuple(weight.shape)}, expected ({k}, {n})")
        return weight[:, :n]

    def linear(self, linear: LinearSpec | str, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """inputs (..., K) @ weight (K, N) + bias -> (..., N). ``weight`` stands in for the stored one."""
        spec = self.specs[linear] if isinstance(linear, str) else linear
        w = self.weights[spec.key]
        if weight is not None:  # candidates may wait in pinned host memory
            w = self.fitted(spec, weight).to(inputs.device, self.dtype, non_blocking=True)
        bias = self.biases.get(spec.key)
        if bias is None:
            out = torch.matmul(inputs, w)
        else:
            out = torch.addmm(bias, inputs.reshape(-1, spec.in_features), w)
            out = out.reshape(*inputs.shape[:-1], spec.out_features)
        if self.watch is not None:
            self.watch(spec.key, out)
        return out


class Half(ABC):
    """Attention or MLP. ``first``: linears that share the normed input; ``second``: the linear back to hidden size.

    In a parallel block ``post`` returns the branch alone; the block adds the residual.
    """

    def __init__(
        self,
        bank: LinearBank,
        first: tuple[LinearSpec, ...],
        second: LinearSpec,
        norm: Norm,
        post_norm: Norm | None,
        residual_scale: float,
        add_residual: bool,
    ) -> None:
        self.bank = bank
        self.first = first
        self.second = second
        self.norm = norm
        self.post_norm = post_norm
        self.residual_scale = residual_scale
        self.add_residual = add_residual

    def pre(self, x: Tensor) -> Tensor:
        """Input norm: x (R, T, hidden) state dtype -> (R, T, hidden) compute dtype."""
        return self.norm(x, self.bank.dtype)

    def linear(self, linear: LinearSpec | str, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """inputs (..., K) -> (..., N), bias included; ``weight`` (K, N) or (K, N32) stands in for the stored one."""
        return self.bank.linear(linear, inputs, weight)

    def prepare(self, role: str, out: Tensor) -> Tensor:
        """What can be done to the output (R, T, N) of one first linear before it meets the others (norm, RoPE)."""
        return out

    @abstractmethod
    def mix(self, outs: Mapping[str, Tensor]) -> Tensor:
        """Prepared outputs of the first linears by role -> input of the second linear (R, T, K)."""

    def mid(self, outs: Mapping[str, Tensor]) -> Tensor:
        """Outputs of the first linears by role, (R, T, N) each -> input of the second linear (R, T, K)."""
        return self.mix({role: self.prepare(role, out) for role, out in outs.items()})

    def post(self, x: Tensor, out: Tensor) -> Tensor:
        """out (R, T, hidden) of the second linear -> states after the residual addition (5.15), in x's dtype."""
        if self.residual_scale != 1.0:
            out = out * self.residual_scale
        if self.post_norm is not None:
            out = self.post_norm(out, x.dtype)
        return x + out.to(x.dtype) if self.add_residual else out

    @property
    def plain_residual(self) -> bool:
        """Whether ``post`` is nothing but x + out."""
        return self.residual_scale == 1.0 and self.post_norm is None and self.add_residual

    def branch(self, n: Tensor, capture: Capture | None = None) -> Tensor:
        """Normed input n (R, T, hidden) -> output of the second linear (R, T, hidden).

        capture is called with the inputs of each group of linears, flattened to (tokens, K).
        """
        if capture is not None:
            capture(self.first[0].input_group, n.flatten(0, -2))
        m = self.mid({x.role: self.linear(x, n) for x in self.first})
        if capture is not None:
            capture(self.second.input_group, m.flatten(0, -2))
        return self.linear(self.second, m)
