"""What the tensors of each family are called: in its checkpoints, and in its EXL2 form.

``Names`` of modules, and how multimodal checkpoints lay them out. `exl2ray.model.table` has which family has which.
"""

from __future__ import annotations

from dataclasses import replace

from exl2ray.model.rules import Names

LAYER = "model.layers.{L}."
LLAMA = Names()


def layered(base: Names, **names: str) -> Names:
    """``base`` with other names of what stands in a layer."""
    return replace(base, **{part: LAYER + name for part, name in names.items()})


MIXTRAL = layered(
    LLAMA,
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{E}.w1",
    up="block_sparse_moe.experts.{E}.w3",
    down="block_sparse_moe.experts.{E}.w2",
)
QWEN3_MOE = layered(
    LLAMA,
    router="mlp.gate",
    gate="mlp.experts.{E}.gate_proj",
    up="mlp.experts.{E}.up_proj",
    down="mlp.experts.{E}.down_proj",
)
GEMMA2 = layered(
    LLAMA,
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
QKV = "self_attn.qkv_proj"
PHI3_SOURCE = layered(LLAMA, q=QKV, k=QKV, v=QKV, gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
GLM4 = layered(LLAMA, attn_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm")
COHERE = replace(LLAMA, mlp_norm=None)
STARCODER2 = replace(layered(LLAMA, up="mlp.c_fc", down="mlp.c_proj"), gate=None)
GPT = replace(layered(STARCODER2, attn_norm="ln_1", mlp_norm="ln_2"), positions="model.wpe")
GPT2_SOURCE = Names(
    embed="wte",
    positions="wpe",
    attn_norm="h.{L}.ln_1",
    mlp_norm="h.{L}.ln_2",
    q="h.{L}.attn.c_attn",
    k="h.{L}.attn.c_attn",
    v="h.{L}.attn.c_attn",
    o="h.{L}.attn.c_proj",
    gate=None,
    up="h.{L}.mlp.c_fc",
    down="h.{L}.mlp.c_proj",
    final_norm="ln_f",
)
PLAIN = (("", ""),)
GPT_LAYOUTS = ((("lm_head", "lm_head"), ("", "transformer.")), PLAIN)
INTERNLM2 = layered(
    LLAMA,
    attn_norm="attention_norm",
    mlp_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
)
WQKV = "attention.wqkv"
INTERNLM2_SOURCE = replace(
    layered(INTERNLM2, q=WQKV, k=WQKV, v=WQKV, o="attention.wo"), embed="model.tok_embeddings", head="output"
)
DBRX = layered(MIXTRAL, up="block_sparse_moe.experts.{E}.v1")
DBRX_BLOCK = "transformer.blocks.{L}."
DBRX_SOURCE = Names(
    embed="transformer.wte",
    attn_norm=DBRX_BLOCK + "norm_attn_norm.norm_1",
    mlp_norm=DBRX_BLOCK + "norm_attn_norm.norm_2",
    q=DBRX_BLOCK + "norm_attn_norm.attn.Wqkv",
    k=DBRX_BLOCK + "norm_attn_norm.attn.Wqkv",
    v=DBRX_BLOCK + "norm_attn_norm.attn.Wqkv",
    o=DBRX_BLOCK + "norm_attn_norm.attn.out_proj",
    router=DBRX_BLOCK + "ffn.router.layer",
    gate=DBRX_BLOCK + "ffn.experts.mlp.w1",
    up=DBRX_BLOCK + "ffn.experts.mlp.v1",
    down=DBRX_BLOCK + "ffn.experts.mlp.w2",
    final_norm="transformer.norm_f",
)
YI = layered(LLAMA, attn_norm="ln1", mlp_norm="ln2")

# Multimodal checkpoints: the published layout, and the one of transformers 4.52 and later when it saves its own names.
LANGUAGE_MODEL = (
    (("", "language_model."),),
    (("model.", "model.language_model."), ("lm_head", "lm_head")),
)
PIXTRAL_COPIED = (
    ("multi_modal_projector.", "multi_modal_projector."),
    ("vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
)
# transformers 5 saves Gemma 3's vision tower without "vision_model."; the loader needs it.
GEMMA3_COPIED = tuple(
    (start + old, new)
    for start in ("", "model.")
    for old, new in (
        ("multi_modal_projector.mm_input_projection_weight", "multi_modal_projector.mm_input_projection.weight"),
        ("multi_modal_projector.", "multi_modal_projector."),
        ("vision_tower.vision_model.", "vision_tower.vision_model."),
        ("vision_tower.", "vision_tower.vision_model."),
    )
)
QWEN_VL_LAYOUTS = (PLAIN, LANGUAGE_MODEL[1])
QWEN_VL_COPIED = (("visual.", "visual."), ("model.visual.", "visual."))
