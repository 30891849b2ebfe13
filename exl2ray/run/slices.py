"""Parts of a packed linear for tensor parallelism: some of its columns, or some of its inputs, as a linear of its own.

Columns are cut while packed. Inputs are not: act-order scatters those of a part over all groups. Each group keeps the rows
that belong to the part, filled up to the format's 32 with rows of weights that are zero, which read inputs behind the real
ones. A part with half of the inputs so takes from a little over half of the bytes to all of them (groups of 32). Making fewer
groups of what is left would need new scales, which are other weights. Both work on any device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.layout import GroupLayout, pad32


def columns(p: PackedLinear, first: int, count: int, width: int | None = None) -> PackedLinear:
    """Output features first .. first + count, then copies of the last one up to ``width`` (None: count) padded to 32."""
    last = p.out_features - 1
    picked = torch.arange(first, first + pad32(count if width is None else width), device=p.q_weight.device)
    picked = picked.clamp(max=min(first + max(count, 1) - 1, last), min=0).clamp(max=last)
    nibbles = (p.q_scale[:, picked // 8] >> (picked % 8 * 4).to(torch.int32)) & 15
    bias = None if p.bias is None else p.bias[picked]
    return replace(p, q_weight=p.q_weight[:, picked].contiguous(), q_scale=_nibble_words(nibbles), bias=bias)


def rows(p: PackedLinear, first: int, count: int) -> PackedLinear:
    """Input features first .. first + count: a linear with at least ``count`` of them.

    Features from ``count`` on have weights of zero and take any finite input. Bytes change, weights do not.
    """
    device = p.q_weight.device
    perm = p.q_invperm.argsort()
    words, scales, tops, features, bits, sizes = [], [], [], [], [], []
    padding = count
    for g, (b, size, start, offset) in enumerate(
        zip(p.layout.bits, p.layout.rows, p.layout.starts, p.layout.offsets, strict=True)
    ):
        group = perm[start : start + size]
        kept = ((group >= first) & (group < first + count)).nonzero().flatten()
        if not len(kept):
            continue
        fill = pad32(len(kept)) - len(kept)
        values = _values(p.q_weight[offset : offset + size * b // 32], b, kept)
        zeros = values.new_full((fill, values.shape[1]), 1 << (b - 1))
        words.append(_packed(torch.cat([values, zeros]), b))
        features += [group[kept] - first, torch.arange(padding, padding + fill, device=device)]
        padding += fill
        scales.append(p.q_scale[g])
        tops.append(p.q_scale_max[g])
        bits.append(b)
        sizes.append(len(kept) + fill)
    layout = GroupLayout(tuple(bits), tuple(sizes))
    groups = torch.tensor([layout.bits, layout.offsets], dtype=torch.int16, device=device).T.flatten()
    return PackedLinear(
        p.key, torch.cat(words), torch.stack(scales), torch.stack(tops), groups,
        torch.cat(features).argsort().to(torch.int32), p.bias,
    )  # fmt: skip


def _values(words: Tensor, bits: int, picked: Tensor) -> Tensor:
    """words (w, N) int32 of one group, rows ``picked`` (m,) of it -> their unsigned integers, (m, N) int64."""
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    place = picked * bits
    word, shift = place // 32, place % 32
    values = unsigned[word] >> shift[:, None]
    over = (shift + bits > 32).nonzero().flatten()
    values[over] |= unsigned[word[over] + 1] << (32 - shift[over])[:, None]
    return values & ((1 << bits) - 1)


def _packed(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers (m, N) int64, m a multiple of 32 -> (m * bits / 32, N) int32."""
    units = values.view(-1, 32, values.shape[1])
    words = values.new_zeros(units.shape[0], bits, values.shape[1])
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= units[:, i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= units[:, i] >> (32 - shift)
    return _signed(words).view(-1, values.shape[1])


def _nibble_words(nibbles: Tensor) -> Tensor:
    """(G, N) codes 0..15 -> (G, N / 8) int32."""
    shifts = torch.arange(0, 32, 4, device=nibbles.device)
    return _signed((nibbles.to(torch.int64).view(nibbles.shape[0], -1, 8) << shifts).sum(-1))


def _signed(words: Tensor) -> Tensor:
    """Unsigned 32-bit words in int64 -> the same bits in int32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
