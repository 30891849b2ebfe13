"""A model whose residual stream is rotated: the same function, other weights, no other architecture.

States are rows s; the rotated model has s R in their place, R orthogonal. RMSNorm without weights commutes with R, so the
weight w of each norm moves into what reads the norm's output, and the norm keeps ones. With weights (K, N) that multiply rows
from the right, as everywhere here:

| tensor | becomes |
|---|---|
| embedding, positions (rows of states) | E R |
| linears that read the stream, head, router | R^T diag(w) W |
| o_proj, down_proj, w2 of experts, their biases | W R, b R |
| norms | ones (Gemma, which stores w - 1: zeros) |

Scalar multipliers of embedding, residual and logits commute with R. q/k norms, RoPE and biases of q, k, v, gate and up lie
inside a block, where nothing is rotated. A tied head reads the embedding with another factor, so it becomes a tensor of its
own.

Everything that reads a source tensor does so through `exl2ray.model.weights`, so that is where a rotated model comes into
being: measuring, quantising, workers and the writer see it, and nothing large is written first. A factored matrix (signs,
Walsh-Hadamard, a small random orthogonal one for the odd factor of the hidden size) is never formed: a dense one costs a
matrix product per weight and pass. Where the weight is used it is rounded once, to the dtype of the products, not to the
source's first. What has no rotated form, and why: `obstacle`.
"""

from __future__ import annotations

from dataclasses import replace

from exl2ray.errors import UsageError
from exl2ray.formats.roles import WRITERS
from exl2ray.model.rotation import Rotation
from exl2ray.model.spec import ModelSpec, ModuleSpec, Stored

SEED = 0


def rotated(spec: ModelSpec) -> ModelSpec:
    """``spec`` with a rotation, which `exl2ray.model.weights` applies whenever it reads a tensor.

    Raises UsageError naming --rotate for a family that has no rotated form of the same architecture.
    """
    reason = obstacle(spec)
    if reason is not None:
        raise UsageError(f"--rotate: {spec.arch.name} cannot be rotated: {reason}", "leave out --rotate")
    modules, norm = [], None
    for module in spec.modules:
        norm = next((p.stored for p in module.plain if p.role == "norm"), norm)  # the head reads the final norm's output
        modules.append(_folded(module, norm))
    return replace(spec, modules=tuple(modules), rotation=Rotation(spec.hyper.hidden_size, SEED))


def obstacle(spec: ModelSpec) -> str | None:
    """Why a family has no rotated form; None if it has one."""
    arch = spec.arch
    if arch.norm.kind != "rms":
        return "its LayerNorm subtracts the mean over the channels of the residual stream, which a rotation does not keep"
    if arch.norm.bias:
        return "its norms have biases, which nothing that follows could take up"
    if any(p.role == "post_norm" for module in spec.modules for p in module.plain):
        return (
            "it norms the outputs of attention and MLP before they are added to the residual stream, and the weights of "
            "those norms can be folded into no linear"
        )
    if arch.copied or arch.vision_model is not None:
        return "its vision tower and projector write into the residual stream, and are copied as they are"
    return None


def _folded(module: ModuleSpec, norm: Stored | None) -> ModuleSpec:
    """The module with the norm weight that each tensor takes up."""
    linears = tuple(x if x.role in WRITERS else replace(x, fold=norm) for x in module.linears)
    plain = tuple(replace(p, fold=norm) if p.role == "router" else p for p in module.plain)
    return replace(module, linears=linears, plain=plain)
