"""Tiny random models of every family, built with transformers, and their states block by block.

Sizes are all different (hidden 96, heads * head_dim 128, MLP 160 or 64, vocabulary 259) and norms and biases random, so
that a swapped dimension, a missing bias or a missing weight offset cannot hide. ORACLE_SCALE in the environment multiplies
the widths, for runtimes whose kernels want larger ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, edit_config
from torch import Tensor

torch.set_num_threads(1)

SCALE = int(os.environ.get("ORACLE_SCALE", "1"))
HIDDEN, HEAD_DIM, WIDE, EXPERT_WIDE = (SCALE * n for n in (96, 32, 160, 64))
HEADS, KV_HEADS, VOCAB, LAYERS = 4, 2, 259, 2
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
    """Random weights of unit gain; norm weights around their neutral value, biases not zero.

    Embeddings that are also the head, or that the model scales up, have columns of unit length: otherwise every token would
    predict itself with certainty, and nothing in between could be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    offset = type(model).__name__.startswith("Gemma")
    short = type(model).__name__.startswith(("Gemma", "GPT", "Granite"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1 or "q_norm" in name or "k_norm" in name:
                neutral = 0.0 if name.endswith("bias") or offset else 1.0
                p.copy_(neutral + 0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                p.copy_(noise * p.shape[-1] ** -0.5 if short and "wpe" not in name else noise)
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


Tensors = dict[str, Tensor]


def mapped(
    base: Callable[[Path], Oracle],
    architecture: str,
    store: Callable[[Tensors], Tensors],
    prepare: Callable[[Any], None] = lambda model: None,
    **config_changes: Any,
) -> Callable[[Path], Oracle]:
    """A family whose weights are another family's under other names: saved, then rewritten as the family stores them.

    store: the tensors of the base checkpoint -> those of the family; prepare edits the oracle after that.
    """

    def build(path: Path) -> Oracle:
        oracle = base(path)
        tensors = store(load_file(path / "model.safetensors"))
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
        edit_config(path, architectures=[architecture], **config_changes)
        with torch.no_grad():
            prepare(oracle.model)
        return oracle

    return build


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def store(tensors: Tensors) -> Tensors:
        out = {}
        for name, tensor in tensors.items():
            for old, new in pairs:
                name = name.replace(old, new)
            out[name] = tensor
        return out

    return store


def llama(**changes: Any) -> Callable[[Path], Oracle]:
    return direct("LlamaConfig", "LlamaForCausalLM", **{**SIZES, "rms_norm_eps": 1e-5, **changes})


def orion(path: Path) -> Oracle:
    """Llama with LayerNorms that have a bias."""
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5)).eval()
    norm = lambda: torch.nn.LayerNorm(HIDDEN, eps=1e-5)  # noqa: E731
    for layer in hf.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
    hf.model.norm = norm()
    randomize(hf)
    hf.save_pretrained(path)
    edit_config(path, architectures=["OrionForCausalLM"])
    return Oracle(hf, path)


def internlm2_tensors(tensors: Tensors) -> Tensors:
    """Llama's q, k, v interleaved by key/value group, and InternLM2's names."""
    out = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            q = tensor.reshape(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, HIDDEN)
            k, v = (tensors[name.replace("q_proj", f"{x}_proj")].reshape(KV_HEADS, 1, HEAD_DIM, HIDDEN) for x in "kv")
            tensor = torch.cat((q, k, v), dim=1).reshape(-1, HIDDEN)
            name = name.replace("self_attn.q_proj", "attention.wqkv")
        out[name] = tensor
    return renamed(
        ("lm_head", "output"),
        ("embed_tokens", "tok_embeddings"),
        ("self_attn.o_proj", "attention.wo"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
    )(out)


def swiglu_fused(tensors: Tensors) -> Tensors:
    """Llama with gate and up in one matrix, and the names of the SwiGLU kernels."""
    out = {}
    for name, tensor in tensors.items():
        if "up_proj" in name:
            continue
        if "gate_proj" in name:
            tensor = torch.cat((tensor, tensors[name.replace("gate_proj", "up_proj")]))
        out[name.replace("gate_proj", "swiglu.w12").replace("down_proj", "swiglu.w3")] = tensor
    return out


def normalize_head(model: Any) -> None:
    model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))


def gemmoe_tensors(tensors: Tensors) -> Tensors:
    """Gemma's rules around Mixtral's experts: norm weights stored minus one, no head, short embeddings (`randomize`)."""
    out = {k: v - 1 if "norm" in k else v for k, v in tensors.items() if not k.startswith("lm_head")}
    return {k: v * HIDDEN**-0.5 if "embed" in k else v for k, v in out.items()}


def gemmoe_rules(model: Any) -> None:
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight.copy_(embedding * HIDDEN**-0.5)


MIXTRAL = {**SIZES, "intermediate_size": EXPERT_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **SIZES,
    "moe_intermediate_size": EXPERT_WIDE,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
GEMMA2 = {**SIZES, "query_pre_attn_scalar": 24, "sliding_window": 5}
GPT = {
    "n_embd": HIDDEN,
    "n_inner": WIDE,
    "n_layer": LAYERS,
    "n_head": 3,
    "n_positions": 128,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
DBRX = {
    "d_model": HIDDEN,
    "n_heads": 6,
    "n_layers": LAYERS,
    "max_seq_len": 128,
    "vocab_size": VOCAB,
    "rope_theta": 20000.0,
    "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 0.8, "rope_theta": 20000.0},
    "ffn_config": {"ffn_hidden_size": EXPERT_WIDE, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_implementation": "eager",
}
# Families without head_dim in their config: 6 heads of 16, two key/value heads.
NO_DIM = {**{k: v for k, v in SIZES.items() if k != "head_dim"}, "num_attention_heads": 6}
TEXT = {k: v for k, v in SIZES.items() if k != "attn_implementation"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
}
PIXTRAL = {
    "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
    "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
MROPE = {"rope_type": "default", "mrope_section": [2 * SCALE, 3 * SCALE, 3 * SCALE], "rope_theta": 30000.0}
QWEN2_VL = {"text_config": {**NO_DIM, "rope_parameters": MROPE}, "attn_implementation": "eager"}
GEMMA3_TEXT = {
    **TEXT,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
QWEN2_VISION = {"depth": 1, "num_heads": 2, "patch_size": 14}

ORACLES: dict[str, Callable[[Path], Oracle]] = {
    "LlamaForCausalLM": llama(),
    "MistralForCausalLM": direct("MistralConfig", "MistralForCausalLM", **SIZES, sliding_window=None),
    "MixtralForCausalLM": direct("MixtralConfig", "MixtralForCausalLM", **MIXTRAL),
    "Qwen2ForCausalLM": direct("Qwen2Config", "Qwen2ForCausalLM", **SIZES),
    "Qwen3ForCausalLM": direct("Qwen3Config", "Qwen3ForCausalLM", **SIZES),
    "Qwen3MoeForCausalLM": direct("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **QWEN3_MOE),
    "GemmaForCausalLM": direct("GemmaConfig", "GemmaForCausalLM", **SIZES),
    "Gemma2ForCausalLM": direct("Gemma2Config", "Gemma2ForCausalLM", **GEMMA2),
    "Gemma3ForConditionalGeneration": direct(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        text_config=GEMMA3_TEXT,
        vision_config=VISION,
        attn_implementation="eager",
    ),
    "Gemma3ForCausalLM": direct(
        "Gemma3TextConfig", "Gemma3ForCausalLM", **GEMMA3_TEXT, attn_implementation="eager"
    ),
    "Phi3ForCausalLM": direct("Phi3Config", "Phi3ForCausalLM", **NO_DIM),
    "CohereForCausalLM": direct("CohereConfig", "CohereForCausalLM", **NO_DIM, logit_scale=0.3),
    "InternLM2ForCausalLM": mapped(llama(), "InternLM2ForCausalLM", internlm2_tensors),
    "Starcoder2ForCausalLM": direct("Starcoder2Config", "Starcoder2ForCausalLM", **NO_DIM, sliding_window=None),
    "GPTBigCodeForCausalLM": direct("GPTBigCodeConfig", "GPTBigCodeForCausalLM", **GPT),
    "GraniteForCausalLM": direct(
        "GraniteConfig",
        "GraniteForCausalLM",
        **NO_DIM,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.11,
        logits_scaling=5.0,
    ),
    "Glm4ForCausalLM": direct("Glm4Config", "Glm4ForCausalLM", **SIZES, attention_bias=True),
    "Mistral3ForConditionalGeneration": direct("Mistral3Config", "Mistral3ForConditionalGeneration", **PIXTRAL),
    "LlavaForConditionalGeneration": direct("LlavaConfig", "LlavaForConditionalGeneration", **PIXTRAL),
    "Qwen2VLForConditionalGeneration": direct(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        **QWEN2_VL,
        vision_config={**QWEN2_VISION, "embed_dim": 32, "hidden_size": HIDDEN},
    ),
    "Qwen2_5_VLForConditionalGeneration": direct(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        **QWEN2_VL,
        vision_config={**QWEN2_VISION, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": HIDDEN},
    ),
    "Cohere2ForCausalLM": direct(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        **SIZES,
        logit_scale=0.3,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "YiForCausalLM": mapped(
        llama(), "YiForCausalLM", renamed(("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2"))
    ),
    "OrionForCausalLM": orion,
    "IndexForCausalLM": mapped(llama(), "IndexForCausalLM", renamed(), normalize_head, norm_head=1),
    "MiniCPMForCausalLM": mapped(
        direct(
            "GraniteConfig",
            "GraniteForCausalLM",
            **NO_DIM,
            embedding_multiplier=12.0,
            residual_multiplier=1.4 / LAYERS**0.5,
            logits_scaling=HIDDEN / 32,
            attention_multiplier=(HIDDEN // 6) ** -0.5,
        ),
        "MiniCPMForCausalLM",
        renamed(),
        embedding_multiplier=None,
        residual_multiplier=None,
        logits_scaling=None,
        attention_multiplier=None,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=32,
    ),
    "GPT2LMHeadModel": direct("GPT2Config", "GPT2LMHeadModel", **GPT),
    "DbrxForCausalLM": direct("DbrxConfig", "DbrxForCausalLM", **DBRX),
    "GemmoeForCausalLM": mapped(
        direct("MixtralConfig", "MixtralForCausalLM", **MIXTRAL, hidden_act="gelu"),
        "GemmoeForCausalLM",
        gemmoe_tensors,
        gemmoe_rules,
    ),
}


def complete_model(name: str, path: Path) -> Oracle:
    """The random model of a family with a tokenizer: a directory that can be converted."""
    oracle = ORACLES[name](path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    if "vision_config" in json.loads((path / "config.json").read_text()):
        (path / "preprocessor_config.json").write_text("{}")
    return oracle
