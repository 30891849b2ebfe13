"""From a source model to a ``ModelSpec``: recognise the family, resolve the numbers, list the modules.

Everything is decided and checked here against the headers of the source, before a single weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exl2ray.errors import SourceError, UnknownArchitectureError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.hfconfig import text_model
from exl2ray.formats.source.architecture_name import unknown_hint
from exl2ray.formats.source.model_shards import index_note
from exl2ray.model.checkpoint_names import INCOMPLETE, Layers, count_layers, incomplete, missing_tensors, names_in
from exl2ray.model.config_reader import HINT
from exl2ray.model.counts import check_counts
from exl2ray.model.differences import differences
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
from exl2ray.wording import shown

__all__ = ["CopiedTensor", "LinearSpec", "ModelSpec", "ModuleSpec", "PlainTensor", "Stored", "find_arch", "load_spec"]

MAX_IN_FEATURES = 65536  # the loader keeps row permutations in 16 bits


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
    text = text_model(config)
    if arch.text_models and text is not None and text not in arch.text_models:
        raise UnknownArchitectureError(
            f"config.json: {arch.name} with text_config.model_type {shown(text)}",
            f"ExLlamaV2 runs the text of every {arch.name} as {' or '.join(arch.text_models)}: it would be a different model",
        )
    return arch


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
    told = differences(arch, source.config, hyper, unused, layers, rope_scale, rope_alpha)
    warnings = (*source.notes, *told)
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
