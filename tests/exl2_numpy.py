"""Plain numpy oracle of the EXL2 bit layout. No speed, no tricks beyond numpy columns.

Values are unsigned integers 0 .. 2^b - 1 in stored row order; a group of b-bit rows is, per column, one little-endian
bit stream. 32 rows fill exactly b words, so a group is a whole number of such units and never shares a word with
another.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from exl2ray.errors import FormatError
from exl2ray.formats.exl2 import PackedLinear, check_linear
from exl2ray.formats.layout import GroupLayout


def pack_values(values: NDArray[np.uint8], layout: GroupLayout) -> NDArray[np.int32]:
    """Integers (K, N) in stored row order -> ``q_weight`` (Q, N). Raises FormatError if a value exceeds its width."""
    if values.ndim != 2 or values.shape[0] != layout.in_features:
        raise FormatError(f"values of shape {values.shape} do not have the layout's {layout.in_features} rows")
    words = np.zeros((layout.packed_rows, values.shape[1]), dtype=np.uint32)
    for bits, rows, start, offset in zip(layout.bits, layout.rows, layout.starts, layout.offsets, strict=True):
        group = values[start : start + rows].astype(np.uint32)
        if group.size and int(group.max()) >= 1 << bits:
            raise FormatError(f"value {int(group.max())} does not fit into {bits} bits (stored rows from {start})")
        for i in range(rows):
            word, shift = divmod(i * bits, 32)
            words[offset + word] |= group[i] << np.uint32(shift)
            if shift + bits > 32:
                words[offset + word + 1] |= group[i] >> np.uint32(32 - shift)
    return words.view(np.int32)


def unpack_values(q_weight: NDArray[np.int32], layout: GroupLayout) -> NDArray[np.uint8]:
    """Inverse of ``pack_values``: (Q, N) -> (K, N) unsigned integers in stored row order."""
    if q_weight.ndim != 2 or q_weight.shape[0] != layout.packed_rows:
        raise FormatError(f"q_weight of shape {q_weight.shape} does not have the layout's {layout.packed_rows} rows")
    words = np.ascontiguousarray(q_weight).view(np.uint32)
    values = np.empty((layout.in_features, q_weight.shape[1]), dtype=np.uint8)
    for bits, rows, start, offset in zip(layout.bits, layout.rows, layout.starts, layout.offsets, strict=True):
        mask = np.uint32((1 << bits) - 1)
        for i in range(rows):
            word, shift = divmod(i * bits, 32)
            value = words[offset + word] >> np.uint32(shift)
            if shift + bits > 32:
                value = value | words[offset + word + 1] << np.uint32(32 - shift)
            values[start + i] = value & mask
    return values


def pack_scales(codes: NDArray[np.integer]) -> NDArray[np.int32]:
    """Column scale codes 1..16 (G, N), N a multiple of 8 -> ``q_scale`` (G, N/8); the file holds code - 1."""
    if codes.ndim != 2 or codes.shape[1] % 8:
        raise FormatError(f"scale codes of shape {codes.shape}: the column count must be a multiple of 8")
    if codes.size and not (1 <= int(codes.min()) and int(codes.max()) <= 16):
        raise FormatError(f"scale codes must be 1..16, found {int(codes.min())}..{int(codes.max())}")
    nibbles = (codes - 1).astype(np.uint32).reshape(codes.shape[0], -1, 8)
    words = np.zeros(nibbles.shape[:2], dtype=np.uint32)
    for j in range(8):
        words |= nibbles[:, :, j] << np.uint32(4 * j)
    return words.view(np.int32)


def unpack_scales(q_scale: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Inverse of ``pack_scales``: (G, N/8) -> codes 1..16 (G, N)."""
    words = np.ascontiguousarray(q_scale).view(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (words[:, :, None] >> shifts) & np.uint32(15)
    codes: NDArray[np.uint8] = (nibbles.reshape(words.shape[0], -1) + 1).astype(np.uint8)
    return codes


def effective_scales(
    scale_max: NDArray[np.float16], codes: NDArray[np.uint8], prescale: float = 1.0
) -> NDArray[np.float16]:
    """Step size per group and column, (G, N) float16, with the loader's roundings: m = fp16(scale_max * prescale/256),
    e = fp16(s*s * m). ``prescale`` is an architecture constant of the loader and not part of the stored scale."""
    m = (scale_max.astype(np.float32) * np.float32(prescale / 256)).astype(np.float16)
    squares = (codes.astype(np.int32) ** 2).astype(np.float32)
    # float32 holds the product of two float16 numbers exactly: one rounding, as in the loader
    scales: NDArray[np.float16] = (squares * m.astype(np.float32)[:, None]).astype(np.float16)
    return scales


def dequantize_values(
    values: NDArray[np.uint8], scales: NDArray[np.float16], layout: GroupLayout
) -> NDArray[np.float16]:
    """w = fp16((q - 2^(b-1)) * e) for (K, N) values in stored row order; result in the same order."""
    out = np.empty(values.shape, dtype=np.float16)
    for g, (bits, rows, start) in enumerate(zip(layout.bits, layout.rows, layout.starts, strict=True)):
        q = values[start : start + rows].astype(np.float32) - np.float32(1 << (bits - 1))
        out[start : start + rows] = (q * scales[g].astype(np.float32)).astype(np.float16)
    return out


def pack_linear_numpy(
    key: str,
    values: NDArray[np.uint8],  # (K, N32) unsigned integers, stored (act-order) rows
    codes: NDArray[np.integer],  # (G, N32) scale codes 1..16
    scale_max: NDArray[np.float16],  # (G,)
    perm: NDArray[np.integer],  # (K,) input feature of each stored row
    layout: GroupLayout,
    bias: NDArray[np.float16] | None = None,  # (N32,)
) -> PackedLinear:
    """Plain oracle of the packer. Raises FormatError if the result is not legal."""
    groups = np.array([layout.bits, layout.offsets], dtype=np.int64).T.reshape(-1)
    if groups.max() > np.iinfo(np.int16).max:
        raise FormatError(f"{key}: group offset {groups.max()} does not fit into 16 bits")
    p = PackedLinear(
        key,
        torch.from_numpy(pack_values(values, layout)),
        torch.from_numpy(pack_scales(codes)),
        torch.from_numpy(np.array(scale_max, dtype=np.float16)),
        torch.from_numpy(groups.astype(np.int16)),
        torch.from_numpy(np.argsort(perm).astype(np.int32)),
        None if bias is None else torch.from_numpy(np.array(bias, dtype=np.float16)),
    )
    problems = check_linear(p)
    if problems:
        raise FormatError(f"{key}: {'; '.join(problems)}")
    return p


def dequantize_numpy(p: PackedLinear, prescale: float = 1.0) -> NDArray[np.float16]:
    """The loader's weight matrix, (K, N32) float16, rows = input features in natural order.

    ``prescale`` is the constant that some architectures apply to a linear at load time (1 for most).
    """
    values = unpack_values(p.q_weight.numpy(), p.layout)
    scales = effective_scales(p.q_scale_max.numpy(), unpack_scales(p.q_scale.numpy()), prescale)
    stored = dequantize_values(values, scales, p.layout)
    natural: NDArray[np.float16] = stored[p.q_invperm.numpy()]
    return natural
