"""From a source model to a ``ModelSpec``: recognise the family, resolve the numbers, list the modules.

Everything is decided and checked here against the headers of the source, before a single weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exl2ray.errors import SourceError, UnknownArchitectureError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.hyper import Hyper, resolve_hyper
from exl2ray.model.rules import Arch, Names
from exl2ray.model.spec import (
    CopiedTensor,
    LinearSpec,
    ModelSpec,
    ModuleKind,
    ModuleSpec,
    PlainTensor,
    Stored,
)
from exl2ray.model.table import ARCHITECTURES

__all__ = ["CopiedTensor", "LinearSpec", "ModelSpec", "ModuleSpec", "PlainTensor", "Stored", "find_arch", "load_spec"]

MAX_IN_FEATURES = 65536  # the loader keeps row permutations in 16 bits
# Buffers that checkpoints carry and nobody reads; not worth a warning.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def find_arch(config: Mapping[str, Any]) -> Arch:
    """Table entry of a config; UnknownArchitectureError lists the known ones."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise SourceError(f"config.json: architectures is {names!r}; exactly one entry is needed")
    arch = ARCHITECTURES.get(names[0]) if isinstance(names[0], str) else None
    if arch is None:
        raise UnknownArchitectureError(
            f"config.json: architecture {names[0]!r} is not supported", "supported: " + ", ".join(sorted(ARCHITECTURES))
        )
    vision = config.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, Mapping) else None
    if arch.vision_model is not None and kind != arch.vision_model:
        raise UnknownArchitectureError(
            f"config.json: {arch.name} with vision_config.model_type {kind!r}",
            f"ExLlamaV2 loads {arch.name} only with {arch.vision_model!r}",
        )
    return arch


def load_spec(source: SourceModel, rope_scale: float | None = None, rope_alpha: float | None = None) -> ModelSpec:
    """Describe the model in ``source``.

    rope_scale: linear RoPE factor, rope_alpha: NTK alpha; both replace what the config says and hold for calibration
    only (the loader is told again by its user).

    An EXL2 directory is described as well: its unquantised tensors are read as usual, its linears are those of
    ``Exl2Model`` (see ``load_block``), and a normalised head is not normalised again.

    Raises UnknownArchitectureError, or SourceError naming config key or tensor.
    """
    arch = find_arch(source.config)
    hyper = resolve_hyper(arch, source.config, rope_scale, rope_alpha)
    converted = is_exl2(source.config)
    if converted:
        hyper = replace(hyper, normalize_head=False)
    builder = _Builder(_as_converted(arch) if converted else _as_stored(arch, source), hyper, source)
    modules = builder.modules()
    copied = _copied(arch, source)
    _check_source(modules, source, with_linears=not converted)
    used = {s.name for m in modules for s in _stored(m)} | {c.source_name for c in copied}
    unused = () if converted else tuple(n for n in source.names() if n not in used)
    return ModelSpec(arch, hyper, modules, copied, builder.tied, _warnings(arch, hyper, unused), unused)


def is_exl2(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its model is an EXL2 one."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "exl2"


def _as_converted(arch: Arch) -> Arch:
    """``arch`` as its EXL2 form is stored: output names, nothing fused, q/k norm weights once per head."""
    return replace(
        arch,
        source=Names(**{k: v and arch.prefix + v for k, v in vars(arch.output).items()}),
        qkv="split",
        gate_up_fused=False,
        experts_fused=False,
        linears_transposed=False,
        head_norm=arch.head_norm and replace(arch.head_norm, per_head=True),
    )


def _as_stored(arch: Arch, source: SourceModel) -> Arch:
    """``arch`` with the source names as this checkpoint spells them: its layout, and SwiGLU-fused Llama files (5.5)."""
    layouts = arch.source_layouts or ((("", arch.prefix),),)
    tried = []
    for layout in layouts:
        names = Names(**{k: v and _relocated(v, layout) for k, v in vars(arch.source).items()})
        tried.append(f"{names.embed}.weight")
        if tried[-1] in source:
            break
    else:
        raise SourceError(
            f"{source.path}: no tensor {' or '.join(tried)}",
            f"the weights are not those of a {arch.name}; check architectures in config.json",
        )
    w12, down = "model.layers.0.mlp.swiglu.w12.weight", "model.layers.0.mlp.down_proj.weight"
    if not arch.moe and w12 in source and down not in source:
        fused = "model.layers.{L}.mlp.swiglu.w12"
        names = replace(names, gate=fused, up=fused, down="model.layers.{L}.mlp.swiglu.w3")
        arch = replace(arch, gate_up_fused=True)
    return replace(arch, source=names)


def _relocated(name: str, layout: tuple[tuple[str, str], ...]) -> str:
    for start, actual in layout:
        if name.startswith(start):
            return actual + name[len(start) :]
    return name


class _Builder:
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
        lm_head = LinearSpec(
            "lm_head", key, h.hidden_size, h.vocab_size, "head", weight, normalize=h.normalize_head
        )
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
        """Rows of the stored query/key/value matrix that each projection has (5.2); empty: a matrix of its own."""
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
        if self.arch.experts_fused:  # all experts in one (experts * wide, hidden) matrix, name without suffix (5.4)
            rows = ((expert * wide, (expert + 1) * wide),)
            shape = (h.num_experts * wide, h.hidden_size)
            weight = Stored(src, shape, ranges=rows, transpose=role != "w2")
        else:
            weight = Stored(f"{src}.weight", (n, k), transpose=True)
        bias = Stored(f"{src}.bias", (n,)) if h.bias_mlp else None
        group = f"w2.{expert}" if role == "w2" else f"w13.{expert}"
        return LinearSpec(role, out, k, n, group, weight, bias, expert)


def _copied(arch: Arch, source: SourceModel) -> tuple[CopiedTensor, ...]:
    out = []
    for name in source.names():
        for start, new in arch.copied:
            if name.startswith(start):
                out.append(CopiedTensor(new + name[len(start) :], name))
                break
    return tuple(out)


def _stored(module: ModuleSpec) -> list[Stored]:
    linears = [s for x in module.linears for s in (x.weight, x.bias) if s is not None]
    return linears + [p.stored for p in module.plain]


def _check_source(modules: tuple[ModuleSpec, ...], source: SourceModel, with_linears: bool) -> None:
    """Every tensor is there with its shape, and every linear has a size that the format can hold."""
    problems = []
    for module in modules:
        for s in _stored(module) if with_linears else [p.stored for p in module.plain]:
            if s.name not in source:
                problems.append(f"{s.name} is missing")
            elif not shape_fits(source.shape(s.name), s.shape):
                problems.append(f"{s.name} has shape {source.shape(s.name)}, expected {s.shape}")
        for x in module.linears:
            if x.in_features % 32 or x.in_features > MAX_IN_FEATURES:
                problems.append(f"{x.key} has {x.in_features} input features; EXL2 needs a multiple of 32 up to 65536")
            if x.out_features % 32 and module.kind != "head":
                problems.append(f"{x.key} has {x.out_features} output features; EXL2 needs a multiple of 32")
    if problems:
        problems = list(dict.fromkeys(problems))
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SourceError(
            f"{source.path}: {'; '.join(problems[:5])}{more}", "the weights do not fit config.json, or are incomplete"
        )


def shape_fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stored shape is the wanted one; -1 in ``wanted`` fits any size."""
    return len(found) == len(wanted) and all(w in (-1, f) for f, w in zip(found, wanted, strict=True))


def _warnings(arch: Arch, hyper: Hyper, unused: tuple[str, ...]) -> tuple[str, ...]:
    """The loader's differences that matter for this config, and dropped tensors."""
    out = []
    for text in arch.loader_differences:
        topic = text.split(":")[0]
        windowed = hyper.window is not None and any(hyper.sliding)
        applies = {
            "sliding window": windowed,
            "longrope": hyper.rope_kind in ("su", "longrope"),
            "clip_qkv": hyper.qkv_clip is not None,
            "residual multiplier": hyper.residual_scale != 1 and (hyper.bias_o or hyper.bias_mlp),
            "q/k norm": hyper.qk_norm,
        }
        if applies.get(topic, True):
            out.append(text)
    if hyper.rope_kind == "yarn":
        out.append(
            "yarn: the loader computes the correction range from the configured context length and ignores "
            "attention_factor, beta_fast and beta_slow; calibration does as the loader"
        )
    dropped = [n for n in unused if not n.endswith(BUFFERS)]
    if dropped:
        out.append(f"{len(dropped)} tensors of the source have no place in the output, e.g. {dropped[0]}")
    return tuple(out)
