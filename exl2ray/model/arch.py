"""From a source model to a ``ModelSpec``: recognise the family, resolve the numbers, list the modules.

Everything is decided and checked here against the headers of the source, before a single weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from exl2ray.errors import SourceError, UnknownArchitectureError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.hfconfig import config_value, legacy_config, levels
from exl2ray.formats.json_file import as_number
from exl2ray.formats.source.architecture_name import BY_MODEL_TYPE, unknown_hint
from exl2ray.formats.source.model_shards import index_note
from exl2ray.model.checkpoint_names import INCOMPLETE, Layers, count_layers, incomplete, missing_tensors, names_in
from exl2ray.model.class_defaults import defaults_of
from exl2ray.model.config_reader import HINT
from exl2ray.model.counts import check_counts
from exl2ray.model.hyper import Hyper, resolve_hyper
from exl2ray.model.module_list import ModuleBuilder
from exl2ray.model.rules import Arch, Names
from exl2ray.model.spec import (
    CopiedTensor,
    LinearSpec,
    ModelSpec,
    ModuleSpec,
    PlainTensor,
    Stored,
)
from exl2ray.model.table import ARCHITECTURES
from exl2ray.wording import shown, some

__all__ = ["CopiedTensor", "LinearSpec", "ModelSpec", "ModuleSpec", "PlainTensor", "Stored", "find_arch", "load_spec"]

MAX_IN_FEATURES = 65536  # the loader keeps row permutations in 16 bits
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
FACTORS = {key: None for arch in ARCHITECTURES.values() for key in arch.factors}  # in the order of the table
OF_LOGITS = {"final_logit_softcapping", "logit_scale", "logits_scaling"}  # applied by the class of the whole model alone


READ_BESIDE_TEXT = {"architectures", "text_config", "tie_word_embeddings", "vision_config"}  # by transformers, too


def find_arch(config: Mapping[str, Any]) -> Arch:
    """Table entry of a config; UnknownArchitectureError lists the known ones."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise SourceError(f"config.json: architectures is {shown(names)}; exactly one entry is needed", HINT)
    arch = ARCHITECTURES.get(names[0]) if isinstance(names[0], str) else None
    if arch is None:
        raise UnknownArchitectureError(
            f"config.json: architecture {shown(names[0])} is not supported",
            unknown_hint(config, "supported: " + ", ".join(sorted(ARCHITECTURES))),
        )
    vision = config.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, Mapping) else None
    if arch.vision_model is not None and kind != arch.vision_model:
        raise UnknownArchitectureError(
            f"config.json: {arch.name} with vision_config.model_type {shown(kind)}",
            f"ExLlamaV2 loads {arch.name} only with {arch.vision_model!r}",
        )
    text = _text_model(config)
    if arch.text_models and text is not None and text not in arch.text_models:
        raise UnknownArchitectureError(
            f"config.json: {arch.name} with text_config.model_type {shown(text)}",
            f"ExLlamaV2 runs the text of every {arch.name} as {' or '.join(arch.text_models)}: it would be a different model",
        )
    return arch


def _text_model(config: Mapping[str, Any]) -> str | None:
    """``model_type`` of the part for text, where it says one."""
    text = config.get("text_config")
    found = text.get("model_type") if isinstance(text, Mapping) else None
    return found if isinstance(found, str) else None


def load_spec(
    source: SourceModel,
    rope_scale: float | None = None,
    rope_alpha: float | None = None,
    misfits: list[SourceError] | None = None,
) -> ModelSpec:
    """Describe the model in ``source``.

    rope_scale: linear RoPE factor, rope_alpha: NTK alpha; both replace what the config says and hold for calibration
    only (the loader is told again by its user). misfits: if given, gets an error for every tensor that is missing or has
    the wrong shape, and the description is returned all the same; else the first few of them are raised as one.

    An EXL2 directory is described as well: its unquantised tensors are read as usual, its linears are those of
    ``Exl2Model`` (see ``load_block``), and a normalised head is not normalised again.

    Raises UnknownArchitectureError, or SourceError naming config key or tensor.
    """
    arch = find_arch(source.config)
    try:
        check_counts(arch, source.config, source)
    except SourceError as e:
        raise incomplete(source) or e from e  # sizes that nothing has may be those of what is missing
    hyper = resolve_hyper(arch, source.config, rope_scale, rope_alpha)
    converted = is_exl2(source.config)
    if converted:
        hyper = replace(hyper, normalize_head=False)
    stored = _as_converted(arch, source) if converted else _as_stored(arch, source, hyper.tie_embeddings)
    builder = ModuleBuilder(stored, hyper, source)
    modules = builder.modules()
    copied = _copied(arch, source)
    layers = count_layers(stored, source, hyper.num_layers)
    found = _misfits(stored, modules, source, layers, converted, builder.tied)
    found |= _short_tables(modules, source, hyper)
    if misfits is None:
        _raise_any(source, found)
    else:
        misfits += [SourceError(f"{source.path}: {text}", hint) for text, hint in found.items()]
    used = {s.name for m in modules for s in _stored(m)} | {c.source_name for c in copied}
    unused = () if converted else tuple(n for n in source.names() if n not in used)
    warnings = (*source.notes, *_warnings(arch, hyper, source.config, unused, layers), *_unread_scaling(arch, source.config))
    warnings = (*warnings, *_passed_over(arch, source.config))
    warnings = (*warnings, *_factors_of_others(arch, source.config, hyper))
    warnings = (*warnings, *_outside_of_text(arch, source.config, hyper, rope_scale, rope_alpha))
    if source.absent and not found:
        warnings = (*warnings, *index_note(source.absent, list(source.files)))
    return ModelSpec(arch, hyper, modules, copied, builder.tied, warnings)


def is_exl2(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its model is an EXL2 one."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "exl2"


def _as_converted(arch: Arch, source: SourceModel) -> Arch:
    """``arch`` as its EXL2 form is stored: output names, nothing fused, q/k norm weights once per head (or 1-D)."""
    q_norm = f"{arch.prefix}{arch.output.q_norm.format(L=0)}.weight"
    per_head = q_norm in source and len(source.shape(q_norm)) == 2
    return replace(
        arch,
        source=Names(**{k: v and arch.prefix + v for k, v in vars(arch.output).items()}),
        qkv="split",
        gate_up_fused=False,
        experts_fused=False,
        linears_transposed=False,
        head_norm=arch.head_norm and replace(arch.head_norm, per_head=per_head),
    )


def _as_stored(arch: Arch, source: SourceModel, tied: bool) -> Arch:
    """``arch`` with the source names as this checkpoint spells them: its layout, and SwiGLU-fused Llama files."""
    names = names_in(arch, source, tied)
    fused, down = names.up.replace("up_proj", "swiglu.w12"), names.down
    if not arch.moe and f"{fused.format(L=0)}.weight" in source and f"{down.format(L=0)}.weight" not in source:
        names = replace(names, gate=fused, up=fused, down=down.replace("down_proj", "swiglu.w3"))
        arch = replace(arch, gate_up_fused=True)
    return replace(arch, source=names)


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


def _misfits(
    arch: Arch, modules: tuple[ModuleSpec, ...], source: SourceModel, layers: Layers, converted: bool, tied: bool
) -> dict[str, str]:
    """What is wrong -> hint: tensors missing or of another shape; without any, linears of sizes that EXL2 cannot hold."""
    # A fused tensor is part of several linears. One that embedding and head share has to fit both of them.
    stored = [s for m in modules for s in ([p.stored for p in m.plain] if converted else _stored(m))]
    wanted = list(dict.fromkeys((s.name, s.shape) for s in stored))
    found = missing_tensors(arch, source, list(dict.fromkeys(n for n, _ in wanted if n not in source)), layers, tied)
    for name, shape in wanted:
        if name in source and not shape_fits(source.shape(name), shape):
            hint = _resized(arch, source, name, shape) or INCOMPLETE
            found[f"{name} has shape {source.shape(name)}, expected {shown_shape(shape)}"] = hint
    if found:
        return found
    hint = f"EXL2 needs multiples of 32, and at most {MAX_IN_FEATURES} input features"
    for module in modules:
        for x in module.linears:
            if x.in_features % 32 or x.in_features > MAX_IN_FEATURES:
                found[f"{x.key} has {x.in_features} input features"] = hint
            if x.out_features % 32 and module.kind != "head":
                found[f"{x.key} has {x.out_features} output features"] = hint
    return found


def _short_tables(modules: tuple[ModuleSpec, ...], source: SourceModel, hyper: Hyper) -> dict[str, str]:
    """What is wrong -> hint, of tables that end before the tokens or positions of config.json do: what is beyond has no row.
    More rows than that are padding.
    """
    found = {}
    needed = {"embedding": ("vocab_size", hyper.vocab_size), "positions": ("the longest text", hyper.max_seq_len)}
    for plain in (p for m in modules[:2] for p in m.plain if p.role in needed and p.stored.name in source):
        (what, count), shape = needed[plain.role], source.shape(plain.stored.name)
        if shape_fits(shape, plain.stored.shape) and shape[0] < count:
            found[f"{plain.stored.name} has {shape[0]} rows, but {what} in config.json is {count}"] = INCOMPLETE
    return found


def _resized(arch: Arch, source: SourceModel, name: str, wanted: tuple[int, ...]) -> str:
    """What to do where embedding and head have more or fewer rows than config.json says, both alike; else nothing."""
    embedding, shape = f"{arch.source.embed}.weight", source.shape(name)
    if name not in (f"{arch.source.head}.weight", embedding) or len(shape) != 2 or shape[1:] != wanted[1:]:
        return ""
    if embedding not in source or source.shape(embedding)[:1] != shape[:1]:
        return ""
    return f'embedding and head were resized: set "vocab_size": {shape[0]} in config.json'


def _raise_any(source: SourceModel, found: Mapping[str, str]) -> None:
    if found:
        texts = list(found)
        more = f"; and {len(texts) - 5} more" if len(texts) > 5 else ""
        raise SourceError(f"{source.path}: {'; '.join(texts[:5])}{more}", found[texts[0]])


def shape_fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stored shape is the wanted one; -1 in ``wanted`` fits any size."""
    return len(found) == len(wanted) and all(w in (-1, f) for f, w in zip(found, wanted, strict=True))


def shown_shape(wanted: tuple[int, ...]) -> str:
    """A wanted shape for people."""
    return str(wanted) if -1 not in wanted else f"({', '.join('any' if n == -1 else str(n) for n in wanted)})"


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
    text = ARCHITECTURES.get(BY_MODEL_TYPE.get(_text_model(config) or "", ""), arch)
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


def _warnings(
    arch: Arch, hyper: Hyper, config: Mapping[str, Any], unused: tuple[str, ...], layers: Layers
) -> tuple[str, ...]:
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
    return tuple(out)
