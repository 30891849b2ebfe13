"""The halves of a layer, attention and MLP: norm, first linears, a core without weights, second linear, residual.

``Half`` exposes the stages one by one, so that quantisation options can be scored without recomputing what they share:
``post(x, linear(second, mid({role: linear(first, pre(x))})))`` is the whole of it. Attention is causal: shared key/value
heads, RoPE, q/k norms, softcap, sliding windows.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.formats.layout import FLOAT16_MAX
from exl2ray.model.hyper import Hyper
from exl2ray.model.rope import RotaryTable
from exl2ray.model.rules import Activation, NormKind
from exl2ray.model.spec import LinearSpec

Capture = Callable[[str, Tensor], None]  # (input group, inputs (tokens, K) in compute dtype)


def chosen(states: Tensor, rows: slice | None) -> Tensor:
    """Some of the rows, or the states themselves: a view of all of them is another step of a backward pass."""
    return states if rows is None else states[rows]


class Norm:
    """RMSNorm or LayerNorm, with or without a weight offset, of the last dimension in float32.

    RMSNorm y = x / sqrt(mean(x^2) + eps) * (w + offset); LayerNorm y = (x - mean) / sqrt(var + eps) * w + b. weight:
    (n,), or (heads, n) for one weight per head. Infinities of a float16 input count as +-65504, as at run time.
    """

    def __init__(self, kind: NormKind, weight: Tensor, eps: float, offset: float = 0.0, bias: Tensor | None = None) -> None:
        self.kind = kind
        self.weight = weight.float() + offset
        self.bias = bias.float() if bias is not None else None
        self.eps = eps

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (..., n) -> (..., n) in ``dtype``."""
        if x.is_cuda and self.kind == "rms" and self.weight.dim() == 1 and dtype == torch.float16:
            from exl2ray.cuda import elementwise

            if elementwise.usable(x):
                return elementwise.rms_norm(x, self.weight, self.eps)
        y = x.float()
        if x.dtype == torch.float16:
            y = y.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
        size = (x.shape[-1],)
        weight = self.weight if self.weight.dim() == 1 else None
        if self.kind == "rms":
            y = F.rms_norm(y, size, weight, self.eps)
        else:
            y = F.layer_norm(y, size, weight, self.bias if weight is not None else None, self.eps)
        if weight is None:
            y = y * self.weight
            if self.bias is not None:
                y = y + self.bias
        return y.to(dtype)


class LinearBank:
    """Weights of the linears of one module, replaceable one by one.

    weights[key]: (K, N) in compute dtype. biases[key]: (N,) in compute dtype. watch: sees the input and the output of every
    linear, for gradients.
    """

    def __init__(self, linears: tuple[LinearSpec, ...], dtype: torch.dtype) -> None:
        self.specs = {x.key: x for x in linears}
        self.dtype = dtype
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.watch: Callable[[str, Tensor, Tensor], None] | None = None  # called with key, input (..., K), output (..., N)

    def set_weight(self, key: str, weight: Tensor) -> None:
        """Replace a weight by (K, N), or by (K, N32) whose padding columns are cut off."""
        device = self.weights[key].device if key in self.weights else weight.device
        self.weights[key] = self.fitted(self.specs[key], weight).to(device, self.dtype)

    @contextmanager
    def instead(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, these (K, N) in compute dtype, on the bank's device, stand in for the stored ones."""
        before = {key: self.weights[key] for key in weights}
        self.weights.update(weights)
        try:
            yield
        finally:
            self.weights.update(before)

    def fitted(self, linear: LinearSpec, weight: Tensor) -> Tensor:
        """``weight`` without padding columns; NumericError if it does not fit the linear."""
        k, n = linear.in_features, linear.out_features
        if weight.dim() != 2 or weight.shape[0] != k or weight.shape[1] not in (n, linear.padded_out):
            raise NumericError(f"weight of {linear.key} has shape {tuple(weight.shape)}, expected ({k}, {n})")
        return weight[:, :n]

    def linear(self, linear: LinearSpec | str, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """inputs (..., K) @ weight (K, N) + bias -> (..., N). ``weight`` stands in for the stored one."""
        spec = self.specs[linear] if isinstance(linear, str) else linear
        w = self.weights[spec.key]
        if weight is not None:  # candidates may wait in pinned host memory
            w = self.fitted(spec, weight).to(inputs.device, self.dtype, non_blocking=True)
        bias = self.biases.get(spec.key)
        if bias is None:
            out = torch.matmul(inputs, w)
        else:
            out = torch.addmm(bias, inputs.reshape(-1, spec.in_features), w)
            out = out.reshape(*inputs.shape[:-1], spec.out_features)
        if self.watch is not None:
            self.watch(spec.key, inputs, out)
        return out


class Half(ABC):
    """Attention or MLP. ``first``: linears that share the normed input; ``second``: the linear back to hidden size.

    In a parallel block ``post`` returns the branch alone; the block adds the residual.
    """

    def __init__(
        self,
        bank: LinearBank,
        first: tuple[LinearSpec, ...],
        second: LinearSpec,
        norm: Norm,
        post_norm: Norm | None,
        residual_scale: float,
        add_residual: bool,
    ) -> None:
        self.bank = bank
        self.first = first
        self.second = second
        self.norm = norm
        self.post_norm = post_norm
        self.residual_scale = residual_scale
        self.add_residual = add_residual

    def pre(self, x: Tensor) -> Tensor:
        """Input norm: x (R, T, hidden) state dtype -> (R, T, hidden) compute dtype."""
        return self.norm(x, self.bank.dtype)

    def linear(self, linear: LinearSpec | str, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """inputs (..., K) -> (..., N), bias included; ``weight`` (K, N) or (K, N32) stands in for the stored one."""
        return self.bank.linear(linear, inputs, weight)

    def prepare(self, role: str, out: Tensor) -> Tensor:
        """What can be done to the output (R, T, N) of one first linear before it meets the others (norm, RoPE)."""
        return out

    @abstractmethod
    def mix(self, outs: Mapping[str, Tensor]) -> Tensor:
        """Prepared outputs of the first linears by role -> input of the second linear (R, T, K)."""

    def mid(self, outs: Mapping[str, Tensor]) -> Tensor:
        """Outputs of the first linears by role, (R, T, N) each -> input of the second linear (R, T, K)."""
        return self.mix({role: self.prepare(role, out) for role, out in outs.items()})

    def post(self, x: Tensor, out: Tensor) -> Tensor:
        """out (R, T, hidden) of the second linear -> states after the residual addition, in x's dtype."""
        if self.residual_scale != 1.0:
            out = out * self.residual_scale
        if self.post_norm is not None:
            out = self.post_norm(out, x.dtype)
        return x + out.to(x.dtype) if self.add_residual else out

    @property
    def plain_residual(self) -> bool:
        """Whether ``post`` is nothing but x + out."""
        return self.residual_scale == 1.0 and self.post_norm is None and self.add_residual

    def branch(self, n: Tensor, capture: Capture | None = None, rows: slice | None = None) -> Tensor:
        """Normed input n (R, T, hidden) -> output of the second linear of all rows (R, T, hidden), or of some.

        capture is called with the inputs of each group of linears, flattened to (tokens, K), of all rows.
        """
        if capture is not None:
            capture(self.first[0].input_group, n.flatten(0, -2))
        m = self.mid({x.role: self.linear(x, n) for x in self.first})
        if capture is not None:
            capture(self.second.input_group, m.flatten(0, -2))
        return self.linear(self.second, chosen(m, rows))


def activate(kind: Activation, x: Tensor) -> Tensor:
    """silu, GELU in its tanh approximation, or exact GELU."""
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def gated(kind: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, clamped to +-65504 as at run time; a new tensor."""
    if torch.is_grad_enabled() and gate.requires_grad:  # what a backward pass needs must not be overwritten
        return (activate(kind, gate) * up).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    if kind == "silu" and gate.is_cuda:
        from exl2ray.cuda import elementwise

        if elementwise.usable(gate, up):
            return elementwise.gated_silu(gate, up)
    return activate(kind, gate).mul_(up).clamp_(-FLOAT16_MAX, FLOAT16_MAX)


class MlpHalf(Half):
    """gate, up -> act(gate) * up -> down; or up -> act(up) -> down."""

    def __init__(
        self,
        bank: LinearBank,
        linears: tuple[LinearSpec, ...],  # [gate,] up, down
        hyper: Hyper,
        activation: Activation,
        norm: Norm,
        post_norm: Norm | None = None,
        add_residual: bool = True,
    ) -> None:
        super().__init__(bank, linears[:-1], linears[-1], norm, post_norm, hyper.residual_scale, add_residual)
        self.activation = activation

    def mix(self, outs: Mapping[str, Tensor]) -> Tensor:
        """gate_proj (if there is one) and up_proj, (R, T, I) each -> (R, T, I)."""
        if "gate_proj" in outs:
            return gated(self.activation, outs["gate_proj"], outs["up_proj"])
        return activate(self.activation, outs["up_proj"])


QUERY_CHUNK = 512  # queries whose scores exist at once on the explicit path, per row: heads * 512 * T * 4 bytes


class KeyValues:
    """Keys and values (R, kv_heads, T, D) of the tokens that an attention has seen, for those that follow. They lie in memory
    for ``room`` tokens, and where more come, for twice as many: joined anew at each token, they were copied each time, into
    blocks of ever new sizes."""

    def __init__(self, room: int = 256) -> None:
        self._room, self._keys, self._values = room, torch.empty(0), torch.empty(0)
        self.length = 0  # tokens seen

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new tokens; returns all, as views."""
        first, stop = self.length, self.length + keys.shape[2]
        if first == 0 or stop > self._room:
            self._room = max(stop, self._room * (2 if first else 1))
            self._keys, self._values = (self._moved(old, new) for old, new in ((self._keys, keys), (self._values, values)))
        for kept, new in ((self._keys, keys), (self._values, values)):
            kept[:, :, first:stop] = new
        self.length = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def _moved(self, old: Tensor, like: Tensor) -> Tensor:
        made = like.new_empty((*like.shape[:2], self._room, like.shape[3]))
        if self.length:
            made[:, :, : self.length] = old[:, :, : self.length]
        return made


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
            causal = window is None and first == 0
            last = window is None and first + 1 == length  # one token, which sees all
            mask = None if causal or last else visible(first, length, window, q.device)
            attend = _by_products if getattr(_attention, "by_products", False) else F.scaled_dot_product_attention
            out = attend(q, k, v, mask, is_causal=causal, scale=h.attention_scale, enable_gqa=h.heads != h.kv_heads)
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


_attention = threading.local()


@contextmanager
def attention_by_products() -> Iterator[None]:
    """Attention as two matrix products and a softmax, in this thread alone: its backward pass adds up in one order, which
    those of fused attention do not. (torch's own switch, ``sdpa_kernel``, turns all threads of a process.)"""
    before = getattr(_attention, "by_products", False)
    _attention.by_products = True
    try:
        yield
    finally:
        _attention.by_products = before


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes with its backend MATH."""
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    plain = torch.ops.aten._scaled_dot_product_attention_math
    out: Tensor = plain(q, k, v, mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]
    return out


def visible(first: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """(stop - first, stop) bool: whether query i in first .. stop-1 sees key j, i - window < j <= i."""
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
