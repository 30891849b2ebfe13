"""Where a model runs as EXL2 in another way than its class in transformers, or than config.json says: warnings.

Nothing here changes what is converted. What would be another model altogether is refused where it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from exl2ray.errors import SourceError
from exl2ray.formats.hfconfig import config_value, legacy_config, levels, text_model
from exl2ray.formats.json_file import as_number
from exl2ray.formats.source.architecture_name import BY_MODEL_TYPE
from exl2ray.model.checkpoint_names import Layers
from exl2ray.model.class_defaults import defaults_of
from exl2ray.model.hyper import Hyper, resolve_hyper
from exl2ray.model.rules import Arch
from exl2ray.model.table import ARCHITECTURES
from exl2ray.wording import shown, some

# Buffers that checkpoints carry and nobody reads; not worth a warning.
BUFFERS = (
    ".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".attn.bias", ".attn.masked_bias",
    ".self_attn.masked_bias", "position_ids", "freqs_cis", "num_batches_tracked",
)  # fmt: skip
_LONGROPE = (
    "longrope: the loader picks long or short factors by the configured context length, not by the length of the "
    "sequence; calibration does as the loader"
)
ROPE_DIFFERENCES = {
    "longrope": _LONGROPE,
    "su": _LONGROPE,
    "dynamic": "dynamic: RoPE of rows of more than {longest} tokens is scaled by transformers, and not by the loader, nor in "
    "calibration",
    "yarn": "yarn: the loader computes the correction range from the configured context length and ignores "
    "attention_factor, mscale, beta_fast and beta_slow; calibration does as the loader",
}
FACTORS = tuple(dict.fromkeys(key for arch in ARCHITECTURES.values() for key in arch.factors))
OF_LOGITS = {"final_logit_softcapping", "logit_scale", "logits_scaling"}  # applied by the class of the whole model alone
READ_BESIDE_TEXT = {"architectures", "text_config", "tie_word_embeddings", "vision_config"}  # by transformers, too

def differences(
    arch: Arch, config: Mapping[str, Any], hyper: Hyper, unused: tuple[str, ...], layers: Layers,
    rope_scale: float | None = None, rope_alpha: float | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Sentences for people. hyper: of ``config`` and the two overrides. unused: tensors that the output has no place for."""
    return (
        *_of_the_loader(arch, hyper, config, unused, layers),
        *_unread_scaling(arch, config),
        *_passed_over(arch, config),
        *_factors_of_others(arch, config, hyper),
        *_outside_of_text(arch, config, hyper, rope_scale, rope_alpha),
    )


def _of_the_loader(
    arch: Arch, hyper: Hyper, config: Mapping[str, Any], unused: tuple[str, ...], layers: Layers
) -> list[str]:
    """The loader's differences that matter for this config, and dropped tensors."""
    out = []
    for text in arch.loader_differences:
        topic = text.split(":")[0]
        windowed = hyper.window is not None and any(hyper.sliding)
        applies = {
            "sliding window": windowed,
            "clip_qkv": hyper.qkv_clip is not None,
            "residual multiplier": hyper.residual_scale != 1 and (hyper.bias_o or hyper.bias_mlp),
            "q/k norm": hyper.qk_norm,
        }
        if applies.get(topic, True):
            out.append(text)
    alternating = tuple(i % 2 == 0 for i in range(hyper.num_layers))
    unread = arch.window is not None and not arch.window.reads_layer_types
    if unread and "layer_types" in config and hyper.sliding != alternating:
        out.append(
            f"layer_types: the loader does not read it: every other layer of a {arch.name} slides there, the first one too "
            f"(no effect while texts are not longer than sliding_window, {hyper.window})"
        )
    if arch.loads_as:
        out.append(
            f"written as {arch.loads_as} (names and config.json), because the loader runs {arch.name} as another model"
        )
    if hyper.rope_kind in ROPE_DIFFERENCES:
        out.append(ROPE_DIFFERENCES[hyper.rope_kind].format(longest=hyper.max_seq_len))
    # The loader reads the key for every family, transformers for those that have a default for it.
    if hyper.rope is not None and hyper.rope.dim != hyper.head_dim and "partial_rotary_factor" not in dict(arch.defaults):
        out.append(
            f"partial_rotary_factor: the loader rotates {hyper.rope.dim} of {hyper.head_dim} dimensions of a head, and "
            f"calibration does as the loader; transformers rotates all in a {arch.name}"
        )
    if layers.surplus:
        out.append(layers.surplus)
    # Layers beyond those of config.json have been named above, or are of MTP.
    dropped = [n for n in unused if not n.endswith(BUFFERS) and layers.number(n) < layers.configured]
    biases = [n for n in dropped if n.endswith("_proj.bias")]
    if biases:
        out.append(
            f"biases are stored, {biases[0]} and {len(biases) - 1} more, and by config.json there are none: they are left "
            "out, as in transformers; if the model was trained with them, set attention_bias or mlp_bias to true"
        )
        dropped = [n for n in dropped if n not in set(biases)]
    if dropped:
        out.append(f"{len(dropped)} tensors of the source have no place in the output, e.g. {dropped[0]}")
    return out


def _unread_scaling(arch: Arch, config: Mapping[str, Any]) -> list[str]:
    """A warning about RoPE that config.json wants longer without saying in which way: nobody applies that; and one about
    queries of Ministral 3, which grow with the position."""
    scaling = config_value(legacy_config(config), "rope_scaling", "rope_parameters")
    if isinstance(scaling, Mapping) and as_number(scaling.get("llama_4_scaling_beta")):
        return [
            "llama_4_scaling_beta: the loader does not apply it, nor does calibration; it has no effect before position "
            f"{shown(scaling.get('original_max_position_embeddings'))}"
        ]
    if arch.rope == "none" or not isinstance(scaling, Mapping) or as_number(scaling.get("factor")) in (None, 1.0):
        return []
    if {scaling.get("type"), scaling.get("rope_type")} - {None, "", "default"}:
        return []
    return [
        f"rope_scaling has a factor, {shown(scaling['factor'])}, and no type (linear, yarn, ...): it is not applied, "
        "neither by transformers nor by ExLlamaV2; add the type if the model was trained with it"
    ]


def _passed_over(arch: Arch, config: Mapping[str, Any]) -> list[str]:
    """A warning about rotary settings that transformers does not see: with a rope_scaling, as people add it to make a context
    longer, it looks at no rope_parameters."""
    out = []
    for level in levels(config):
        scaling, rope = level.get("rope_scaling"), level.get("rope_parameters")
        if not (isinstance(scaling, Mapping) and scaling and isinstance(rope, Mapping)):
            continue
        usual = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **defaults_of(arch, config)}
        for key in ("rope_theta", "partial_rotary_factor"):
            if rope.get(key) not in (None, usual[key]) and scaling.get(key) is None and level.get(key) is None:
                out.append(
                    f"rope_parameters says {key} {shown(rope[key])}, which is used; with rope_scaling beside it transformers "
                    f"takes {shown(usual[key])} instead: write {key} into rope_scaling as well"
                )
    return out


def _factors_of_others(arch: Arch, config: Mapping[str, Any], hyper: Hyper) -> list[str]:
    """A warning about factors and caps that belong to other families: the loader applies them to every one."""
    text = ARCHITECTURES.get(BY_MODEL_TYPE.get(text_model(config) or "", ""), arch)
    config, own = legacy_config(config), {*arch.factors, *({*text.factors} - OF_LOGITS)}
    given = {key: as_number(config_value(config, key)) for key in FACTORS if key not in own}
    neutral = {
        **dict.fromkeys(("residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale", "scale_emb"), 1.0),
        "query_pre_attn_scalar": hyper.head_dim, "attention_multiplier": hyper.head_dim**-0.5,
    }  # fmt: skip
    keys = [k for k, n in given.items() if n and n != neutral.get(k)]  # 0 is none
    if not keys:
        return []
    it = "them" if len(keys) > 1 else "it"
    return [
        f"config.json has {some(keys, 4)}: the loader applies {it} to every family, and calibration does as the loader; the "
        f"class {arch.name} itself does not. If the model was trained without {it}, remove {it}"
    ]


def _outside_of_text(
    arch: Arch, config: Mapping[str, Any], hyper: Hyper, rope_scale: float | None, rope_alpha: float | None
) -> list[str]:
    """A warning about keys beside text_config that decide, for the loader, over what is in there. ``hyper``: with them."""
    if not isinstance(config.get("text_config"), Mapping):
        return []
    keys = []
    for key in config.keys() - READ_BESIDE_TEXT:
        with suppress(SourceError):  # without it there would be no model
            inside = resolve_hyper(arch, {k: v for k, v in config.items() if k != key}, rope_scale, rope_alpha)
            if _computed(inside) != _computed(hyper):
                keys.append(key)
    if not keys:
        return []
    them, are = ("them", "they are") if len(keys) > 1 else ("it", "it is")
    return [
        f"config.json has {some(sorted(keys), 4)} outside of text_config, where transformers does not look for {them}: "
        f"{are} preferred to what text_config says, as the loader does. If the model was trained without, remove {them}"
    ]


def _computed(hyper: Hyper) -> Hyper:
    """Without what makes no difference to hidden states."""
    slides = hyper.window is not None and any(hyper.sliding)
    window = (hyper.sliding, hyper.window) if slides else ((), None)
    fixed = replace(hyper, bos_token_id=None, max_seq_len=0, normalize_head=False, rope_kind="")
    return replace(fixed, sliding=window[0], window=window[1])
