"""A GGUF file as the model that it was made from: its tensors under the names that the source model gives them.

config.json is that of the source; what the file says of itself must agree with it. Three things differ from the source, as
llama.cpp's converter leaves them: names; the rows of q and k, which its Llama family has in pairs for its kind of RoPE; and
Gemma's norms, which have the 1 added that transformers adds.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import FormatError, SourceError, UnknownArchitectureError
from exl2ray.evaluate.forward import OpenModel, RunOptions
from exl2ray.formats.gguf import PLAIN, GgufFile, GgufTensor, read_gguf
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.tensorfile import DTYPE_NAMES, TensorInfo
from exl2ray.model.arch import find_arch, load_spec
from exl2ray.model.hyper import Hyper
from exl2ray.model.rules import Names
from exl2ray.model.spec import ModelSpec
from exl2ray.model.weights import read_stored

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MAX_PARTS = 1000
SAME = "give the GGUF that was made from the model in --reference"
# Tensors of a GGUF -> the field of ``Names`` that says what the source calls them.
WHOLE = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}
OF_LAYER = {
    "attn_norm": "attn_norm", "post_attention_norm": "attn_post_norm", "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_qkv": "q", "attn_output": "o", "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down", "ffn_gate_inp": "router",
}  # fmt: skip
EXPERTS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}  # (experts, out, in) together
LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+?)(?:\.(\d{1,5}))?\.(weight|bias)")
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # config.json has them, too


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores an architecture. pairs: rows of q and k lie in pairs. norm_offset: added to weights of norms."""

    gguf: str
    pairs: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "LlamaForCausalLM": Family("llama", pairs=True),
    "MistralForCausalLM": Family("llama", pairs=True),
    "MixtralForCausalLM": Family("llama", pairs=True),
    "GraniteForCausalLM": Family("granite", pairs=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe"),
    "Phi3ForCausalLM": Family("phi3"),
    "Starcoder2ForCausalLM": Family("starcoder2"),
    "GemmaForCausalLM": Family("gemma", norm_offset=1.0),
    "Gemma2ForCausalLM": Family("gemma2", norm_offset=1.0),
    "Gemma3ForCausalLM": Family("gemma3", norm_offset=1.0),
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the source is. expert: of those in one tensor. heads: whose rows lie in pairs; 0: none do."""

    stored: GgufTensor
    expert: int | None = None
    heads: int = 0
    minus: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape if self.expert is None else self.stored.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.minus else PLAIN.get(self.stored.type, torch.float32)

    def info(self, name: str) -> TensorInfo:
        t = self.stored
        nbytes = t.nbytes if self.expert is None else t.nbytes // t.shape[0]
        return TensorInfo(name, t.file, DTYPE_NAMES[self.dtype], self.shape, t.begin + nbytes * (self.expert or 0), nbytes)

    def load(self) -> Tensor:
        rows, shape = math.prod(self.shape[:-1]), self.shape
        out = self.stored.load(rows * (self.expert or 0), rows).reshape(shape)
        if self.heads:
            pairs = out.reshape(self.heads, shape[0] // self.heads // 2, 2, *shape[1:])
            out = pairs.transpose(1, 2).reshape(shape)
        return out - self.minus if self.minus else out


class GgufModel(SourceModel):
    """One or more GGUF files with the interface of a source model. ``nbytes`` are those of the file, as it is stored.

    Raises FormatError for a broken file, SourceError for one that is not of the model that ``config`` describes.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], hyper: Hyper) -> None:
        self.path = Path(path)
        self.config = {k: v for k, v in config.items() if k != "quantization_config"}
        self.notes, self.absent, self._scaled = [], {}, {}
        arch = find_arch(self.config)
        family = FAMILIES.get(arch.name)
        if family is None:
            known = "supported: " + ", ".join(FAMILIES)
            raise UnknownArchitectureError(f"{self.path}: GGUF files of {arch.name} cannot be evaluated", known)
        files = _parts(self.path)
        _check_family(files[0], arch.name, family)
        _check_sizes(files[0], family.gguf, hyper)
        self.metadata = files[0].metadata
        self.files = {f.path.name: f for f in files}  # type: ignore[misc]  # as far as sizes of files are asked for
        tensors: dict[str, GgufTensor] = {}
        for f in files:
            twice = tensors.keys() & f.tensors.keys()
            if twice:
                raise FormatError(f"{f.path}: tensor {min(twice)!r} is in another part, too")
            tensors |= f.tensors
        if not tensors:
            raise SourceError(f"{self.path}: holds no tensors", "give a GGUF with weights: one of a vocabulary has none")
        self._places = _places(self.path, tensors, arch.source, family, hyper)
        self._tensors = {name: place.info(name) for name, place in self._places.items()}

    def load(
        self, name: str, rows: slice | None = None, allocate: Callable[[int], Tensor] | None = None
    ) -> Tensor:
        """As `SourceModel.load`; dequantised to float32. ``allocate`` is not asked."""
        self.info(name)
        whole = self._places[name].load()
        return whole if rows is None else whole[rows]

    def stored_bits(self, name: str) -> float:
        """Bits that the file takes for a weight of a tensor."""
        info = self.info(name)
        return 8 * info.nbytes / math.prod(info.shape)


def open_gguf(path: str | Path, like: OpenModel, options: RunOptions | None = None) -> OpenModel:
    """A GGUF file of the model ``like``, whose config and BOS it takes over. Reads headers, and one norm.

    Raises FormatError for a broken file, UnknownArchitectureError for a family that is not among ``FAMILIES``, SourceError
    for a GGUF of a model with other sizes. One of other weights is told in ``notes``.
    """
    options = options or RunOptions()
    source = GgufModel(path, like.source.config, like.spec.hyper)
    try:
        spec = load_spec(source, options.rope_scale, options.rope_alpha)
    except SourceError as e:
        what = e.message.removeprefix(f"{source.path}: ")
        raise SourceError(f"{source.path}: not a GGUF of the model in {like.path}: {what}", SAME) from e
    opened = OpenModel(source.path, source, spec, like.bos_id, notes=_doubts(source, spec))
    ours, theirs = (read_stored(m.spec.modules[-2].plain[0].stored, m.source).float() for m in (opened, like))
    if not torch.allclose(ours, theirs, rtol=2e-3, atol=1e-4):
        note = f"{path}: its last norm is not that of {like.path}: a GGUF of another model, or of a changed one"
        opened = replace(opened, notes=(*opened.notes, note))
    return opened


def _doubts(source: GgufModel, spec: ModelSpec) -> tuple[str, ...]:
    """What llama.cpp would do otherwise than what is judged here: the model as its config.json has it."""
    hyper, prefix = spec.hyper, FAMILIES[find_arch(source.config).name].gguf
    rope = source.config.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else source.config.get("rope_theta")
    known = {"rope.freq_base": theta, "attention.layer_norm_rms_epsilon": hyper.norm_eps,
             "feed_forward_length": None if hyper.num_experts else hyper.intermediate_size}  # fmt: skip
    out = []
    for key, ours in known.items():
        theirs: Any = source.metadata.get(f"{prefix}.{key}")
        if isinstance(ours, (int, float)) and type(theirs) in (int, float) and not math.isclose(theirs, ours, rel_tol=1e-4):
            out.append(f"{source.path}: {key} is {theirs:g}, and {ours:g} in config.json, by which it is judged here")
    used = {s.name for m in spec.modules for s in (*(x.weight for x in m.linears), *(x.bias for x in m.linears if x.bias),
                                                   *(p.stored for p in m.plain))}  # fmt: skip
    if spare := sorted(set(source.names()) - used):
        text = f"{len(spare)} tensors that the model has no place for, e.g. {spare[0]}: not judged here"
        out.append(f"{source.path}: holds {text}")
    return tuple(out)


def _parts(path: Path) -> list[GgufFile]:
    first = read_gguf(path)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return [first]
    name = PART.fullmatch(path.name)
    if type(count) is not int or not 1 < count <= MAX_PARTS or name is None or int(name[3]) != count:
        raise FormatError(
            f"{path}: says that it is one of {str(count)[:20]} parts, which its name does not",
            "parts are called NAME-00001-of-00003.gguf",
        )
    paths = [path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if path != paths[0]:
        raise SourceError(f"{path}: part {int(name[2])} of {count}", f"give the first one: --gguf {paths[0]}")
    missing = [p.name for p in paths if not os.path.exists(p)]
    if missing:
        raise SourceError(f"{path}: {len(missing)} of {count} parts are missing, e.g. {missing[0]}", "fetch all parts")
    return [first, *map(read_gguf, paths[1:])]


def _check_family(file: GgufFile, architecture: str, family: Family) -> None:
    kind, found = file.metadata.get("general.type", "model"), file.metadata.get("general.architecture")
    if kind != "model":
        raise SourceError(f"{file.path}: holds {str(kind)[:40]!r}, not a model", SAME)
    if found != family.gguf:
        text = f"a GGUF of architecture {str(found)[:40]!r}; {architecture} is {family.gguf!r} there"
        raise SourceError(f"{file.path}: {text}", SAME)


def _check_sizes(file: GgufFile, prefix: str, hyper: Hyper) -> None:
    """What the file says of itself, as far as it is one number, against the model's config."""
    expected = {
        "block_count": hyper.num_layers, "embedding_length": hyper.hidden_size, "attention.head_count": hyper.heads,
        "attention.head_count_kv": hyper.kv_heads,
    }  # fmt: skip
    for key, wanted in expected.items():
        found = file.metadata.get(f"{prefix}.{key}", wanted)
        if isinstance(found, list) and found:
            found = found[0] if len(set(found)) == 1 else found
        if found != wanted:
            text = f"a GGUF of another model: {prefix}.{key} is {str(found)[:40]}, not {wanted}"
            raise SourceError(f"{file.path}: {text}", SAME)


def _places(
    path: Path, tensors: Mapping[str, GgufTensor], names: Names, family: Family, hyper: Hyper
) -> dict[str, _Place]:
    """Name of the source -> where it is. Raises SourceError for tensors that this family has no place for."""
    out: dict[str, _Place] = {}
    strange = []
    for name, tensor in tensors.items():
        if name in FACTORS:
            continue
        stem, _, end = name.rpartition(".")
        found = LAYER.fullmatch(name)
        layer, base, expert = (int(found[1]), found[2], found[3]) if found else (0, stem, None)
        field = (OF_LAYER.get(base) or EXPERTS.get(base)) if found else WHOLE.get(base)
        template = None if field is None else getattr(names, field)
        if template is None or end not in ("weight", "bias") or (base in EXPERTS and len(tensor.shape) != 3):
            strange.append(name)
            continue
        if base in EXPERTS and tensor.shape[0] != hyper.num_experts:
            text = f"tensor {name!r} is of {tensor.shape[0]} experts, the model has {hyper.num_experts or 'none'}"
            raise SourceError(f"{path}: {text}", SAME)
        heads = {"attn_q": hyper.heads, "attn_k": hyper.kv_heads}.get(base, 0) if family.pairs else 0
        if heads and tensor.shape[0] % (2 * heads):
            raise SourceError(f"{path}: tensor {name!r} of shape {tensor.shape} is not of {heads} heads", SAME)
        minus = family.norm_offset if base.endswith("norm") and end == "weight" else 0.0
        numbers = range(tensor.shape[0]) if base in EXPERTS else [None if expert is None else int(expert)]
        for e in numbers:
            place = _Place(tensor, e if base in EXPERTS else None, heads, minus)
            key = f"{template.format(L=layer, E=e)}.{end}"
            if key in out:
                raise FormatError(f"{path}: tensor {name!r} is there twice, by another name")
            out[key] = place
    if strange:
        raise SourceError(f"{path}: {len(strange)} tensors that this family does not have, e.g. {strange[0]}", SAME)
    return out
