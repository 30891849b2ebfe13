"""Tiny random models of every family, built with transformers, and their states block by block.

Sizes are all different (hidden 96, heads * head_dim 128, MLP 160 or 64, vocabulary 259) and norms and biases random, so
that a swapped dimension, a missing bias or a missing weight offset cannot hide.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

torch.set_num_threads(1)

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE, EXPERT_WIDE, VOCAB, LAYERS = 96, 4, 2, 32, 160, 64, 259, 2
LENGTH = 13  # tokens of a test row
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Oracle:
    """A transformers model and the directory in which its checkpoint lies."""

    model: Any
    path: Path

    def run(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """([embedding output, output of each layer, final norm output], logits), float32."""
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None) or decoder.blocks
        norm = getattr(decoder, "norm", None) or getattr(decoder, "ln_f", None) or decoder.norm_f
        states: list[Tensor] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])

        def after(module: Any, args: Any, out: Any) -> None:
            states.append(out[0] if isinstance(out, tuple) else out)

        hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [m.register_forward_hook(after) for m in (*layers, norm)]
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return [s.detach().float() for s in states], logits.float()


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of unit gain; norm weights around their neutral value, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    offset = type(model).__name__.startswith("Gemma")
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1 or "q_norm" in name or "k_norm" in name:
                neutral = 0.0 if name.endswith("bias") or offset else 1.0
                p.copy_(neutral + 0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * p.shape[-1] ** -0.5)


def direct(config: str, model: str, **changes: Any) -> Callable[[Path], Oracle]:
    """A family that transformers has: built, saved by save_pretrained."""

    def build(path: Path) -> Oracle:
        hf = getattr(transformers, model)(getattr(transformers, config)(**changes)).eval()
        randomize(hf)
        hf.save_pretrained(path)
        return Oracle(hf, path)

    return build


def mapped(
    base: Callable[[Path], Oracle],
    architecture: str,
    rename: Callable[[str, Tensor], dict[str, Tensor]],
    prepare: Callable[[Any], None] = lambda model: None,
    **config_changes: Any,
) -> Callable[[Path], Oracle]:
    """A family whose weights are another family's under other names: saved, then rewritten as the family stores them.

    rename(name, tensor) -> the tensors to store; prepare edits the oracle after its weights were saved.
    """

    def build(path: Path) -> Oracle:
        oracle = base(path)
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path / "model.safetensors").items():
            tensors.update(rename(name, tensor))
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        config = {k: v for k, v in config.items() if k not in config_changes}
        config.update({"architectures": [architecture], **config_changes})
        (path / "config.json").write_text(json.dumps(config))
        prepare(oracle.model)
        return oracle

    return build


def replaced(*pairs: tuple[str, str]) -> Callable[[str, Tensor], dict[str, Tensor]]:
    def rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
        for old, new in pairs:
            name = name.replace(old, new)
        return {name: tensor}

    return rename


def llama(**changes: Any) -> Callable[[Path], Oracle]:
    return direct("LlamaConfig", "LlamaForCausalLM", **{**SIZES, "rms_norm_eps": 1e-5, **changes})


MIXTRAL = {**SIZES, "intermediate_size": EXPERT_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}

ORACLES: dict[str, Callable[[Path], Oracle]] = {
    "LlamaForCausalLM": llama(),
    "MistralForCausalLM": direct("MistralConfig", "MistralForCausalLM", **SIZES, sliding_window=None),
    "MixtralForCausalLM": direct("MixtralConfig", "MixtralForCausalLM", **MIXTRAL),
    "Qwen2ForCausalLM": direct("Qwen2Config", "Qwen2ForCausalLM", **SIZES),
    "Qwen3ForCausalLM": direct("Qwen3Config", "Qwen3ForCausalLM", **SIZES),
}
