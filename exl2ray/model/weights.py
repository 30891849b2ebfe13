"""Reading weights: one linear or one plain tensor at a time, split, transposed and checked.

Linears come in quantisation orientation, (K, N) = (in_features, out_features), whatever the checkpoint's layout.
Nothing is scaled: multipliers are applied by the loader; only a normalised head is stored normalised. Where the model is to
be rotated, tensors come rotated from here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.cuda.small_batches import CAPTURING
from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import FLOAT16_MAX, pad32
from exl2ray.formats.readahead import ReadAhead, TensorReader
from exl2ray.formats.shards import TensorEntry
from exl2ray.model.arch import shape_fits, shown_shape
from exl2ray.model.spec import CopiedTensor, LinearSpec, ModelSpec, ModuleSpec, PlainTensor, Stored

READERS = min(8, max(4, (os.cpu_count() or 1) // 2))  # threads that read ahead for a GPU: one is slower than a forward pass
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class OutputEntry:
    """One entry of the output, in order. name: tensor name, or the key of a linear (its tensors add ``.q_weight`` ...).

    Exactly one of ``plain``, ``linear``, ``copied`` is set; ``module`` is None for copied tensors.
    """

    name: str
    module: ModuleSpec | None = None
    plain: PlainTensor | None = None
    linear: LinearSpec | None = None
    copied: CopiedTensor | None = None


def read_linear(
    spec: ModelSpec,
    linear: LinearSpec,
    source: TensorReader,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Weight (K, N) and bias (N,) or None, on the CPU in the source's dtype; the weight may be a transposed view.

    A normalised head is divided in float32 and returned in float32. Of a rotated model the weight is computed on
    ``device`` and rounded once, to ``dtype``. Raises SourceError naming the tensor: missing, wrong shape or dtype, NaN,
    infinity, or beyond float16's +-65504.
    """
    weight = read_stored(linear.weight, source)
    if linear.normalize:
        columns = weight.float()
        norms = columns.norm(dim=0, keepdim=True)
        # An all-zero row of a head is padding of the vocabulary: it stays zero.
        weight = columns / torch.where(norms > 0, norms, torch.ones_like(norms))
    bias = read_stored(linear.bias, source) if linear.bias is not None else None
    if spec.rotation is None:
        return weight, bias
    if linear.fold is not None:  # reads the residual stream
        weight = spec.rotation.rows(weight.t(), _norm_weight(spec, linear.fold, source), device, dtype).t()
    else:  # writes to it
        weight = spec.rotation.rows(weight, None, device, dtype)
        bias = None if bias is None else spec.rotation.rows(bias[None])[0]
    check_weights(weight, f"{source.where(linear.weight.name)}, rotated,")
    return weight, bias


def plain_shape(plain: PlainTensor, source: SourceModel) -> tuple[int, ...]:
    """Shape of what `read_plain` returns, without reading it."""
    stored = plain.stored
    shape = list(source.shape(stored.name))
    if stored.ranges:
        shape[stored.axis] = sum(stop - start for start, stop in stored.ranges)
    if stored.transpose:
        shape.reverse()
    return (plain.repeat, *shape) if plain.repeat else tuple(shape)


def read_plain(spec: ModelSpec, plain: PlainTensor, source: SourceModel) -> Tensor:
    """The tensor as the output stores it: float16, CPU; q/k norm weights stacked to (heads, head_dim).

    Raises SourceError as ``read_linear``.
    """
    return stacked(plain, read_tensor(spec, plain, source, "cpu", torch.float16)).to(torch.float16).contiguous()


def read_tensor(
    spec: ModelSpec,
    plain: PlainTensor,
    source: TensorReader,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """The tensor as the forward pass wants it, not stacked: on ``device`` in the source's dtype.

    What a rotation changes is rounded once, to ``dtype``. Raises SourceError as ``read_linear``.
    """
    tensor = read_stored(plain.stored, source)
    if spec.rotation is None or plain.role not in ("embedding", "positions", "router", "norm"):
        return tensor.to(device)
    if plain.role == "norm":  # its weight is part of what follows
        return torch.full(tensor.shape, 1.0 - spec.arch.norm.offset, dtype=dtype, device=device)
    scale = None if plain.fold is None else _norm_weight(spec, plain.fold, source)
    out = spec.rotation.rows(tensor, scale, device, dtype)
    check_weights(out, f"{source.where(plain.stored.name)}, rotated,")
    return out


def _norm_weight(spec: ModelSpec, norm: Stored, source: TensorReader) -> Tensor:
    """What a norm multiplies with, (hidden,) float32."""
    return read_stored(norm, source).float() + spec.arch.norm.offset


def stacked(plain: PlainTensor, tensor: Tensor) -> Tensor:
    """``tensor`` repeated as ``plain.repeat`` says."""
    return tensor.expand(plain.repeat, -1) if plain.repeat else tensor


def whole_tensors(module: ModuleSpec) -> list[str]:
    """Names of the source tensors that reading a module takes whole, in order, for fetching them in advance."""
    stored = [x.weight for x in module.linears] + [p.stored for p in module.plain]
    return list(dict.fromkeys(s.name for s in stored if not s.ranges))


def read_stored(stored: Stored, source: TensorReader) -> Tensor:
    """The described part of a source tensor, checked, in the source's dtype; SourceError as ``read_linear``."""
    name = stored.name
    if name not in source:
        raise SourceError(f"{source.path}: tensor {name} is missing", "the checkpoint is incomplete")
    found = source.shape(name)
    if not shape_fits(found, stored.shape):
        raise SourceError(
            f"{source.path}: tensor {name} has shape {found}, expected {shown_shape(stored.shape)}",
            "config.json does not belong to these weights",
        )
    tensor = _cut(stored, source)
    if tensor.dtype not in FLOAT_DTYPES:
        raise SourceError(
            f"{source.path}: tensor {name} has dtype {source.dtype(name)}; floating-point numbers are needed",
            "the model is quantised already? Start from the original weights",
        )
    if not (isinstance(source, ReadAhead) and source.checked(name)):
        check_weights(tensor, source.where(name))
    return tensor.t() if stored.transpose else tensor


def read_ahead(source: SourceModel, pin: bool) -> ReadAhead:
    """A reader whose background threads also check weights and, for a GPU, read them into pinned memory."""

    def check(name: str, tensor: Tensor) -> None:
        if tensor.dtype in FLOAT_DTYPES:
            check_weights(tensor, source.where(name))

    return ReadAhead(source, check, pinned, READERS) if pin else ReadAhead(source, check)


def pinned(nbytes: int) -> Tensor:
    """(nbytes,) uint8 in page-locked memory; not while another thread records a CUDA graph."""
    with CAPTURING:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def forget_pinned() -> None:
    """Gives back page-locked memory that is free: torch keeps the most that was ever needed, for later."""
    if not torch.cuda.is_available():
        return
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    with CAPTURING:
        if empty is not None:
            empty()


def _cut(stored: Stored, source: TensorReader) -> Tensor:
    if not stored.ranges:
        return source.load(stored.name)
    if stored.axis == 0 and len(stored.ranges) == 1:
        return source.load(stored.name, slice(*stored.ranges[0]))
    whole = source.load(stored.name)
    return torch.cat([whole.narrow(stored.axis, a, b - a) for a, b in stored.ranges], dim=stored.axis)


def check_weights(tensor: Tensor, where: str) -> None:
    """Raise SourceError if the tensor holds NaN, infinity or values that float16 cannot (|w| > 65504)."""
    if tensor.numel() == 0:
        raise SourceError(f"{where} is empty")
    low, high = (float(x) for x in tensor.aminmax())
    if low != low or high != high:
        raise SourceError(f"{where} holds {int(tensor.isnan().sum())} NaN", "the checkpoint is damaged; fetch it again")
    if low < -FLOAT16_MAX or high > FLOAT16_MAX:
        count = int((tensor.abs() > FLOAT16_MAX).sum())
        raise SourceError(
            f"{where} has {count} values beyond float16 (+-65504), range {low:g} to {high:g}",
            "EXL2 stores float16; such a model cannot be converted",
        )


def output_tensors(spec: ModelSpec) -> list[OutputEntry]:
    """Everything the output holds, in the order in which ExLlamaV2's converter writes it.

    Per module: norms (and router), linears, q/k norms; at the end the copied tensors.
    """
    out = []
    for module in spec.modules:
        late = [p for p in module.plain if p.role in ("q_norm", "k_norm")]
        early = [p for p in module.plain if p not in late]
        out += [OutputEntry(p.output_name, module, plain=p) for p in early]
        out += [OutputEntry(x.key, module, linear=x) for x in module.linears]
        out += [OutputEntry(p.output_name, module, plain=p) for p in late]
    return out + [OutputEntry(c.output_name, copied=c) for c in spec.copied]


def linear_entries(linear: LinearSpec, packed_rows: int, groups: int) -> list[TensorEntry]:
    """Tensors of one quantised linear, in the order of `exl2ray.formats.exl2.PackedLinear.tensors`."""
    n = pad32(linear.out_features)
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("q_weight", "I32", (packed_rows, n)),
        ("q_scale", "I32", (groups, n // 8)),
        ("q_scale_max", "F16", (groups,)),
        ("q_groups", "I16", (2 * groups,)),
        ("q_invperm", "I32", (linear.in_features,)),
    ]
    if linear.has_bias:
        shapes.append(("bias", "F16", (n,)))
    return [announced(f"{linear.key}.{name}", dtype, shape) for name, dtype, shape in shapes]


def announced(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    """An entry of a tensor whose content nobody asks for."""
    return TensorEntry(name, dtype, shape, _unread)


def _unread() -> Tensor:
    raise AssertionError("an announced tensor has no content")
