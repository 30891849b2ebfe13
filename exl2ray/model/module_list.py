"""The module list of a model: names, shapes and sources of every tensor."""

from __future__ import annotations

from exl2ray.formats.hf import SourceModel
from exl2ray.model.hyper import Hyper
from exl2ray.model.rules import Arch
from exl2ray.model.spec import LinearSpec, ModuleKind, ModuleSpec, PlainTensor, Stored


class ModuleBuilder:
    """Module list of one model. Shapes follow from ``hyper``; names from ``arch``."""

    def __init__(self, arch: Arch, hyper: Hyper, source: SourceModel) -> None:
        self.arch, self.hyper = arch, hyper
        untied = f"{arch.source.head}.weight" in source or f"{arch.source.head}.q_weight" in source
        self.tied = hyper.tie_embeddings and not untied
        self._modules: list[ModuleSpec] = []

    def modules(self) -> tuple[ModuleSpec, ...]:
        a, h = self.arch, self.hyper
        table = Stored(f"{a.source.embed}.weight", (-1, h.hidden_size))
        embed = a.prefix + a.output.embed
        self._add("embedding", embed, None, plain=(PlainTensor("embedding", f"{embed}.weight", table),))
        if a.output.positions is not None:
            positions = a.prefix + a.output.positions
            table = Stored(f"{a.source.positions}.weight", (-1, h.hidden_size))
            self._add("positions", positions, None, plain=(PlainTensor("positions", f"{positions}.weight", table),))
        for layer in range(h.num_layers):
            self._layer(layer)
        self._add("norm", a.prefix + a.output.final_norm, None, plain=self._norm("norm", "final_norm"))
        head = a.source.embed if self.tied else a.source.head
        weight = Stored(f"{head}.weight", (h.vocab_size, h.hidden_size), transpose=True)
        key = a.prefix + a.output.head
        lm_head = LinearSpec("lm_head", key, h.hidden_size, h.vocab_size, "head", weight, normalize=h.normalize_head)
        self._add("head", key, None, (lm_head,))
        return tuple(self._modules)

    def _add(
        self,
        kind: ModuleKind,
        key: str,
        layer: int | None,
        linears: tuple[LinearSpec, ...] = (),
        plain: tuple[PlainTensor, ...] = (),
    ) -> None:
        self._modules.append(ModuleSpec(len(self._modules), kind, key, layer, linears, plain))

    def _layer(self, layer: int) -> None:
        a = self.arch
        key = f"{a.prefix}model.layers.{layer}"
        attention = self._attention(layer)
        norms = self._norm("norm", "attn_norm", layer)
        if a.parallel:
            plain = norms + self._head_norms(layer)
            self._add("parallel", key, layer, attention + self._mlp(layer, "qkv"), plain)
            return
        norms += self._norm("post_norm", "attn_post_norm", layer)
        self._add("attention", key, layer, attention, norms + self._head_norms(layer))
        norms = self._norm("norm", "mlp_norm", layer) + self._norm("post_norm", "mlp_post_norm", layer)
        if a.moe:
            self._add("moe", key, layer, self._experts(layer), norms + self._router(layer))
        else:
            self._add("mlp", key, layer, self._mlp(layer, "gate_up"), norms)

    def _names(self, name: str, layer: int | None = None, expert: int | None = None) -> tuple[str, str]:
        """(output name, source name) of a field of ``Names`` that the family has."""
        at = {"L": layer, "E": expert}
        output, source = (str(getattr(names, name)).format(**at) for names in (self.arch.output, self.arch.source))
        return self.arch.prefix + output, source

    def _norm(self, role: str, name: str, layer: int | None = None) -> tuple[PlainTensor, ...]:
        if getattr(self.arch.output, name) is None:
            return ()
        out, src = self._names(name, layer)
        shape = (self.hyper.hidden_size,)
        weight = PlainTensor(role, f"{out}.weight", Stored(f"{src}.weight", shape))
        if not self.arch.norm.bias:
            return (weight,)
        return (weight, PlainTensor(f"{role}.bias", f"{out}.bias", Stored(f"{src}.bias", shape)))

    def _head_norms(self, layer: int) -> tuple[PlainTensor, ...]:
        rule, h = self.arch.head_norm, self.hyper
        if rule is None or not h.qk_norm:
            return ()
        out = []
        for role, heads in (("q_norm", h.heads), ("k_norm", h.kv_heads)):
            name, src = self._names(role, layer)
            shape = (heads, h.head_dim) if rule.per_head else (h.head_dim,)
            stored = Stored(f"{src}.weight", shape)
            out.append(PlainTensor(role, f"{name}.weight", stored, 0 if rule.per_head else heads))
        return tuple(out)

    def _router(self, layer: int) -> tuple[PlainTensor, ...]:
        name, src = self._names("router", layer)
        stored = Stored(f"{src}.weight", (self.hyper.num_experts, self.hyper.hidden_size))
        return (PlainTensor("router", f"{name}.weight", stored),)

    def _linear(
        self,
        role: str,
        name: str,
        layer: int,
        shape: tuple[int, int],  # (in_features, out_features)
        group: str,
        bias: bool,
        rows: tuple[tuple[int, int], ...] = (),  # output features of the stored matrix; empty: all of them
        stored_out: int | None = None,  # output features of the stored matrix; None: out_features
    ) -> LinearSpec:
        out, src = self._names(name, layer)
        k, n = shape[0], stored_out or shape[1]
        if self.arch.linears_transposed:
            weight = Stored(f"{src}.weight", (k, n), axis=1, ranges=rows)
        else:
            weight = Stored(f"{src}.weight", (n, k), ranges=rows, transpose=True)
        bias_stored = Stored(f"{src}.bias", (n,), ranges=rows) if bias else None
        return LinearSpec(role, out, *shape, group, weight, bias_stored)

    def _attention(self, layer: int) -> tuple[LinearSpec, ...]:
        h = self.hyper
        widths = {"q": h.heads * h.head_dim, "k": h.kv_heads * h.head_dim, "v": h.kv_heads * h.head_dim}
        rows, total = self._qkv_rows(), None if self.arch.qkv == "split" else sum(widths.values())
        qkv = tuple(
            self._linear(f"{n}_proj", n, layer, (h.hidden_size, w), "qkv", h.bias_qkv, rows[n], total)
            for n, w in widths.items()
        )
        return (*qkv, self._linear("o_proj", "o", layer, (widths["q"], h.hidden_size), "o", h.bias_o))

    def _qkv_rows(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Rows of the stored query/key/value matrix that each projection has; empty: a matrix of its own."""
        h = self.hyper
        d, share = h.head_dim, h.heads // h.kv_heads
        if self.arch.qkv == "split":
            return {"q": (), "k": (), "v": ()}
        if self.arch.qkv == "fused":
            q, kv = h.heads * d, h.kv_heads * d
            return {"q": ((0, q),), "k": ((q, q + kv),), "v": ((q + kv, q + 2 * kv),)}
        starts = [g * (share + 2) * d for g in range(h.kv_heads)]  # of each key/value group
        q_rows = share * d
        return {
            "q": tuple((s, s + q_rows) for s in starts),
            "k": tuple((s + q_rows, s + q_rows + d) for s in starts),
            "v": tuple((s + q_rows + d, s + q_rows + 2 * d) for s in starts),
        }

    def _mlp(self, layer: int, group: str) -> tuple[LinearSpec, ...]:
        h = self.hyper
        wide, fused = h.intermediate_size, self.arch.gate_up_fused
        total = 2 * wide if fused else None
        shape = (h.hidden_size, wide)
        gate_rows, up_rows = (((0, wide),), ((wide, 2 * wide),)) if fused else ((), ())
        gate: tuple[LinearSpec, ...] = ()
        if self.arch.output.gate is not None:
            gate = (self._linear("gate_proj", "gate", layer, shape, group, h.bias_mlp, gate_rows, total),)
        up = self._linear("up_proj", "up", layer, shape, group, h.bias_mlp, up_rows, total)
        down = self._linear("down_proj", "down", layer, (wide, h.hidden_size), "down", h.bias_mlp)
        return (*gate, up, down)

    def _experts(self, layer: int) -> tuple[LinearSpec, ...]:
        """Experts one after another, each w1 (gate), w3 (up), w2 (down): the order in which they are stored."""
        out = []
        for e in range(self.hyper.num_experts):
            for role, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                out.append(self._expert_linear(role, name, layer, e))
        return tuple(out)

    def _expert_linear(self, role: str, name: str, layer: int, expert: int) -> LinearSpec:
        h = self.hyper
        out, src = self._names(name, layer, expert)
        wide = h.intermediate_size
        k, n = (wide, h.hidden_size) if role == "w2" else (h.hidden_size, wide)
        if self.arch.experts_fused:  # all experts in one (experts * wide, hidden) matrix, name without suffix
            rows = ((expert * wide, (expert + 1) * wide),)
            shape = (h.num_experts * wide, h.hidden_size)
            weight = Stored(src, shape, ranges=rows, transpose=role != "w2")
        else:
            weight = Stored(f"{src}.weight", (n, k), transpose=True)
        bias = Stored(f"{src}.bias", (n,)) if h.bias_mlp else None
        group = f"w2.{expert}" if role == "w2" else f"w13.{expert}"
        return LinearSpec(role, out, k, n, group, weight, bias, expert)
