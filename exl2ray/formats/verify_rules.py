"""Rules about an EXL2 model as a whole; see ``verify.py``, which calls them. Each function adds Problems to ``d``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exl2ray.errors import Exl2RayError, FormatError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hfconfig import config_value
from exl2ray.formats.layout import FLOAT16_MAX, LinearShape, pad32
from exl2ray.formats.roles import ATTENTION, EXPERT, MLP
from exl2ray.formats.tensorfile import TensorInfo, read_tensor

ALWAYS_TIED = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "Starcoder2ForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GemmoeForCausalLM",
)

TEXT = re.compile(r"(language_model\.)?(model\.|lm_head(\.|$))")
LAYER = re.compile(r"(?:language_model\.)?model\.layers\.(?P<layer>\d{1,6})\.(?P<rest>.+)")
BLOCK = re.compile(
    r"(?P<block>.*\.layers\.\d{1,6}\.(?:self_attn|mlp|feed_forward|block_sparse_moe))"
    r"(?:\.experts\.(?P<expert>\d{1,6}))?\.(?P<role>[qkvo]_proj|gate_proj|up_proj|down_proj|w1|w2|w3|v1|c_fc|c_proj)"
)
COMPLETE_BLOCKS = (
    {*ATTENTION},
    {*MLP},
    {"c_fc", "c_proj"},
    {*EXPERT},
    {"w1", "v1", "w2"},
)
# Under the loader's names or the source's own: loaders rename what they find.
FUSED = re.compile(
    r"(?!vision_tower|visual|multi_modal_projector).*\b"
    r"((self_attn|attn|attention)\.(qkv_proj|wqkv|Wqkv|c_attn)"
    r"|mlp\.(gate_up_proj|swiglu\.w12|swiglu\.w3)|experts\.(mlp\.)?(w1|v1|w2))"
    r"(\.weight|\.bias)?"
)
LOADABLE = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Problem:
    """One broken rule. ``file`` and ``tensor`` are empty where they do not apply."""

    file: str
    tensor: str
    rule: str
    message: str

    @staticmethod
    def of_error(directory: Path, file: str, rule: str, e: Exl2RayError) -> Problem:
        """An error as a problem: what to do goes along, the place of the file need not be said twice."""
        message = e.message
        for place in (f"{directory / file}: ", f"{file}: ", f"{directory}: "):
            message = message.removeprefix(place)
        return Problem(file or str(directory), "", rule, f"{message}; {e.hint}" if e.hint else message)

    def __str__(self) -> str:
        where = ": ".join(x for x in (self.file, self.tensor) if x)
        return f"[{self.rule}] {where}: {self.message}"


@dataclass
class Directory:
    """What the checks look at, and the problems found so far."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    linears: dict[str, PackedLinear] = field(default_factory=dict)  # q_weight on the meta device
    problems: list[Problem] = field(default_factory=list)
    without: list[str] = field(default_factory=list)  # shards that are absent or cannot be read
    follows: int = 0  # things missing, as it seems for want of these

    def missing(self, rule: str, message: str, tensor: str) -> None:
        """Adds a problem with what is not there, or counts it where a shard is not there that may hold it."""
        if self.without:
            self.follows += 1
        else:
            self.add(rule, message, tensor)

    def add(self, rule: str, message: str, tensor: str = "", file: str = "") -> None:
        if tensor in self.tensors and not file:
            file = self.tensors[tensor].file.name
        self.problems.append(Problem(file, tensor, rule, message))

    @property
    def architecture(self) -> str:
        """The model's class name, or an empty string if config.json is broken."""
        return str(self.config["architectures"][0]) if self.config else ""

    @property
    def tied(self) -> bool:
        """Whether loaders fall back to the embedding matrix when there is no head."""
        return self.config.get("tie_word_embeddings") is True or self.architecture in ALWAYS_TIED

    def has_linear(self, key: str) -> bool:
        return f"{key}.q_weight" in self.tensors or f"{key}.weight" in self.tensors

    def load(self, name: str) -> torch.Tensor:
        return read_tensor(self.tensors[name], error=FormatError)


def check_quantized(d: Directory) -> None:
    """There is something quantised, and heads are as many as config.json says."""
    if not d.without and not any(n.endswith(".q_weight") for n in d.tensors):
        d.add("linear", "holds no quantised linear", file=str(d.path))
    heads, head_dim = (config_value(d.config, name) for name in ("num_attention_heads", "head_dim"))
    if not (_is_size(heads) and _is_size(head_dim)):
        return
    for key, p in d.linears.items():
        if key.endswith(".self_attn.o_proj") and TEXT.match(key) and p.in_features != heads * head_dim:
            d.add("block", f"has {p.in_features} rows; {heads} heads of {head_dim} need {heads * head_dim}", key)


def check_blocks(d: Directory) -> None:
    """Within a block all linears are quantised or none; a block has all of its linears; widths fit each other."""
    blocks: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # block -> unit -> roles
    state: dict[str, dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
    keys = {n.rpartition(".")[0] for n in d.tensors if n.endswith((".q_weight", ".weight"))}
    for key in sorted(keys):
        m = BLOCK.fullmatch(key)
        if m is None or not TEXT.match(key):
            continue
        unit = m["block"] if m["expert"] is None else f"{m['block']}.experts.{m['expert']}"
        blocks[m["block"]][unit].add(m["role"])
        state[m["block"]][f"{key}.q_weight" in d.tensors].append(key)
    for block, units in blocks.items():
        plain = state[block][False]
        if plain and state[block][True]:
            message = f"{len(plain)} of its linears are not quantised, first {plain[0]}; all or none must be"
            d.add("block", message, block)
        for unit, roles in units.items():
            if roles not in COMPLETE_BLOCKS:
                d.missing("block", f"has only {', '.join(sorted(roles))}", unit)
            _check_mlp(d, unit)


def _check_mlp(d: Directory, unit: str) -> None:
    """down_proj is as wide as gate and up; with MLP biases it must be in natural order."""
    down = next((p for r in ("down_proj", "c_proj", "w2") if (p := d.linears.get(f"{unit}.{r}"))), None)
    if down is None:
        return
    for role in ("gate_proj", "up_proj", "c_fc", "w1", "w3", "v1"):
        p = d.linears.get(f"{unit}.{role}")
        if p is None:
            continue
        if p.out_features != down.in_features:
            d.add("block", f"has {p.out_features} columns; {down.key} has {down.in_features} rows", p.key)
        natural = torch.equal(down.q_invperm, torch.arange(down.in_features, dtype=torch.int32))
        if p.bias is not None and not natural and ".experts." not in unit:
            message = f"has a bias, and {down.key} is not in natural order: loaders permute its columns, not its bias"
            d.add("block", message, p.key)


def check_layers(d: Directory) -> None:
    """Every layer holds the same set of modules and biases, and config.json gives their number."""
    layers: dict[int, set[str]] = defaultdict(set)
    for name in d.tensors:
        m = LAYER.fullmatch(name)
        suffix = name.rpartition(".")[2]
        if m and suffix in ("q_weight", "weight", "bias"):
            rest = re.sub(r"experts\.\d+\.", "experts.*.", m["rest"].rpartition(".")[0])
            layers[int(m["layer"])].add(f"{rest}.bias" if suffix == "bias" else rest)
    count = config_value(d.config, "num_hidden_layers", "n_layers", "n_layer")
    if not d.config:  # broken, and reported as such
        count = len(layers)
    elif not _is_size(count) or count > 10_000:
        d.add("layer", f"num_hidden_layers is {str(count)[:40]}", file="config.json")
        count = len(layers)
    everything = set().union(*layers.values()) if layers else set()
    for i in range(count):
        missing = sorted(everything - layers[i]) if i in layers else ["all tensors"]
        if missing or not everything:
            d.missing("layer", f"missing {', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}", f"model.layers.{i}")
    for i in sorted(k for k in layers if k >= count):
        d.add("layer", f"config.json has {count} layers only", f"model.layers.{i}")


def check_routers(d: Directory) -> None:
    """Each MoE block has an unquantised router with one row per expert, and experts 0..E-1."""
    experts: dict[str, set[int]] = defaultdict(set)
    for name in d.tensors:
        m = BLOCK.fullmatch(name.rpartition(".")[0])
        if m and m["expert"] is not None:
            experts[m["block"]].add(int(m["expert"]))
        if name.endswith((".mlp.gate.q_weight", ".block_sparse_moe.gate.q_weight")):
            d.add("router", "a router must not be quantised", name)
    count = config_value(d.config, "num_local_experts", "num_experts")
    if experts and count is not None and not (_is_size(count) and count <= 10_000):
        d.add("router", f"num_local_experts is {str(count)[:40]}", file="config.json")
    for block, found in experts.items():
        wanted = count if _is_size(count) and count <= 10_000 else len(found)
        missing = sorted(set(range(wanted)) - found)
        if missing or max(found) >= wanted:
            d.missing("block", f"has {len(found)} of {wanted} experts, missing {missing[:8]}", block)
        name = f"{block}.gate.weight"
        info = d.tensors.get(name)
        if info is None:
            d.missing("router", "missing", name)
        elif len(info.shape) != 2 or info.shape[0] != wanted:
            d.add("router", f"has shape {list(info.shape)}; {wanted} experts need as many rows", name)


def check_fused(d: Directory) -> None:
    for name in sorted(d.tensors):
        if FUSED.fullmatch(name):
            d.add("fused", "left over from the source: loaders would use it and ignore the quantised tensors", name)


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def check_sizes(d: Directory) -> None:
    """Sizes in config.json that no loader can read; lists of one for each layer are left to the loader."""
    for name in SIZES:
        value = config_value(d.config, name)
        if value is not None and not isinstance(value, list) and not (_is_size(value) and value < 1 << 31):
            d.add("config", f"{name} is {str(value)[:40]}, not a size", file="config.json")


def check_plain(d: Directory) -> None:
    """Unquantised tensors of the text model: a dtype the loader casts, and values that survive the cast to float16."""
    hidden = config_value(d.config, "hidden_size", "d_model", "n_embd")
    heads = config_value(d.config, "num_attention_heads", "n_heads", "n_head")
    head_dim = config_value(d.config, "head_dim")
    if head_dim is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head_dim = hidden // heads
    for name, info in sorted(d.tensors.items()):
        key, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias") or not TEXT.match(name) or f"{key}.q_weight" in d.tensors:
            continue
        if info.dtype not in LOADABLE:
            d.add("plain", f"has dtype {info.dtype}; loaders read {', '.join(LOADABLE)}", name)
            continue
        if key.endswith(("embed_tokens", "norm")) and suffix == "weight" and info.shape:
            of_heads, embedding = key.endswith(("q_norm", "k_norm")), key.endswith("embed_tokens")
            width, what = (head_dim, "head_dim") if of_heads else (hidden, "hidden_size")
            if isinstance(width, int) and info.shape[-1] != width:
                d.add("plain", f"has shape {list(info.shape)}; {what} is {width}", name)
            elif len(info.shape) not in ((2,) if embedding else (1, 2) if of_heads else (1,)):
                d.add("plain", f"has shape {list(info.shape)}, which is {len(info.shape)} dimensions", name)
        _check_values(d, name, info)


def _check_values(d: Directory, name: str, info: TensorInfo) -> None:
    step = max(1, (64 << 20) // max(1, info.nbytes // info.shape[0])) if info.shape and info.shape[0] else 1
    try:
        for first in range(0, info.shape[0] if info.shape else 0, step):
            part = read_tensor(info, slice(first, first + step), FormatError).float()
            if not bool((part.abs() <= FLOAT16_MAX).all()):  # false for NaN too
                d.add("plain", f"has values that are not finite in float16 (rows from {first})", name)
                return
    except FormatError as e:
        d.add("file", e.message, name)


def check_head(d: Directory) -> None:
    embeddings = [n for n in d.tensors if TEXT.match(n) and n.endswith("model.embed_tokens.weight")]
    if not embeddings:
        d.missing("head", "missing", "model.embed_tokens.weight")
    if not any(TEXT.match(n) and n.endswith("model.norm.weight") for n in d.tensors):
        d.missing("head", "missing", "model.norm.weight")
    keys = sorted({n.rpartition(".")[0] for n in d.tensors if TEXT.match(n) and ".layers." not in n})
    head = next((k for k in keys if k.endswith("lm_head") and d.has_linear(k)), None)
    if head is None:
        if not d.tied:
            d.missing("head", "missing, and the embeddings are not tied", "lm_head")
        return
    if f"{head}.bias" in d.tensors:
        d.add("head", "a head must not have a bias", f"{head}.bias")
    vocab = config_value(d.config, "vocab_size")
    hidden = config_value(d.config, "hidden_size", "d_model", "n_embd")
    if not (_is_size(vocab) and _is_size(hidden)):
        return
    found: tuple[int, ...] = d.tensors[f"{head}.weight"].shape if f"{head}.weight" in d.tensors else ()
    wanted: tuple[int, ...] = (vocab, hidden)
    if f"{head}.q_weight" in d.tensors:
        if head not in d.linears:
            return  # broken, and reported as such
        found, wanted = (d.linears[head].out_features, d.linears[head].in_features), (pad32(vocab), hidden)
    if found != wanted:
        message = f"has {list(found)} (columns, rows); vocab_size {vocab} and hidden_size {hidden} need {list(wanted)}"
        d.add("head", message, head)


def check_expected(d: Directory, expected: Mapping[str, LinearShape]) -> None:
    for key, shape in expected.items():
        p, plain = d.linears.get(key), d.tensors.get(f"{key}.weight")
        found: tuple[int, ...]
        if f"{key}.q_weight" in d.tensors:
            if p is None:
                continue  # broken, and reported as such
            found, wanted = (p.in_features, p.out_features), (shape.in_features, shape.padded_out)
        elif plain is not None:
            found, wanted = plain.shape[::-1], (shape.in_features, shape.out_features)
        else:
            if not (key.endswith("lm_head") and d.tied):
                d.missing("expected", "missing", key)
            continue
        if tuple(found) != wanted:
            d.add("expected", f"has {list(found)} (rows, columns) instead of {list(wanted)}", key)
        has_bias = f"{key}.bias" in d.tensors
        if has_bias != shape.has_bias:
            d.add("expected", "has a bias that the model has not" if has_bias else "lacks the bias of the model", key)
    for key in sorted(n.removesuffix(".q_weight") for n in d.tensors if n.endswith(".q_weight")):
        if key not in expected:
            d.add("expected", "is no linear of the model", key)


def _is_size(x: Any) -> bool:
    return type(x) is int and x > 0
