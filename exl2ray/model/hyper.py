"""From config.json to numbers: ``Hyper`` holds every resolved hyper-parameter of a model (architectures sections 4, 5).

Values are looked up at the top level of the config, then in ``text_config``, then in the family's defaults; JSON null
counts as absent, except that a null hides a family default (a Gemma 2 config with a null softcap has no softcap).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exl2ray.errors import SourceError
from exl2ray.formats.hfconfig import legacy_config
from exl2ray.model.rope import Rope, resolve_rope, scaling_kind
from exl2ray.model.rules import Arch

MAX_LENGTH_KEYS = (
    "max_sequence_length",
    "model_max_length",
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
)
_REQUIRED = object()


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


class ConfigReader:
    """Typed look-up in config.json with the rules of this module's docstring. Keys may be dotted."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        self.levels = [config, text] if isinstance(text, Mapping) else [config]
        self.defaults = defaults

    def raw(self, *keys: str) -> Any:
        """First value that is not null, or None."""
        hidden = set()
        for level in self.levels:
            for key in keys:
                value, present = _dotted(level, key)
                if value is not None:
                    return value
                if present:
                    hidden.add(key)
        return next((self.defaults[k] for k in keys if k in self.defaults and k not in hidden), None)

    def integer(self, *keys: str, default: Any = _REQUIRED) -> Any:
        value = self._found(keys, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
            raise SourceError(f"config.json: {keys[0]} is {value!r}; an integer is needed")
        return int(value)

    def positive(self, *keys: str, default: Any = _REQUIRED) -> Any:
        value = self.integer(*keys, default=default)
        if value is not default and not 0 < value < 1 << 31:
            raise SourceError(f"config.json: {keys[0]} is {value}; a positive integer is needed")
        return value

    def number(self, *keys: str, default: Any = _REQUIRED) -> Any:
        value = self._found(keys, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SourceError(f"config.json: {keys[0]} is {value!r}; a finite number is needed")
        return float(value)

    def flag(self, *keys: str) -> bool:
        value = self.raw(*keys)
        if value is not None and not isinstance(value, bool):
            raise SourceError(f"config.json: {keys[0]} is {value!r}; true or false is needed")
        return bool(value)

    def _found(self, keys: tuple[str, ...], default: Any) -> Any:
        value = self.raw(*keys)
        if value is None:
            if default is _REQUIRED:
                raise SourceError(f"config.json: {' / '.join(keys)} is missing", "the config does not fit the weights")
            return default
        return value


def _dotted(level: Mapping[str, Any], key: str) -> tuple[Any, bool]:
    """(value, whether the key is present) of a possibly dotted key."""
    value: Any = level
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None, False
        value = value[part]
    return value, True


def resolve_hyper(
    arch: Arch, config: Mapping[str, Any], rope_scale: float | None = None, rope_alpha: float | None = None
) -> Hyper:
    """All hyper-parameters of a model of family ``arch``.

    rope_scale, rope_alpha: user overrides, see ``resolve_rope``. Raises SourceError naming the key.
    """
    c = ConfigReader(legacy_config(config), dict(arch.defaults))
    _check_fixed(arch, c)
    layers = c.positive("num_hidden_layers", "n_layers", "n_layer")
    hidden = c.positive("hidden_size", "d_model", "n_embd")
    head_dim = c.positive("head_dim", default=None)
    heads = c.positive("num_attention_heads", "n_heads", "n_head", default=head_dim and hidden // head_dim)
    if heads is None:
        raise SourceError("config.json: num_attention_heads is missing")
    head_dim = head_dim or hidden // heads
    kv_heads = 1 if arch.single_kv_head else c.positive("num_key_value_heads", "attn_config.kv_n_heads", default=heads)
    if heads % kv_heads:
        raise SourceError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
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
        attention_softcap=c.number("attn_logit_softcapping", default=0.0) or None,
        qkv_clip=c.number(arch.qkv_clip_key, default=None) if arch.qkv_clip_key else None,
        embedding_scale=c.number("scale_emb", "embedding_multiplier", default=1.0)
        * (math.sqrt(hidden) if arch.sqrt_hidden_embedding else 1.0),
        residual_scale=_residual_scale(c, layers),
        logit_scale=_logit_scale(arch, c, hidden),
        logit_softcap=c.number("final_logit_softcapping", default=0.0) or None,
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


def _check_fixed(arch: Arch, c: ConfigReader) -> None:
    for rule in arch.fixed:
        value = c.raw(rule.key)
        value = rule.absent if value is None else value
        if value is not None and value not in rule.allowed:
            raise SourceError(
                f"config.json: {rule.key} is {value!r}, but {rule.otherwise}",
                f"a {arch.name} of this kind cannot run as EXL2",
            )
    given = c.raw("hidden_act", "hidden_activation", "activation_function")
    if given is not None and not _activation_fits(arch, str(given)):
        raise SourceError(
            f"config.json: the activation is {given!r}, but the loader runs every {arch.name} with {arch.activation}",
            "the converted model would be a different one",
        )


def _activation_fits(arch: Arch, given: str) -> bool:
    if arch.activation == "silu":
        return given in ("silu", "swish")
    # Published Gemma configs say "gelu" and mean the tanh form; the two differ by less than 1e-3.
    return given.startswith("gelu")


def _eps(arch: Arch, c: ConfigReader) -> float:
    if arch.norm.eps is None:
        return float(c.number(*arch.norm.eps_keys))
    return float(c.number(*arch.norm.eps_keys, default=arch.norm.eps) if arch.norm.eps_keys else arch.norm.eps)


def _intermediate(arch: Arch, c: ConfigReader, hidden: int) -> int:
    keys = ("intermediate_size", "ffn_config.ffn_hidden_size", "n_inner")
    if arch.moe and c.raw("moe_intermediate_size") is not None:
        return int(c.positive("moe_intermediate_size"))
    # The GPT-2 line leaves n_inner null for four times the hidden size.
    return int(c.positive(*keys, default=4 * hidden) if arch.rope == "none" else c.positive(*keys))


def _experts(arch: Arch, c: ConfigReader) -> tuple[int, int]:
    if not arch.moe:
        return 0, 0
    experts = c.positive("num_local_experts", "ffn_config.moe_num_experts", "num_experts")
    per_token = c.positive("num_experts_per_tok", "ffn_config.moe_top_k")
    if per_token > experts:
        raise SourceError(f"config.json: {per_token} experts per token, but only {experts} experts")
    return experts, per_token


def _attention_scale(c: ConfigReader, head_dim: int) -> float:
    multiplier = c.number("attention_multiplier", default=0.0)
    if multiplier:
        return float(multiplier)
    scalar = c.number("query_pre_attn_scalar", default=0.0)
    return float((scalar or head_dim) ** -0.5)


def _residual_scale(c: ConfigReader, layers: int) -> float:
    multiplier = c.number("residual_multiplier", default=0.0)
    if multiplier:
        return float(multiplier)
    depth = c.number("scale_depth", default=0.0)
    return float(depth / math.sqrt(layers)) if depth else 1.0


def _logit_scale(arch: Arch, c: ConfigReader, hidden: int) -> float:
    scaling = c.number("logits_scaling", default=0.0)
    if scaling:
        return float(1.0 / scaling)
    scale = float(c.number("logit_scale", default=1.0))
    if arch.scaled_by_model_base:
        scale *= c.positive("dim_model_base", default=hidden) / hidden
    return scale


def _windows(arch: Arch, c: ConfigReader, layers: int) -> tuple[tuple[bool, ...], int | None]:
    """(which layers slide, window or None). ``layer_types`` of newer configs decides where present."""
    rule = arch.window
    width = c.integer("sliding_window", "sliding_window_size", default=0)
    if rule is None:
        return (False,) * layers, None
    types = c.raw("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise SourceError(f"config.json: layer_types does not have one entry for each of the {layers} layers")
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
    partial = c.number("partial_rotary_factor", default=1.0)
    scaling = c.raw("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise SourceError(f"config.json: rope_scaling is {scaling!r}; an object is needed")
    scaling = dict(scaling or {})
    original = c.raw("original_max_position_embeddings")
    if original is not None:
        scaling.setdefault("original_max_position_embeddings", original)
    rope = resolve_rope(arch.rope, head_dim, theta, scaling, max_seq_len, partial, scale, alpha)
    local = None
    if arch.local_rope_theta is not None:
        local = resolve_rope(arch.rope, head_dim, arch.local_rope_theta, None, max_seq_len, partial)
    return rope, local, scaling_kind(scaling)
