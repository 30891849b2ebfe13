"""From config.json to numbers: ``Hyper`` holds every hyper-parameter of a model, resolved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exl2ray.errors import SourceError
from exl2ray.formats.hfconfig import legacy_config
from exl2ray.model.class_defaults import MODEL_TYPES, defaults_of
from exl2ray.model.config_reader import (
    EXPERTS_KEYS,
    HEADS_KEYS,
    HIDDEN_KEYS,
    HINT,
    KV_HEADS_KEYS,
    LAYER_KEYS,
    MAX_LENGTH_KEYS,
    MLP_KEYS,
    REQUIRED,
    ConfigReader,
)
from exl2ray.model.counts import MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS
from exl2ray.model.rope import Rope, resolve_rope, scaling_kind
from exl2ray.model.rules import Arch, Fixed
from exl2ray.wording import shown

TINY = 1e-6  # multipliers and caps below this, 1 / 1e9 included, make everything zero in float16
DTYPES = ("bfloat16", "double", "float", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "half")
DTYPES_ELSEWHERE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MAX_EPS = 0.1  # published models have 1e-12 to 1e-5


COUNT_KEYS = (
    *LAYER_KEYS, *HIDDEN_KEYS, *HEADS_KEYS, *KV_HEADS_KEYS, *EXPERTS_KEYS, *MLP_KEYS, *MAX_LENGTH_KEYS, "head_dim",
    "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Hyper:
    """Resolved hyper-parameters. Multipliers are factors (1.0: none), softcaps None when absent."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int  # per expert in a mixture of experts
    num_experts: int  # 0: dense
    experts_per_token: int
    norm_eps: float
    max_seq_len: int
    qk_norm: bool
    bias_qkv: bool
    bias_o: bool
    bias_mlp: bool
    attention_scale: float
    attention_softcap: float | None
    qkv_clip: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float | None
    normalize_head: bool
    tie_embeddings: bool
    rope: Rope | None
    local_rope: Rope | None  # of sliding layers; None: the same as ``rope``
    rope_kind: str
    sliding: tuple[bool, ...]  # per layer
    window: int | None  # keys visible to a query of a sliding layer, itself included
    rope_on_full_layers: bool
    bos_token_id: int | None
    state_dtype: str  # "float16" | "float32": dtype of the residual stream

    def layer_rope(self, layer: int) -> Rope | None:
        if self.sliding[layer]:
            return self.local_rope or self.rope
        return self.rope if self.rope_on_full_layers else None

    def layer_window(self, layer: int) -> int | None:
        return self.window if self.sliding[layer] else None


def resolve_hyper(
    arch: Arch, config: Mapping[str, Any], rope_scale: float | None = None, rope_alpha: float | None = None
) -> Hyper:
    """All hyper-parameters of a model of family ``arch``.

    rope_scale, rope_alpha: user overrides, see ``resolve_rope``. Raises SourceError naming the key.
    """
    config = legacy_config(config)
    c = ConfigReader(config, defaults_of(arch, config))
    _check_fixed(arch, c)
    layers = c.positive(*LAYER_KEYS, most=MAX_LAYERS)
    hidden = c.positive(*HIDDEN_KEYS)
    head_dim = c.positive("head_dim", default=None, most=MAX_HEAD_DIM)
    heads = c.positive(*HEADS_KEYS, default=head_dim and hidden // head_dim, most=MAX_HEADS)
    if heads is None:
        raise SourceError("config.json: num_attention_heads is missing", HINT)
    head_dim = head_dim or hidden // heads if heads else 0
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise SourceError(f"config.json: {heads} attention heads cannot share a hidden size of {hidden}", HINT)
    kv_heads = 1 if arch.single_kv_head else c.positive(*KV_HEADS_KEYS, default=heads, most=MAX_HEADS)
    if heads % kv_heads:
        raise SourceError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly", HINT)
    max_seq_len = c.positive(*MAX_LENGTH_KEYS, default=2048)
    sliding, window = _windows(arch, c, layers)
    rope, local_rope, kind = _ropes(arch, c, head_dim, max_seq_len, rope_scale, rope_alpha)
    attention_bias = c.flag("attention_bias") and not (arch.bias_qkv or arch.bias_o)
    experts, per_token = _experts(arch, c)
    return Hyper(
        vocab_size=c.positive("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_intermediate(arch, c, hidden),
        num_experts=experts,
        experts_per_token=per_token,
        norm_eps=_eps(arch, c),
        max_seq_len=max_seq_len,
        qk_norm=arch.head_norm is not None and (arch.head_norm.always or c.flag("use_qk_norm")),
        bias_qkv=arch.bias_qkv or attention_bias,
        bias_o=arch.bias_o or (attention_bias and arch.attention_bias_o),
        bias_mlp=arch.bias_mlp or c.flag("mlp_bias"),
        attention_scale=_attention_scale(c, head_dim),
        attention_softcap=c.number("attn_logit_softcapping", default=0.0, least=TINY) or None,
        qkv_clip=c.number(arch.qkv_clip_key, default=None, least=TINY) if arch.qkv_clip_key else None,
        embedding_scale=c.number("scale_emb", "embedding_multiplier", default=1.0, least=TINY)
        * (math.sqrt(hidden) if arch.sqrt_hidden_embedding else 1.0),
        residual_scale=_residual_scale(c, layers),
        logit_scale=_logit_scale(arch, c, hidden),
        logit_softcap=c.number("final_logit_softcapping", default=0.0, least=TINY) or None,
        normalize_head=bool(c.integer("norm_head", default=0)),
        tie_embeddings=arch.tied or c.flag("tie_word_embeddings"),
        rope=rope,
        local_rope=local_rope,
        rope_kind=kind,
        sliding=sliding,
        window=window,
        rope_on_full_layers=arch.rope_on == "all",
        bos_token_id=c.integer("bos_token_id", default=None),
        state_dtype="float32" if arch.float32_states else "float16",
    )


def loader_config(arch: Arch, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` such that ExLlamaV2 reads the model that ``resolve_hyper`` describes.

    The architecture by the loader's name for it, the old spellings (``legacy_config``), and every default of the family
    that the config leaves out, because the loader has other defaults or none. What transformers does not load a model with
    is put right: no ``model_type``, a padding token without an embedding row, counts as 2.0. Meant for the output's
    config.json. Raises SourceError.
    """
    out = legacy_config(config)
    if arch.loads_as:
        out["architectures"] = [arch.loads_as]
    if not isinstance(out.get("model_type"), str):
        out["model_type"] = MODEL_TYPES[arch.name]
    defaults = defaults_of(arch, out)
    c = ConfigReader(out, {})
    hidden = ConfigReader(out, defaults).positive(*HIDDEN_KEYS)
    if arch.norm.eps is not None and arch.norm.eps_keys and c.raw(*arch.norm.eps_keys) is None:
        defaults[arch.norm.eps_keys[0]] = arch.norm.eps
    if arch.mlp_factor is not None and c.raw("intermediate_size", "n_inner") is None:
        defaults["n_inner"] = arch.mlp_factor * hidden
    for key, value in defaults.items():
        if c.raw(key) is None and not c.has(key):
            group, _, inner = key.rpartition(".")
            if group:
                out[group] = {**(out.get(group) or {}), inner: value}
            else:
                out[key] = value
    rows = ConfigReader(out, {}).positive("vocab_size")
    for part in ("text_config", "vision_config"):
        if isinstance(out.get(part), Mapping):
            out[part] = _known_dtype(out[part])
    out = _known_dtype(out)
    for level in (v for v in (out, out.get("text_config")) if isinstance(v, dict)):
        if type(pad := level.get("pad_token_id")) is int and pad >= rows:
            level["pad_token_id"] = None
        level.update({k: int(v) for k in COUNT_KEYS if type(v := level.get(k)) is float})
    return out


def _known_dtype(level: Mapping[str, Any]) -> dict[str, Any]:
    """``level`` with dtypes by the names that torch has, as transformers looks them up; without what is the name of none."""
    out = dict(level)
    for key in ("dtype", "torch_dtype"):
        if isinstance(name := out.get(key), str) and name not in DTYPES:
            plain = name.lower().removeprefix("torch.")
            out[key] = DTYPES_ELSEWHERE.get(plain, plain)
            if out[key] not in DTYPES:
                del out[key]
    return out


CAUSAL = Fixed("is_causal", (True,), "the loader's attention is causal; models that look ahead make embeddings, not text")


def _check_fixed(arch: Arch, c: ConfigReader) -> None:
    for rule in (CAUSAL, *arch.fixed):
        value = c.raw(rule.key)
        value = rule.absent if value is None else value
        if value is not None and value not in rule.allowed:
            raise SourceError(
                f"config.json: {rule.key} is {shown(value)}, but {rule.otherwise}",
                f"a {arch.name} of this kind cannot run as EXL2",
            )
    given = c.raw("hidden_act", "hidden_activation", "activation_function")
    if given is not None and not _activation_fits(arch, str(given)):
        raise SourceError(
            f"config.json: the activation is {shown(given)}, but the loader runs every {arch.name} with {arch.activation}",
            "the converted model would be a different one",
        )


def _activation_fits(arch: Arch, given: str) -> bool:
    if arch.activation == "silu":
        return given in ("silu", "swish")
    # Published Gemma configs say "gelu" and mean the tanh form; the two differ by less than 1e-3.
    return given.startswith("gelu")


def _eps(arch: Arch, c: ConfigReader) -> float:
    if not arch.norm.eps_keys:
        return float(arch.norm.eps or 0.0)
    default = REQUIRED if arch.norm.eps is None else arch.norm.eps
    return float(c.number(*arch.norm.eps_keys, default=default, least=0.0, most=MAX_EPS))


def _intermediate(arch: Arch, c: ConfigReader, hidden: int) -> int:
    if arch.moe and c.raw("moe_intermediate_size") is not None:
        return int(c.positive("moe_intermediate_size"))
    default = REQUIRED if arch.mlp_factor is None else arch.mlp_factor * hidden
    return int(c.positive(*MLP_KEYS, default=default))


def _experts(arch: Arch, c: ConfigReader) -> tuple[int, int]:
    if not arch.moe:
        return 0, 0
    experts = c.positive(*EXPERTS_KEYS, most=MAX_EXPERTS)
    per_token = c.positive("num_experts_per_tok", "ffn_config.moe_top_k")
    if per_token > experts:
        raise SourceError(f"config.json: {per_token} experts per token, but only {experts} experts", HINT)
    return experts, per_token


def _attention_scale(c: ConfigReader, head_dim: int) -> float:
    multiplier = c.number("attention_multiplier", default=0.0, least=TINY)
    if multiplier:
        return float(multiplier)
    scalar = c.number("query_pre_attn_scalar", default=0.0, least=TINY)
    return float((scalar or head_dim) ** -0.5)


def _residual_scale(c: ConfigReader, layers: int) -> float:
    multiplier = c.number("residual_multiplier", default=0.0, least=TINY)
    if multiplier:
        return float(multiplier)
    depth = c.number("scale_depth", default=0.0, least=TINY)
    return float(depth / math.sqrt(layers)) if depth else 1.0


def _logit_scale(arch: Arch, c: ConfigReader, hidden: int) -> float:
    scaling = c.number("logits_scaling", default=0.0, least=TINY)
    if scaling:
        return float(1.0 / scaling)
    scale = float(c.number("logit_scale", default=1.0, least=TINY))
    if arch.scaled_by_model_base:
        scale *= c.positive("dim_model_base", default=hidden) / hidden
    return scale


def _windows(arch: Arch, c: ConfigReader, layers: int) -> tuple[tuple[bool, ...], int | None]:
    """(which layers slide, window or None). ``layer_types`` of newer configs decides where present, but where all slide: such
    classes do not look at it."""
    rule = arch.window
    width = c.integer("sliding_window", "sliding_window_size", default=0)
    if rule is None or (rule.switch and not c.flag(rule.switch)):
        return (False,) * layers, None
    types = c.raw("layer_types")
    if types is not None and rule.kind != "all":
        if not isinstance(types, list) or len(types) != layers:
            text = f"config.json: layer_types does not have one entry for each of the {layers} layers"
            raise SourceError(text, "leave it out, or give it as many entries as the model has layers")
        sliding = tuple(t == "sliding_attention" for t in types)
    elif rule.kind == "all":
        sliding = (True,) * layers
    elif rule.kind == "qwen":
        first = c.integer("max_window_layers", default=layers) if c.flag("use_sliding_window") else layers
        sliding = tuple(i >= first for i in range(layers))
    else:
        p = c.integer("sliding_window_pattern", default=rule.pattern)
        sliding = tuple((i + 1) % p != 0 if p > 1 else i % 2 == 0 for i in range(layers))
    return sliding, width if width > 0 else None


def _ropes(
    arch: Arch, c: ConfigReader, head_dim: int, max_seq_len: int, scale: float | None, alpha: float | None
) -> tuple[Rope | None, Rope | None, str]:
    """(RoPE, RoPE of sliding layers if it differs, kind of scaling)."""
    if arch.rope == "none":
        return None, None, "none"
    theta = c.number("rope_theta", "attn_config.rope_theta", default=10000.0)
    partial = c.number("partial_rotary_factor", default=1.0, least=TINY, most=1.0)
    scaling = c.raw("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise SourceError(f"config.json: rope_scaling is {shown(scaling)}; an object is needed", HINT)
    scaling = dict(scaling or {})
    original = c.raw("original_max_position_embeddings")
    if original is not None:
        scaling.setdefault("original_max_position_embeddings", original)
    rope = resolve_rope(arch.rope, head_dim, theta, scaling, max_seq_len, partial, scale, alpha)
    local = None
    if arch.local_rope_theta is not None:
        local = resolve_rope(arch.rope, head_dim, arch.local_rope_theta, None, max_seq_len, partial)
    return rope, local, scaling_kind(scaling)
