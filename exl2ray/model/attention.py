"""Causal self-attention: shared key/value heads, RoPE, q/k norms, softcap, sliding windows (architectures 5.7-5.13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from exl2ray.model.half import Half, LinearBank
from exl2ray.model.hyper import Hyper
from exl2ray.model.norms import Norm
from exl2ray.model.rope import RotaryTable
from exl2ray.model.spec import LinearSpec

QUERY_CHUNK = 512  # queries whose scores exist at once on the explicit path, per row: heads * 512 * T * 4 bytes


class AttentionHalf(Half):
    """q, k, v -> attention -> o. Positions of every row start at 0."""

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
        h = self.hyper
        if role == "q_proj":
            return self._heads(out, h.heads, self.q_norm, rotate=True)
        return self._heads(out, h.kv_heads, self.k_norm if role == "k_proj" else None, rotate=role == "k_proj")

    def mix(self, outs: Mapping[str, Tensor]) -> Tensor:
        """Prepared q, k, v -> attention output (R, T, heads * D)."""
        h = self.hyper
        q, k, v = outs["q_proj"], outs["k_proj"], outs["v_proj"]
        length = q.shape[2]
        window = self.window if self.window is not None and self.window < length else None
        if h.attention_softcap is not None:
            out = _explicit_attention(q, k, v, h.attention_scale, h.attention_softcap, window)
        else:
            mask = None if window is None else visible(0, length, window, q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=h.attention_scale, enable_gqa=h.heads != h.kv_heads
            )
        return out.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, heads: int, norm: Norm | None, rotate: bool) -> Tensor:
        """(R, T, heads * D) -> (R, heads, T, D): clamp, q/k norm, RoPE."""
        if self.hyper.qkv_clip is not None:
            x = x.clamp(-self.hyper.qkv_clip, self.hyper.qkv_clip)
        x = x.reshape(*x.shape[:2], heads, self.hyper.head_dim)
        if norm is not None:
            x = norm(x, x.dtype)
        if rotate and self.rotary is not None:
            x = self.rotary.rotate(x)
        return x.transpose(1, 2)


def visible(first: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """(stop - first, stop) bool: whether query i in first .. stop-1 sees key j, i - window < j <= i (5.13)."""
    i = torch.arange(first, stop, device=device)[:, None]
    j = torch.arange(stop, device=device)
    seen = j <= i
    return seen if window is None else seen & (j > i - window)


def _explicit_attention(
    q: Tensor,  # (R, heads, T, D)
    k: Tensor,  # (R, kv_heads, T, D)
    v: Tensor,
    scale: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v in float32, (R, heads, T, D) in q's dtype.

    Row by row and QUERY_CHUNK queries at a time, because the scores are materialised.
    """
    rows, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    out = torch.empty_like(q)
    for r in range(rows):
        keys, values = k[r, :, None].float(), v[r, :, None].float()  # (kv_heads, 1, T, D)
        for first in range(0, length, QUERY_CHUNK):
            stop = min(first + QUERY_CHUNK, length)
            queries = q[r, :, first:stop].float().reshape(kv_heads, heads // kv_heads, stop - first, dim)
            scores = queries @ keys[..., :stop, :].transpose(-1, -2)
            scores = softcap * torch.tanh(scores * (scale / softcap))
            scores = scores.masked_fill(~visible(first, stop, window, q.device), float("-inf"))
            mixed = scores.softmax(-1) @ values[..., :stop, :]
            out[r, :, first:stop] = mixed.reshape(heads, stop - first, dim).to(q.dtype)
    return out
