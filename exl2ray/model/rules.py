"""The vocabulary of the architecture table: one ``Arch`` describes one model family.

The defaults are Llama's. Code that computes reads these fields and never an architecture's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh", "gelu"]
RopeStyle = Literal["neox", "gptj", "none"]


@dataclass(frozen=True)
class Names:
    """Module names; ``{L}`` is the layer, ``{E}`` the expert. None: the family has no such module."""

    embed: str = "model.embed_tokens"
    positions: str | None = None
    attn_norm: str = "model.layers.{L}.input_layernorm"
    attn_post_norm: str | None = None
    mlp_norm: str | None = "model.layers.{L}.post_attention_layernorm"  # None: parallel block, one norm for both
    mlp_post_norm: str | None = None
    q: str = "model.layers.{L}.self_attn.q_proj"
    k: str = "model.layers.{L}.self_attn.k_proj"
    v: str = "model.layers.{L}.self_attn.v_proj"
    o: str = "model.layers.{L}.self_attn.o_proj"
    q_norm: str = "model.layers.{L}.self_attn.q_norm"
    k_norm: str = "model.layers.{L}.self_attn.k_norm"
    router: str | None = None
    gate: str | None = "model.layers.{L}.mlp.gate_proj"  # None: plain MLP, down(act(up(x)))
    up: str = "model.layers.{L}.mlp.up_proj"
    down: str = "model.layers.{L}.mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class NormRule:
    """All norms of a model except the q/k norms. ``offset`` is added to the stored weight (Gemma stores weight - 1)."""

    kind: NormKind = "rms"
    eps_keys: tuple[str, ...] = ("rms_norm_eps",)  # config keys, first present wins
    eps: float | None = None  # used when no key is present
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class HeadNormRule:
    """q/k norm over head_dim. ``per_head``: weight (heads, head_dim) instead of (head_dim,)."""

    kind: NormKind
    offset: float = 0.0
    per_head: bool = False
    always: bool = True  # False: only if the config says use_qk_norm


@dataclass(frozen=True)
class WindowRule:
    """Which layers slide when the config gives a window.

    "all": every layer. "qwen": layers from max_window_layers on, if use_sliding_window. "pattern": all but every p-th
    layer for p > 1, the even ones for p <= 1; p is the config's sliding_window_pattern, else ``pattern``. Where the config
    has layer_types these decide in place of "qwen" and "pattern", but not in the loader of a family that does not read them.
    """

    kind: Literal["all", "qwen", "pattern"]
    pattern: int = 1
    switch: str = ""  # a key of the config that has to be true; "qwen" has its own
    reads_layer_types: bool = True  # whether the loader does


@dataclass(frozen=True)
class Fixed:
    """A config key whose value the loader assumes; ``key`` may be dotted. A config that says otherwise is refused."""

    key: str
    allowed: tuple[Any, ...]
    otherwise: str  # what would go wrong
    absent: Any = None  # value of an absent key; None: absent is fine


@dataclass(frozen=True)
class Arch:
    """One model family. See the field comments; sections are those of architectures.md."""

    name: str  # the string in config.json: architectures
    loads_as: str = ""  # that string in the output, where the loader has another one for the same model; empty: ``name``
    output: Names = field(default_factory=Names)  # names in the quantised model, before ``prefix``
    source: Names = field(default_factory=Names)  # names in the checkpoint, before a source layout
    prefix: str = ""  # text prefix of the output names
    # Ways a checkpoint may store the names: pairs (start of the name in ``source``, what stands there), first match
    # applies; the layout whose embedding exists is taken. Empty: output prefix + name.
    source_layouts: tuple[tuple[tuple[str, str], ...], ...] = ()
    # Tensors copied byte for byte: (start of the source name, start of the output name), first match applies.
    copied: tuple[tuple[str, str], ...] = ()
    vision_model: str | None = None  # required vision_config.model_type
    text_models: tuple[str, ...] = ()  # what text_config.model_type may be; empty: anything
    # Fused and transposed tensors
    qkv: Literal["split", "fused", "interleaved"] = "split"
    gate_up_fused: bool = False
    experts_fused: bool = False
    linears_transposed: bool = False  # linear weights stored (in, out)
    # Numerics
    norm: NormRule = field(default_factory=NormRule)
    head_norm: HeadNormRule | None = None
    activation: Activation = "silu"
    bias_qkv: bool = False
    bias_o: bool = False
    bias_mlp: bool = False
    attention_bias_o: bool = True  # whether attention_bias in the config covers o_proj
    single_kv_head: bool = False
    mlp_factor: int | None = None  # MLP width over hidden size when the config does not give it
    rope: RopeStyle = "neox"
    local_rope_theta: float | None = None  # RoPE base of sliding layers
    rope_on: Literal["all", "sliding"] = "all"
    window: WindowRule | None = None
    sqrt_hidden_embedding: bool = False
    float32_states: bool = False  # residual stream in float32
    scaled_by_model_base: bool = False  # logits times dim_model_base / hidden_size
    qkv_clip_key: str | None = None  # config key of a clamp on q, k, v
    tied: bool = False  # head falls back to the embedding whatever the config says
    # Config keys of factors and caps that the family's own class applies. The loader applies those of all families to each.
    factors: tuple[str, ...] = ()
    # Calibration
    noise_rows: tuple[int, int] | None = None  # extra rows (measurement, quantisation)
    needs_bos: bool = False
    # Configuration
    defaults: tuple[tuple[str, Any], ...] = ()  # the family's defaults for absent config keys
    fixed: tuple[Fixed, ...] = ()
    loader_differences: tuple[str, ...] = ()

    @property
    def parallel(self) -> bool:
        return self.output.mlp_norm is None

    @property
    def moe(self) -> bool:
        return self.output.router is not None

    def norm_offset(self, role: str) -> float:
        """What the norm of this role adds to its weights; 0 for one that the family does not have."""
        rule = self.head_norm if role in ("q_norm", "k_norm") else self.norm
        return 0.0 if rule is None else rule.offset
