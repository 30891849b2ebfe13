"""Causal self-attention: shared key/value heads, RoPE, q/k norms, softcap, sliding windows (architectures 5.7-5.13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from exl2ray.model.half import Half, LinearBank, Norm
from exl2ray.model.hyper import Hyper
from exl2ray.model.rope import RotaryTable
from exl2ray.model.spec import LinearSpec

QUERY_CHUNK = 512  # queries whose scores exist at once on the explicit path, per row: heads * 512 * T * 4 bytes


class KeyValues:
    """Keys and values (R, kv_heads, T, D) of the tokens that an attention has seen, for those that follow."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new tokens; returns all."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=2)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class AttentionHalf(Half):
    """q, k, v -> attention -> o. Positions of every row start at 0, but for `continued`."""

    def __init__(
        self,
        bank: LinearBank,
        linears: tuple[LinearSpec, ...],  # q, k, v, o
        hyper: Hyper,
        layer: int,
        device: torch.device,
        norm: Norm,
        post_norm: Norm | None = None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        add_residual: bool = True,
    ) -> None:
        super().__init__(bank, linears[:3], linears[3], norm, post_norm, hyper.residual_scale, add_residual)
        self.hyper = hyper
        self.q_norm, self.k_norm = q_norm, k_norm
        self.window = hyper.layer_window(layer)
        rope = hyper.layer_rope(layer)
        self.rotary = RotaryTable(rope, device) if rope is not None else None

    def prepare(self, role: str, out: Tensor) -> Tensor:
        """q_proj (R, T, heads * D), k_proj or v_proj (R, T, kv_heads * D) -> (R, heads or kv_heads, T, D)."""
        return self._prepared(role, out, 0)

    def _prepared(self, role: str, out: Tensor, start: int) -> Tensor:
        h = self.hyper
        if role == "q_proj":
            return self._heads(out, h.heads, self.q_norm, True, start)
        return self._heads(out, h.kv_heads, self.k_norm if role == "k_proj" else None, role == "k_proj", start)

    def mix(self, outs: Mapping[str, Tensor]) -> Tensor:
        """Prepared q, k, v -> attention output (R, T, heads * D)."""
        return self._attend(outs["q_proj"], outs["k_proj"], outs["v_proj"])

    def continued(self, outs: Mapping[str, Tensor], past: KeyValues) -> Tensor:
        """As `mid`, for tokens behind those of ``past``, which is extended by their keys and values."""
        q, k, v = (self._prepared(role, outs[role], past.length) for role in ("q_proj", "k_proj", "v_proj"))
        return self._attend(q, *past.extend(k, v))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, heads, T, D) of the last T tokens of those that k and v belong to -> (R, T, heads * D)."""
        h, length = self.hyper, k.shape[2]
        first = length - q.shape[2]
        window = self.window if self.window is not None and self.window < length else None
        if h.attention_softcap is not None:
            out = _explicit_attention(q, k, v, h.attention_scale, h.attention_softcap, window)
        else:
            plain = window is None and first == 0
            mask = None if plain else visible(first, length, window, q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=h.attention_scale, enable_gqa=h.heads != h.kv_heads
            )
        return out.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, heads: int, norm: Norm | None, rotate: bool, start: int) -> Tensor:
        """(R, T, heads * D) -> (R, heads, T, D): clamp, q/k norm, RoPE."""
        if self.hyper.qkv_clip is not None:
            x = x.clamp(-self.hyper.qkv_clip, self.hyper.qkv_clip)
        x = x.reshape(*x.shape[:2], heads, self.hyper.head_dim)
        if norm is not None:
            x = norm(x, x.dtype)
        if rotate and self.rotary is not None:
            x = self.rotary.rotate(x, start)
        return x.transpose(1, 2)


def visible(first: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """(stop - first, stop) bool: whether query i in first .. stop-1 sees key j, i - window < j <= i (5.13)."""
    i = torch.arange(first, stop, device=device)[:, None]
    j = torch.arange(stop, device=device)
    seen = j <= i
    return seen if window is None else seen & (j > i - window)


def _explicit_attention(
    q: Tensor,  # (R, heads, T, D), of the last T of S tokens
    k: Tensor,  # (R, kv_heads, S, D)
    v: Tensor,
    scale: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v in float32, (R, heads, T, D) in q's dtype.

    Row by row and QUERY_CHUNK queries at a time, because the scores are materialised.
    """
    rows, heads, length, dim = q.shape
    kv_heads, before = k.shape[1], k.shape[2] - length
    out = torch.empty_like(q)
    for r in range(rows):
        keys, values = k[r, :, None].float(), v[r, :, None].float()  # (kv_heads, 1, T, D)
        for first in range(0, length, QUERY_CHUNK):
            stop = min(first + QUERY_CHUNK, length)
            queries = q[r, :, first:stop].float().reshape(kv_heads, heads // kv_heads, stop - first, dim)
            end = before + stop
            scores = queries @ keys[..., :end, :].transpose(-1, -2)
            scores = softcap * torch.tanh(scores * (scale / softcap))
            scores = scores.masked_fill(~visible(before + first, end, window, q.device), float("-inf"))
            mixed = scores.softmax(-1) @ values[..., :end, :]
            out[r, :, first:stop] = mixed.reshape(heads, stop - first, dim).to(q.dtype)
    return out
