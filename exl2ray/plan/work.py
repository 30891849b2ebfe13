"""How much computing a module takes, counted from its shapes, and what that makes at the rates of large operations.

The counts are those of the code as it is: distinct options of the tables, projections of equal options computed once, one
Cholesky factor per input. The seconds are a floor that no run reaches; `exl2ray.plan.times` scales them by measured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from exl2ray.allocation.planning import option_tables
from exl2ray.formats.layout import pad32
from exl2ray.model.hyper import Hyper
from exl2ray.model.spec import ModuleSpec

GRID_EVALUATIONS = 97  # of the scale search, per weight and option


@dataclass(frozen=True)
class Work:
    """Counts of one pass over one module (or several, added up)."""

    products: float = 0.0  # FLOP of matrix products of forward passes
    attention: float = 0.0  # FLOP of attention between queries and keys, the visible half only
    hessians: float = 0.0  # FLOP
    factors: float = 0.0  # FLOP of Cholesky factorisations
    updates: float = 0.0  # FLOP of error feedback between panels of rows
    search: float = 0.0  # evaluations of candidate scales
    steps: float = 0.0  # rows that one linear after another is rounded by, each waiting for the one before
    weight_bytes: float = 0.0  # of source weights to be read

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def flops(self) -> float:
        """All floating-point operations, scale search left out."""
        return self.products + self.attention + self.hessians + self.factors + self.updates


# Rates per second on one H200: fp16 products, causal attention, fp16 products with float32 sums, Cholesky of large matrices,
# TF32 products as wide as those of the error feedback, scale evaluations; steps: where one option is solved, which leaves a
# GPU mostly waiting, fitted to the layers of docs/log.md. With many options at once the steps hide behind the rest.
RATES = Work(products=700e12, attention=540e12, hessians=767e12, factors=30e12, updates=175e12, search=1.6e12, steps=75e3)


def seconds(work: Work) -> float:
    """At `RATES`, one thing after another; reading weights is not in it."""
    counted = [f.name for f in fields(work) if f.name != "weight_bytes"]
    return float(sum(getattr(work, name) / getattr(RATES, name) for name in counted))


@dataclass(frozen=True)
class Linear:
    """What counting needs to know of a linear. share: of the tokens that reach it (experts)."""

    role: str
    group: str
    in_features: int
    out_features: int
    share: float = 1.0


@dataclass(frozen=True)
class Shape:
    """What counting needs to know of a module. attention_width: heads times head size; 0 without attention."""

    linears: tuple[Linear, ...]
    attention_width: int = 0


def shape_of(module: ModuleSpec, hyper: Hyper) -> Shape:
    share = hyper.experts_per_token / hyper.num_experts if module.kind == "moe" else 1.0
    linears = tuple(Linear(x.role, x.input_group, x.in_features, pad32(x.out_features), share) for x in module.linears)
    return Shape(linears, hyper.heads * hyper.head_dim if any(x.role == "q_proj" for x in linears) else 0)


def measuring(shape: Shape, rows: int, tokens: int) -> Work:
    """A reference forward with Hessians, every distinct option of every linear solved, every row of the tables scored."""
    count = rows * tokens
    total = _forward(shape, rows, tokens) + _hessians(shape, count) + _weights(shape)
    for roles, table in option_tables({x.role for x in shape.linears}):
        columns = dict(zip(roles, zip(*table, strict=True), strict=True))
        options = {role: len(set(column)) for role, column in columns.items()}
        first, second = roles[:-1], roles[-1]
        mixed = {tuple(row[:-1]) for row in table}
        for x in shape.linears:
            if x.role in first:
                total += Work(products=options[x.role] * _product(x, count))
            elif x.role == second:
                total += Work(products=len(set(table)) * _product(x, count))
        if "q_proj" in roles:
            total += Work(attention=len(mixed) * _attention(shape, rows, tokens))
        total += _solving(shape, roles, options)
    return total


def quantizing(shape: Shape, rows: int, tokens: int, reported: int) -> Work:
    """Two forwards of all rows (source weights with Hessians, quantised weights), one of the reported rows, one solve."""
    forwards = _forward(shape, 2 * rows + reported, tokens)
    roles = tuple(dict.fromkeys(x.role for x in shape.linears))
    once = _solving(shape, roles, dict.fromkeys(roles, 1)) + _steps(shape)
    return forwards + _hessians(shape, rows * tokens) + _weights(shape) + once


def finishing(head: Shape, rows: int, tokens: int, reported: int) -> Work:
    """The head: Hessian of all rows, one solve, logits of the reported rows of both models."""
    roles = ("lm_head",)
    work = _hessians(head, rows * tokens) + _weights(head) + _solving(head, roles, {"lm_head": 1}) + _steps(head)
    return work + _forward(head, 2 * reported, tokens)


def forward(shape: Shape, rows: int, tokens: int) -> Work:
    """One forward of a finished module: rows that only pass through, and the perplexity of --propagate reference."""
    return _forward(shape, rows, tokens) + _weights(shape)


def _forward(shape: Shape, rows: int, tokens: int) -> Work:
    products = sum(_product(x, rows * tokens) for x in shape.linears)
    return Work(products=products, attention=_attention(shape, rows, tokens))


def _product(x: Linear, tokens: int) -> float:
    return 2.0 * tokens * x.share * x.in_features * x.out_features


def _attention(shape: Shape, rows: int, tokens: int) -> float:
    return 2.0 * rows * tokens**2 * shape.attention_width


def _hessians(shape: Shape, tokens: int) -> Work:
    inputs = {x.group: x for x in shape.linears}
    return Work(hessians=sum(2.0 * tokens * x.share * x.in_features**2 for x in inputs.values()))


def _weights(shape: Shape) -> Work:
    return Work(weight_bytes=2.0 * sum(x.in_features * x.out_features for x in shape.linears))


def _solving(shape: Shape, roles: Sequence[str], options: dict[str, int]) -> Work:
    members = [x for x in shape.linears if x.role in roles]
    weights = sum(float(options[x.role]) * x.in_features * x.out_features for x in members)
    return Work(
        factors=sum(k**3 / 3.0 for k in {x.group: x.in_features for x in members}.values()),
        updates=sum(float(options[x.role]) * x.in_features**2 * x.out_features for x in members),
        search=GRID_EVALUATIONS * weights,
    )


def _steps(shape: Shape) -> Work:
    return Work(steps=float(sum({x.group: x.in_features for x in shape.linears}.values())))
