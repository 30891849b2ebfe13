"""Between integers and the packed tensors of the format, on CPU or GPU.

Rows are packed in units of 32: 32 rows of b bits fill exactly b words of a column, whatever b, and groups are multiples
of 32 rows, so no unit straddles groups. `exl2ray.formats.exl2` has the NumPy oracle of both directions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from exl2ray.errors import FormatError, NumericError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.layout import GroupLayout, pad32
from exl2ray.quant.gptq import Quantized

UNIT = 32


def pack(key: str, q: Quantized, bias: Tensor | None = None, keep: bool = False) -> PackedLinear:
    """Quantised layer to the tensors on disk, on the CPU. ``bias`` (N or N32,), any float dtype, is stored as float16.

    keep: leaves the tensors where the codes are, except for groups and bias.

    Raises NumericError if the bias leaves the range of float16.
    """
    n = q.codes.shape[1]
    if n % 32:
        raise FormatError(f"{key}: {n} columns; pad the weight to a multiple of 32 before quantising")
    offsets = [v for pair in zip(q.layout.bits, q.layout.offsets, strict=True) for v in pair]
    invperm = torch.empty_like(q.perm)
    invperm[q.perm] = torch.arange(q.perm.numel(), device=q.perm.device)
    device = q.codes.device if keep else torch.device("cpu")
    return PackedLinear(
        key=key,
        q_weight=pack_rows(q.codes, q.layout).to(device),
        q_scale=pack_scale_codes(q.scale_codes).to(device),
        q_scale_max=q.scale_max.contiguous().to(device),
        q_groups=torch.tensor(offsets, dtype=torch.int16),
        q_invperm=invperm.to(torch.int32).to(device),
        bias=None if bias is None else _half_bias(key, bias, n),
    )


def _half_bias(key: str, bias: Tensor, columns: int) -> Tensor:
    padded = torch.zeros(columns, dtype=torch.float16)
    half = bias.detach().cpu().half()
    if not bool(torch.isfinite(half).all()):
        raise NumericError(f"{key}.bias does not fit into float16", "the format stores biases as float16")
    padded[: half.numel()] = half
    return padded


@lru_cache(maxsize=256)
def unit_tables(layout: GroupLayout, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Per unit of 32 rows: width, first q_weight row, group; each (K / 32,) int32."""
    bits, words, groups = [], [], []
    for g, (b, n, o) in enumerate(zip(layout.bits, layout.rows, layout.offsets, strict=True)):
        for i in range(n // UNIT):
            bits.append(b)
            words.append(o + i * b)
            groups.append(g)
    return tuple(torch.tensor(t, dtype=torch.int32, device=device) for t in (bits, words, groups))  # type: ignore[return-value]


def _runs(layout: GroupLayout) -> list[tuple[int, int, int, int]]:
    """(width, first row, last row + 1, first q_weight row) of each run of groups with one width."""
    runs: list[tuple[int, int, int, int]] = []
    for b, n, start, word in zip(layout.bits, layout.rows, layout.starts, layout.offsets, strict=True):
        if runs and runs[-1][0] == b:
            runs[-1] = (b, runs[-1][1], start + n, runs[-1][3])
        else:
            runs.append((b, start, start + n, word))
    return runs


def pack_rows(codes: Tensor, layout: GroupLayout) -> Tensor:
    """codes (K, N) uint8, stored order -> q_weight (Q, N) int32 on the same device."""
    if codes.is_cuda:
        from exl2ray.cuda.packing import pack_rows_cuda

        return pack_rows_cuda(codes, *unit_tables(layout, codes.device)[:2], layout.packed_rows)
    out = torch.zeros(layout.packed_rows, codes.shape[1], dtype=torch.int32, device=codes.device)
    for b, start, stop, word in _runs(layout):
        units = (stop - start) // UNIT
        values = codes[start:stop].view(units, UNIT, -1)
        words = out[word : word + units * b].view(units, b, -1)
        for i in range(UNIT):
            w, shift = divmod(i * b, 32)
            v = values[:, i].int()
            words[:, w] |= v << shift
            if shift + b > 32:
                words[:, w + 1] |= v >> (32 - shift)
    return out


def unpack_rows(q_weight: Tensor, layout: GroupLayout) -> Tensor:
    """q_weight (Q, N) int32 -> codes (K, N) uint8, stored order."""
    out = torch.empty(layout.in_features, q_weight.shape[1], dtype=torch.uint8, device=q_weight.device)
    for b, start, stop, word in _runs(layout):
        units = (stop - start) // UNIT
        words = q_weight[word : word + units * b].view(units, b, -1)
        values = out[start:stop].view(units, UNIT, -1)
        mask = (1 << b) - 1
        for i in range(UNIT):
            w, shift = divmod(i * b, 32)
            # Right shifts of negative words drag the sign along; the mask of what the word can hold removes it.
            low = (words[:, w] >> shift) & (mask if shift + b <= 32 else (1 << (32 - shift)) - 1)
            if shift + b > 32:
                low = low | ((words[:, w + 1] << (32 - shift)) & mask)
            values[:, i] = low.to(torch.uint8)
    return out


def pack_scale_codes(scale_codes: Tensor) -> Tensor:
    """(G, N) uint8 codes 1..16 -> (G, N / 8) int32, column 0 of each eight in the lowest nibble."""
    g, n = scale_codes.shape
    nibbles = (scale_codes.int() - 1).view(g, n // 8, 8)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=scale_codes.device)
    return (nibbles << shifts).sum(dim=2, dtype=torch.int32)  # no two of them share a bit


def unpack_scale_codes(q_scale: Tensor) -> Tensor:
    """(G, N / 8) int32 -> (G, N) uint8 codes 1..16."""
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=q_scale.device)
    return (((q_scale[:, :, None] >> shifts) & 15) + 1).to(torch.uint8).flatten(1)


def dequantize(p: PackedLinear, device: torch.device | str = "cpu", prescale: float = 1.0) -> Tensor:
    """The loader's weight matrix (K, N32) float16 in natural row order, bit for bit."""
    layout = p.layout
    q_weight, invperm = p.q_weight.to(device), p.q_invperm.to(device).long()
    scale_max = (p.q_scale_max.to(device).float() * (prescale / 256)).half()
    scale_codes = unpack_scale_codes(p.q_scale.to(device))
    steps = ((scale_codes.int() ** 2).half() * scale_max[:, None]).half()  # (G, N32)
    if q_weight.is_cuda:
        from exl2ray.cuda.packing import dequantize_cuda

        perm = torch.argsort(invperm)
        return dequantize_cuda(q_weight, steps, perm, *unit_tables(layout, device))
    codes = unpack_rows(q_weight, layout)
    stored = torch.empty(codes.shape, dtype=torch.float16, device=codes.device)
    for g, (b, start, n) in enumerate(zip(layout.bits, layout.starts, layout.rows, strict=True)):
        stored[start : start + n] = (codes[start : start + n].to(torch.int16) - 2 ** (b - 1)).half() * steps[g]
    return stored[invperm]


def pad_columns(w: Tensor) -> Tensor:
    """(K, N) -> (K, N32): zero columns appended up to a multiple of 32."""
    n = w.shape[1]
    return w if n % 32 == 0 else torch.nn.functional.pad(w, (0, pad32(n) - n))


class Decoded:
    """Whether packed tensors decode to the weights that were chosen, and these to numbers. Asking waits for the GPU: once for
    several inputs."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}  # linear -> weights that differ, weights that are no finite numbers

    def add(self, key: str, loaded: Tensor, chosen: Tensor) -> None:
        self._counts[key] = torch.stack([(loaded != chosen).sum(), (~torch.isfinite(loaded)).sum()])

    def check(self) -> None:
        """Raises NumericError for the first linear with such weights."""
        counts = torch.stack(list(self._counts.values())).tolist() if self._counts else []
        for key, (wrong, infinite) in zip(self._counts, counts, strict=True):
            if infinite:
                raise NumericError(
                    f"{key}: {infinite} of the quantised weights are beyond float16, or not numbers",
                    "its weights are near 65504: EXL2 stores steps as float16; more bits may represent them",
                )
            if wrong:
                raise NumericError(
                    f"{key}: the packed tensors decode to other weights than were chosen ({wrong} differ)",
                    "this is a defect of exl2ray or of the GPU: please report it with the log",
                )
