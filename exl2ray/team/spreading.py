"""Packed linears on their way from the member of a group that has them to all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.model.spec import LinearSpec
from exl2ray.team.comm import Comm

_ALIGNMENT = 16  # of each tensor in the buffer, so that any dtype can be viewed in place


def spread(
    comm: Comm,
    linears: Sequence[LinearSpec],
    packed: Mapping[str, PackedLinear] | None,
    owner: int,
    device: torch.device,
) -> dict[str, PackedLinear]:
    """Packed linears by key; the owner passes them in, the others None. All members call it. What comes from elsewhere stays
    on ``device``, but for the groups, which are read on the host."""
    if comm.size == 1 and packed is not None:
        return dict(packed)
    layout = None
    if packed is not None:
        layout = [(n, tuple(t.shape), t.dtype) for x in linears for n, t in packed[x.key].tensors().items()]
    described: list[tuple[str, tuple[int, ...], torch.dtype]] = comm.gather(layout)[owner]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in described]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    flat = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    if packed is not None:
        everything = [t for x in linears for t in packed[x.key].tensors().values()]
        for t, start, size in zip(everything, starts, sizes, strict=False):
            flat[start : start + size].copy_(t.contiguous().view(-1).view(torch.uint8))
    comm.broadcast(flat, owner)
    if packed is not None:
        return dict(packed)
    found = {
        name: flat[start : start + size].view(dtype).view(shape)
        for (name, shape, dtype), start, size in zip(described, starts, sizes, strict=False)
    }
    return {x.key: _packed(x.key, found) for x in linears}


def _packed(key: str, found: Mapping[str, torch.Tensor]) -> PackedLinear:
    names = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
    tensors = {name: found[f"{key}.{name}"] for name in names}
    tensors["q_groups"] = tensors["q_groups"].cpu()
    return PackedLinear(key, **tensors, bias=found.get(f"{key}.bias"))
