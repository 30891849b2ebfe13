"""``exl2ray architectures``: the model families that can be converted, and what is particular about each."""

from __future__ import annotations

from dataclasses import dataclass

from exl2ray.model.rules import Arch, NormKind
from exl2ray.model.table import ARCHITECTURES
from exl2ray.terminal.console import show_text
from exl2ray.terminal.live import show_table

_NORMS: dict[NormKind, str] = {"rms": "RMS", "layer": "Layer"}


@dataclass(frozen=True)
class Family:
    """One entry of the table in words. ``particular``: everything that has no column of its own."""

    name: str
    norm: str
    mlp: str
    rope: str
    head: str  # "tied": read from the embedding if the checkpoint has none; "config": if config.json says so
    multimodal: bool
    moe: bool
    particular: tuple[str, ...]
    loader_differences: tuple[str, ...]


def families() -> list[Family]:
    """All families, in the order of the table."""
    return [describe(arch) for arch in ARCHITECTURES.values()]


def describe(arch: Arch) -> Family:
    """One family in words."""
    norm = _NORMS[arch.norm.kind] + (" + 1" if arch.norm.offset else "") + (", bias" if arch.norm.bias else "")
    kind = "experts" if arch.moe else "gated" if arch.output.gate is not None else "plain"
    return Family(
        arch.name,
        norm,
        f"{kind}, {arch.activation}",
        "learned positions" if arch.rope == "none" else arch.rope,
        "tied" if arch.tied else "config",
        bool(arch.copied),
        arch.moe,
        tuple(_particular(arch)),
        arch.loader_differences,
    )


def _particular(arch: Arch) -> list[str]:
    found = {
        f"written as {arch.loads_as}": arch.loads_as,
        "parallel block": arch.parallel,
        "post-norms": arch.output.attn_post_norm is not None,
        _head_norm(arch): arch.head_norm is not None,
        "q, k, v in one matrix": arch.qkv == "fused",
        "q, k, v interleaved in one matrix": arch.qkv == "interleaved",
        "gate and up in one matrix": arch.gate_up_fused,
        "experts in one tensor": arch.experts_fused,
        "weights stored (in, out)": arch.linears_transposed,
        "bias on q, k, v": arch.bias_qkv,
        "bias on o": arch.bias_o,
        "bias in the MLP": arch.bias_mlp,
        "one key/value head": arch.single_kv_head,
        f"RoPE base {arch.local_rope_theta or 0:g} on sliding layers": arch.local_rope_theta is not None,
        "RoPE on sliding layers only": arch.rope_on == "sliding",
        "alternating sliding windows": arch.window is not None and arch.window.kind == "pattern",
        "embedding times sqrt(hidden)": arch.sqrt_hidden_embedding,
        "logits scaled by width": arch.scaled_by_model_base,
        "q, k, v clamped": arch.qkv_clip_key is not None,
        "residual stream in float32": arch.float32_states,
        "noise rows in calibration": arch.noise_rows is not None,
        "needs BOS": arch.needs_bos,
    }
    return [text for text, holds in found.items() if holds]


def _head_norm(arch: Arch) -> str:
    rule = arch.head_norm
    if rule is None:
        return ""
    return f"{_NORMS[rule.kind]} norm on q and k" + ("" if rule.always else " if use_qk_norm")


def show(found: list[Family]) -> None:
    """Prints a table of the families, and what loaders compute in another way."""
    columns = ["architecture", "norm", "MLP", "RoPE", "head", "vision", "particular"]
    rows = [
        [f.name, f.norm, f.mlp, f.rope, f.head, "copied" if f.multimodal else "", "; ".join(f.particular)] for f in found
    ]
    show_table(f"{len(found)} architectures", columns, rows)
    print()
    show_text(
        "head: tied = read from the embedding, config = if tie_word_embeddings says so. Every family: multipliers and "
        "softcaps of the config, biases by attention_bias and mlp_bias, RoPE scaling linear, llama3, yarn, longrope."
    )
    print()
    show_text("where ExLlamaV2 computes something else than the model defines (a conversion warns where it applies):")
    differences: dict[str, list[str]] = {}
    for family in found:
        for text in family.loader_differences:
            differences.setdefault(text, []).append(family.name)
    for text, names in differences.items():
        show_text(text, "  ")
        show_text(", ".join(names), "    ")
