"""What an option costs a linear in squared output error, as the solver leaves it behind, and how it is kept.

GPTQ's scaled errors e = R^T E (`exl2ray.cuda.solver`) give tr(E^T (H + damping I) E) as a plain sum of squares, row by row in
act-order; less damping * sum E^2 this is tr(E^T H E), the squared error of the linear's output over the calibration tokens.
Per linear (per role, for experts) measurement.json keeps, under the key of ours that the reference ignores:

    "linears": { "<role>": { "losses": { "<option>": squared output error per token, summed over outputs },
                             "shape": [mean loss of a row in up to 32 equal pieces of the act-order, relative to all] } }

The shape is nearly the same whatever the width, so the loss of an option that was not tried can be told from these numbers
(`exl2ray.allocation.frontier`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exl2ray.cuda.solver import CHUNK, Solution
from exl2ray.formats.layout import QParams
from exl2ray.quant.hessian import Factor

PIECES = 32
DIGITS = 6
USELESS = 1e30  # loss of an option that yields NaN


class LossTable:
    """Collects the losses of one module. Experts of one role are added up, each with its share of the tokens."""

    def __init__(self) -> None:
        self._losses: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._chunks: dict[str, Tensor] = {}

    def add(
        self,
        role: str,
        options: Sequence[QParams],
        solved: Mapping[int, Solution],  # index of the option -> solution
        factor: Factor,
        per_token: float,  # 1 / (tokens over which H is a mean), times the share of the tokens that come here
    ) -> None:
        for j, s in solved.items():
            _add(self._losses[role], options[j].desc, squared_error(s, factor) * per_token)
        j = shape_option(options)
        if j in solved:
            _add(self._chunks, role, _profile(solved[j], factor) * per_token)

    def include(self, other: LossTable) -> None:
        """Adds what another table has collected."""
        for role, losses in other._losses.items():
            for name, loss in losses.items():
                _add(self._losses[role], name, loss)
        for role, chunks in other._chunks.items():
            _add(self._chunks, role, chunks)

    def extra(self) -> dict[str, Any]:
        """What goes into the profile."""
        linears: dict[str, dict[str, Any]] = {}
        for role, losses in self._losses.items():
            values = torch.stack(list(losses.values())).tolist() if losses else []
            linears[role] = {"losses": {d: _rounded(v) for d, v in sorted(zip(losses, values, strict=True))}}
            if role in self._chunks:
                linears[role]["shape"] = _pieces(self._chunks[role])
        return {"linears": linears}


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def squared_error(s: Solution, factor: Factor) -> Tensor:
    """tr(E^T H E), float64 scalar; without feedback from the mean of diag H alone."""
    energy = s.energies.double().sum()
    if factor.r is None:
        return torch.nan_to_num(energy * factor.mean_diagonal, USELESS, USELESS)
    return torch.nan_to_num((s.losses.double().sum() - factor.damping * energy).clamp(min=0.0), USELESS, USELESS)


def _profile(s: Solution, factor: Factor) -> Tensor:
    """(K / 32,) float64: what each 32 rows of the act-order contribute. With all of the damping taken off, losses of mixtures
    come out too high, with none too low; half is best on trained linears (docs/log.md)."""
    if factor.r is None:
        return s.energies.double()
    return (s.losses.double() - factor.damping / 2 * s.energies.double()).clamp(min=0.0)


def shape_option(options: Sequence[QParams]) -> int:
    """Index of the option whose rows tell the shape: of one width, as near to 4 bits as there is; -1 without any."""
    uniform = [j for j, o in enumerate(options) if len(o.bits) == 1]
    return min(uniform, key=lambda j: (abs(options[j].bits[0] - 4), j), default=-1)


def _pieces(chunks: Tensor) -> list[float]:
    """(K / 32,) sums -> means of equal pieces (the last one may be shorter), relative to the mean of all."""
    size = -(-len(chunks) // PIECES)
    total = float(chunks.sum())
    if not total > 0:
        return [1.0] * -(-len(chunks) // size)
    return [_rounded(float(p.mean()) * len(chunks) / total) for p in torch.split(chunks.cpu(), size)]


def piece_rows(in_features: int) -> int:
    """Rows of each piece of a shape but the last."""
    return -(-(in_features // CHUNK) // PIECES) * CHUNK


def _rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")
