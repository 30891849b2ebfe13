"""config.json of a Hugging Face model: reading it, and writing the spelling that EXL2 loaders understand.

``transformers`` 5 moved the rotary settings into ``rope_parameters`` and the sliding-window pattern into
``layer_types``. EXL2 loaders read the older keys only, and fall back to theta = 10000 without a message when they are
absent. ``legacy_config`` adds the old keys to a config in either spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exl2ray.errors import Exl2RayError, SourceError
from exl2ray.formats.json_file import LIMITS, odd_values, read_json_object
from exl2ray.formats.vision import vision_keys
from exl2ray.wording import shown, some

BROKEN = "config.json is broken; fetch it again"  # the hint where a value is none that a model could have


def read_config(path: Path, error: type[Exl2RayError] = SourceError, strict: bool = True) -> dict[str, Any]:
    """Parse config.json: an object; if ``strict`` its ``architectures`` holds exactly one name.

    NaN and infinities are left in it (`exl2ray.formats.json_file.NoNumber`), since most keys are read by nobody here."""
    hint = "the directory must be a complete Hugging Face model"
    config = read_json_object(path, error, hint, LIMITS["config.json"], odd=True)
    found = config.get("architectures")
    if not strict:
        return config
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        text = f"{path}: architectures is {str(found)[:80]}; the format needs a list of exactly one name"
        raise error(text, "name the class of the model, as config.json of the original does: fetch it again")
    return config


def odd_notes(config: Mapping[str, Any], where: str) -> list[str]:
    """A note on NaN and infinities of a config.json, which are written in another way; none if there are none."""
    found = sorted(f"{place} is {value} (a model made from it has {value.json})" for place, value in odd_values(config))
    return [f"{where}: not all of its numbers are JSON: {some(found)}"] if found else []


# Keys that the loader reads at the top level only, also for multimodal configs.
TOP_LEVEL_KEYS = (
    "attention_bias",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "mlp_bias",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "residual_multiplier",
    "scale_depth",
    "scale_emb",
    "sliding_window_pattern",
    "tie_word_embeddings",
    "use_qk_norm",
)
MROPE_ARCHITECTURES = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
# Keys that have a value in every model: null there is no setting of its own, and transformers 5 refuses it.
NEVER_NULL = ("attention_bias", "hidden_act", "max_position_embeddings", "mlp_bias", "tie_word_embeddings")
LAYER_TYPES = ("full_attention", "sliding_attention")  # keys of ``rope_parameters`` where layers differ
PATTERN_ARCHITECTURES = ("Cohere2ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM")


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` that also holds the keys of ``transformers`` 4, at the levels where EXL2 loaders read them.

    Everything present stays, new-style keys included, except nulls that say nothing (``NEVER_NULL``). Written from the new
    form when the old key is absent or null:
    rope_theta, rope_scaling (with exactly one of type / rope_type), partial_rotary_factor,
    original_max_position_embeddings, sliding_window_pattern, layer_norm_epsilon (StarCoder2), keys of ``vision_config``.

    Raises SourceError when both spellings are present and disagree, or when ``layer_types`` has no regular pattern.
    """
    out = _without_nulls(config)
    architecture = str((config.get("architectures") or [""])[0])
    text = out.get("text_config")
    if isinstance(text, Mapping):
        out["text_config"] = text = _without_nulls(text)
        _add_legacy_keys(text, architecture)
        for key in TOP_LEVEL_KEYS:
            if out.get(key) is None and text.get(key) is not None:
                out[key] = text[key]
    _add_legacy_keys(out, architecture)
    if isinstance(out.get("vision_config"), Mapping):
        out["vision_config"] = vision_keys(out)
    return out


def _without_nulls(level: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in level.items() if v is not None or k not in NEVER_NULL}


def _add_legacy_keys(level: dict[str, Any], architecture: str) -> None:
    """Write the old spelling of one level (top or text_config) next to the new one."""
    old = level.get("rope_scaling")
    if isinstance(old, Mapping) and any(isinstance(old.get(t), Mapping) for t in LAYER_TYPES):
        raise SourceError(
            "config.json: rope_scaling has an entry for each type of layer, which loaders do not read there",
            "call it rope_parameters, as transformers does",
        )
    if isinstance(old, Mapping) and not old:
        del level["rope_scaling"]
    elif isinstance(old, Mapping):  # transformers 5 takes its new form under the old name as well
        for key in ("rope_theta", "partial_rotary_factor"):
            _add(level, key, old.get(key), "rope_scaling")
        level["rope_scaling"] = {k: v for k, v in old.items() if k not in ("rope_theta", "partial_rotary_factor")}
    rope = level.get("rope_parameters")
    if rope is not None and not isinstance(rope, Mapping):
        raise SourceError(f"config.json: rope_parameters is {shown(rope)}; an object is needed", BROKEN)
    if isinstance(rope, Mapping):
        if isinstance(rope.get("full_attention"), Mapping):  # one entry per layer type, as in Gemma 3
            rope = rope["full_attention"]
        keys = ["rope_theta", "partial_rotary_factor"]
        if rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
            keys.append("original_max_position_embeddings")
        for key in keys:
            _add(level, key, rope.get(key), "rope_parameters")
        if level.get("rope_scaling") is None:
            level["rope_scaling"] = _rope_scaling(rope, architecture)
            if level["rope_scaling"] is None:
                del level["rope_scaling"]
        else:
            _check_same_scaling(level["rope_scaling"], rope)
    if isinstance(level.get("rope_scaling"), Mapping):
        level["rope_scaling"] = _one_selector(level["rope_scaling"], architecture)
        _state_original(level, level["rope_scaling"])
    if architecture in PATTERN_ARCHITECTURES and isinstance(level.get("layer_types"), list):
        level["sliding_window_pattern"] = _pattern(level["layer_types"], level.get("sliding_window_pattern"))
    if architecture == "Starcoder2ForCausalLM":
        _add(level, "layer_norm_epsilon", level.get("norm_epsilon"), "norm_epsilon")


def _add(level: dict[str, Any], key: str, value: Any, origin: str) -> None:
    if value is None:
        return
    if level.get(key) is None:
        level[key] = value
    elif level[key] != value:
        raise SourceError(
            f"config.json: {key} is {shown(level[key])}, but {origin} says {shown(value)}",
            "remove the wrong one: loaders that read different spellings would run different models",
        )


def _rope_scaling(rope: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    """``rope_scaling`` from the entries of ``rope_parameters``; None when there is no scaling."""
    kind = rope.get("rope_type", rope.get("type"))
    if architecture in MROPE_ARCHITECTURES and "mrope_section" in rope:
        return {"type": "mrope", "mrope_section": rope["mrope_section"]}
    if kind in (None, "default"):
        return None
    dropped = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
    return {"rope_type": kind, **{k: v for k, v in rope.items() if k not in dropped}}


def _one_selector(scaling: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Keep one of ``type`` / ``rope_type``: the loader refuses both, which ``transformers`` 4.57 writes; null is none.

    ``su`` becomes ``longrope``, its later name: the loader knows both, ``transformers`` 5 refuses the old one."""
    out = {k: v for k, v in scaling.items() if v is not None or k not in ("type", "rope_type")}
    out.update({k: "longrope" for k in ("type", "rope_type") if out.get(k) == "su"})
    if architecture in MROPE_ARCHITECTURES and "mrope_section" in out:
        out.pop("rope_type", None)
        return {**out, "type": "mrope"}
    if out.get("type") and out.get("rope_type"):
        if out["type"] != out["rope_type"]:
            raise SourceError(
                f"config.json: rope_scaling has type {shown(out['type'])} and rope_type {shown(out['rope_type'])}",
                "keep the one that the model was trained with",
            )
        del out["type"]
    if (out.get("type") or out.get("rope_type")) == "yarn" and "long_factor" in out and "factor" not in out:
        # The first configs of Phi-3 with long context say "yarn" and mean longrope, as transformers knows.
        out.pop("rope_type", None)
        out["type"] = "longrope"
    return out


def _state_original(level: dict[str, Any], scaling: dict[str, Any]) -> None:
    """The length before scaling where the loader looks for it: beside ``scaling`` for longrope, else inside. transformers
    prefers the one beside."""
    key, kind = "original_max_position_embeddings", scaling.get("type") or scaling.get("rope_type")
    if kind == "longrope":
        _add(level, key, scaling.get(key), "rope_scaling")
    elif kind in ("llama3", "yarn"):
        _add(scaling, key, level.get(key), "the one beside rope_scaling")


def _check_same_scaling(old: Any, rope: Mapping[str, Any]) -> None:
    if not isinstance(old, Mapping):
        raise SourceError(f"config.json: rope_scaling is {shown(old)}; an object is needed", BROKEN)
    for key in ("factor", "low_freq_factor", "high_freq_factor", "long_factor", "short_factor"):
        if key in old and key in rope and old[key] != rope[key]:
            raise SourceError(
                f"config.json: rope_scaling.{key} is {str(old[key])[:60]}, rope_parameters.{key} {str(rope[key])[:60]}",
                "remove the wrong one: loaders that read different spellings would run different models",
            )


def _pattern(layer_types: list[Any], given: Any) -> int:
    """Distance p between full-attention layers: layer i slides iff (i + 1) mod p is not 0.

    ``given`` is the config's own sliding_window_pattern or None; it must agree. Without any full-attention layer, every
    p larger than the list describes it.
    """
    full = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    p = given if type(given) is int else (full[0] if full else len(layer_types)) + 1
    if p < 2 or layer_types != [
        "full_attention" if (i + 1) % p == 0 else "sliding_attention" for i in range(len(layer_types))
    ]:
        raise SourceError(
            f"config.json: layer_types {str(layer_types)[:120]} is not full attention in every p-th layer with "
            + (f"p = sliding_window_pattern = {p}" if given is not None else "one p > 1"),
            "EXL2 loaders know no other mixture of sliding and full attention",
        )
    return p


def config_value(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of ``keys`` that is present and not null, at the top level or else in ``text_config``; None if none.

    The rule by which ExLlamaV2 looks keys up.
    """
    found = (level[key] for level in levels(config) for key in keys if level.get(key) is not None)
    return next(found, None)


def text_model(config: Mapping[str, Any]) -> str | None:
    """``model_type`` of the part for text, where it says one."""
    text = config.get("text_config")
    found = text.get("model_type") if isinstance(text, Mapping) else None
    return found if isinstance(found, str) else None


def levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config, and its part for text where it has one."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]
