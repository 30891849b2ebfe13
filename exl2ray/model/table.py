"""The architecture table: the model families that ExLlamaV2 0.3.2 loads, as data.

One ``Arch`` per name that config.json may have in ``architectures``; an entry states only where its family departs from
Llama. docs/adding-an-architecture.md explains how to add one.

Where ExLlamaV2 and the model's own definition (Hugging Face) disagree, the table states the definition, and
``loader_differences`` says what the loader does instead.
"""

from __future__ import annotations

from dataclasses import replace

from exl2ray.model.rules import Arch, Fixed, HeadNormRule, Names, NormRule, WindowRule

_LAYER = "model.layers.{L}."
_LLAMA = Names()

def _layered(base: Names, **names: str) -> Names:
    """``base`` with other names of what stands in a layer."""
    return replace(base, **{part: _LAYER + name for part, name in names.items()})


_MIXTRAL = _layered(
    _LLAMA,
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{E}.w1",
    up="block_sparse_moe.experts.{E}.w3",
    down="block_sparse_moe.experts.{E}.w2",
)
_QWEN3_MOE = _layered(
    _LLAMA,
    router="mlp.gate",
    gate="mlp.experts.{E}.gate_proj",
    up="mlp.experts.{E}.up_proj",
    down="mlp.experts.{E}.down_proj",
)
_GEMMA2 = _layered(
    _LLAMA,
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_QKV = "self_attn.qkv_proj"
_PHI3_SOURCE = _layered(_LLAMA, q=_QKV, k=_QKV, v=_QKV, gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
_GLM4 = _layered(_LLAMA, attn_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm")
_COHERE = replace(_LLAMA, mlp_norm=None)
_STARCODER2 = replace(_layered(_LLAMA, up="mlp.c_fc", down="mlp.c_proj"), gate=None)
_GPT = replace(_layered(_STARCODER2, attn_norm="ln_1", mlp_norm="ln_2"), positions="model.wpe")
_GPT2_SOURCE = Names(
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
_PLAIN = (("", ""),)
_GPT_LAYOUTS = ((("lm_head", "lm_head"), ("", "transformer.")), _PLAIN)
_INTERNLM2 = _layered(
    _LLAMA,
    attn_norm="attention_norm",
    mlp_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
)
_WQKV = "attention.wqkv"
_INTERNLM2_SOURCE = replace(
    _layered(_INTERNLM2, q=_WQKV, k=_WQKV, v=_WQKV, o="attention.wo"), embed="model.tok_embeddings", head="output"
)
_DBRX = _layered(_MIXTRAL, up="block_sparse_moe.experts.{E}.v1")
_DBRX_BLOCK = "transformer.blocks.{L}."
_DBRX_SOURCE = Names(
    embed="transformer.wte",
    attn_norm=_DBRX_BLOCK + "norm_attn_norm.norm_1",
    mlp_norm=_DBRX_BLOCK + "norm_attn_norm.norm_2",
    q=_DBRX_BLOCK + "norm_attn_norm.attn.Wqkv",
    k=_DBRX_BLOCK + "norm_attn_norm.attn.Wqkv",
    v=_DBRX_BLOCK + "norm_attn_norm.attn.Wqkv",
    o=_DBRX_BLOCK + "norm_attn_norm.attn.out_proj",
    router=_DBRX_BLOCK + "ffn.router.layer",
    gate=_DBRX_BLOCK + "ffn.experts.mlp.w1",
    up=_DBRX_BLOCK + "ffn.experts.mlp.v1",
    down=_DBRX_BLOCK + "ffn.experts.mlp.w2",
    final_norm="transformer.norm_f",
)
_YI = _layered(_LLAMA, attn_norm="ln1", mlp_norm="ln2")

# Multimodal checkpoints: the published layout, and the one of transformers 4.52 and later when it saves its own names.
_LANGUAGE_MODEL = (
    (("", "language_model."),),
    (("model.", "model.language_model."), ("lm_head", "lm_head")),
)
_PIXTRAL_COPIED = (
    ("multi_modal_projector.", "multi_modal_projector."),
    ("vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
)
# transformers 5 saves Gemma 3's vision tower without "vision_model."; the loader needs it.
_GEMMA3_COPIED = tuple(
    (start + old, new)
    for start in ("", "model.")
    for old, new in (
        ("multi_modal_projector.mm_input_projection_weight", "multi_modal_projector.mm_input_projection.weight"),
        ("multi_modal_projector.", "multi_modal_projector."),
        ("vision_tower.vision_model.", "vision_tower.vision_model."),
        ("vision_tower.", "vision_tower.vision_model."),
    )
)
_QWEN_VL_LAYOUTS = (_PLAIN, _LANGUAGE_MODEL[1])
_QWEN_VL_COPIED = (("visual.", "visual."), ("model.visual.", "visual."))

_LAYER_NORM = NormRule("layer", ("layer_norm_eps",))
_GPT_NORM = NormRule("layer", ("layer_norm_epsilon",), eps=1e-5, bias=True)
_GEMMA_NORM = NormRule("rms", ("rms_norm_eps",), eps=1e-6, offset=1.0)

_WINDOW_IGNORED = "sliding window: the loader ignores it (no effect while rows are not longer than the window)"
_WINDOW_WIDER = "sliding window: the loader lets a query see one key more than the model defines"
_QWEN3_NORM = "q/k norm: the loader subtracts the mean (LayerNorm); the model defines RMSNorm, which is used here"
_MROPE_FP16 = "RoPE: the loader rounds the inverse frequencies to float16"
_PHI3_LONGROPE = (
    "longrope: the loader picks long or short factors by the configured context length, not by the length of the "
    "sequence; calibration does as the loader"
)
_DENSE = "the loader treats every layer as mixture of experts"
_MOE_NORM = Fixed("norm_topk_prob", (True,), "the loader always renormalises the routing weights", absent=False)

_LLAMA_ARCH = Arch("LlamaForCausalLM")
_MISTRAL_ARCH = Arch(
    "MistralForCausalLM",
    window=WindowRule("all"),
    loader_differences=(_WINDOW_IGNORED,),
)
_QWEN2_ARCH = Arch(
    "Qwen2ForCausalLM",
    bias_qkv=True,
    window=WindowRule("qwen"),
    loader_differences=(_WINDOW_IGNORED,),
)
_GEMMA_ARCH = Arch(
    "GemmaForCausalLM",
    norm=_GEMMA_NORM,
    activation="gelu_tanh",
    sqrt_hidden_embedding=True,
    tied=True,
    needs_bos=True,
    defaults=(("head_dim", 256),),
)
_GEMMA3_ARCH = replace(
    _GEMMA_ARCH,
    name="Gemma3ForConditionalGeneration",
    text_models=("gemma3_text",),
    output=_GEMMA2,
    source=_GEMMA2,
    prefix="language_model.",
    source_layouts=_LANGUAGE_MODEL,
    copied=_GEMMA3_COPIED,
    head_norm=HeadNormRule("rms", offset=1.0),
    local_rope_theta=10000.0,
    window=WindowRule("pattern", 6),
    float32_states=True,
    defaults=(
        ("vocab_size", 262208),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("rms_norm_eps", 1e-6),
        ("rope_theta", 1e6),
        ("query_pre_attn_scalar", 256),
        ("sliding_window", 4096),
        ("sliding_window_pattern", 6),
    ),
    fixed=(
        Fixed("rope_local_base_freq", (10000.0,), "the loader uses 10000 as RoPE base of sliding layers"),
        Fixed("rope_parameters.sliding_attention.rope_theta", (10000.0,), "the loader uses 10000 on sliding layers"),
        Fixed("rope_parameters.sliding_attention.rope_type", ("default",), "the loader scales no RoPE of sliding layers"),
        Fixed("use_bidirectional_attention", (False,), "the loader's attention is causal"),
    ),
    loader_differences=(_WINDOW_WIDER,),
)
_PIXTRAL_ARCH = replace(
    _MISTRAL_ARCH,
    prefix="language_model.",
    source_layouts=_LANGUAGE_MODEL,
    copied=_PIXTRAL_COPIED, vision_model="pixtral", text_models=("mistral", "llama", "ministral3", "granite"),
)
_QWEN2_VL_ARCH = replace(
    _QWEN2_ARCH,
    source_layouts=_QWEN_VL_LAYOUTS,
    copied=_QWEN_VL_COPIED,
    noise_rows=(5, 30),
    loader_differences=(_WINDOW_IGNORED, _MROPE_FP16),
)
_GPT_BIGCODE_ARCH = Arch(
    "GPTBigCodeForCausalLM",
    output=_GPT,
    source=_GPT2_SOURCE,
    source_layouts=_GPT_LAYOUTS,
    qkv="fused",
    norm=_GPT_NORM,
    activation="gelu_tanh",
    bias_qkv=True,
    bias_o=True,
    bias_mlp=True,
    single_kv_head=True,
    mlp_factor=4,
    rope="none",
    tied=True,
    fixed=(
        Fixed("multi_query", (True,), "the loader assumes one key/value head"),
        Fixed("scale_attn_weights", (True,), "the loader always scales attention scores"),
    ),
)

_ENTRIES = (
    _LLAMA_ARCH,
    _MISTRAL_ARCH,
    replace(
        _MISTRAL_ARCH,
        name="MixtralForCausalLM",
        output=_MIXTRAL,
        source=_MIXTRAL,
        defaults=(("rope_theta", 1e6),),
    ),
    _QWEN2_ARCH,
    Arch(
        "Qwen3ForCausalLM",
        head_norm=HeadNormRule("rms"),
        window=WindowRule("qwen"),
        defaults=(("head_dim", 128),),
        loader_differences=(_QWEN3_NORM, _WINDOW_IGNORED),
    ),
    Arch(
        "Qwen3MoeForCausalLM",
        output=_QWEN3_MOE,
        source=_QWEN3_MOE,
        head_norm=HeadNormRule("rms"),
        window=WindowRule("qwen"),
        fixed=(
            _MOE_NORM,
            Fixed("decoder_sparse_step", (1,), _DENSE),
            Fixed("mlp_only_layers", ([],), _DENSE),
        ),
        loader_differences=(_QWEN3_NORM, _WINDOW_IGNORED),
    ),
    _GEMMA_ARCH,
    replace(
        _GEMMA_ARCH,
        name="Gemma2ForCausalLM",
        output=_GEMMA2,
        source=_GEMMA2,
        window=WindowRule("pattern", 1),
        float32_states=True,
        defaults=(
            ("head_dim", 256),
            ("query_pre_attn_scalar", 256),
            ("sliding_window", 4096),
            ("attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", 30.0),
        ),
        loader_differences=(_WINDOW_WIDER,),
    ),
    _GEMMA3_ARCH,
    # The loader runs this name as a Llama. The same text model inside the multimodal one's names is loaded correctly.
    replace(
        _GEMMA3_ARCH,
        name="Gemma3ForCausalLM",
        loads_as="Gemma3ForConditionalGeneration",
        source_layouts=(_PLAIN,),
        copied=(),
    ),
    Arch(
        "Phi3ForCausalLM",
        source=_PHI3_SOURCE,
        qkv="fused",
        gate_up_fused=True,
        window=WindowRule("all"),
        defaults=(("original_max_position_embeddings", 4096), ("partial_rotary_factor", 1.0)),
        loader_differences=(_WINDOW_IGNORED, _PHI3_LONGROPE),
    ),
    Arch(
        "CohereForCausalLM",
        output=_COHERE,
        source=_COHERE,
        norm=_LAYER_NORM,
        head_norm=HeadNormRule("layer", per_head=True, always=False),
        rope="gptj",
        tied=True,
        needs_bos=True,
        defaults=(("logit_scale", 0.0625), ("rope_theta", 500000.0), ("layer_norm_eps", 1e-5)),
    ),
    Arch(
        "InternLM2ForCausalLM",
        output=_INTERNLM2,
        source=_INTERNLM2_SOURCE,
        qkv="interleaved",
        fixed=(Fixed("bias", (False,), "the loader expects no bias in attention"),),
    ),
    Arch(
        "Starcoder2ForCausalLM",
        output=_STARCODER2,
        source=_STARCODER2,
        norm=NormRule("layer", ("layer_norm_epsilon", "norm_epsilon"), bias=True),
        activation="gelu_tanh",
        bias_qkv=True,
        bias_o=True,
        bias_mlp=True,
        window=WindowRule("all"),
        tied=True,
        fixed=(Fixed("use_bias", (True,), "the loader requires biases on every linear"),),
        loader_differences=(_WINDOW_IGNORED,),
    ),
    _GPT_BIGCODE_ARCH,
    Arch(
        "GraniteForCausalLM",
        defaults=(("attention_multiplier", 1.0),),
        loader_differences=("residual multiplier: the loader does not apply it to biases of o_proj and down_proj",),
    ),
    Arch(
        "Glm4ForCausalLM",
        output=_GLM4,
        source=_layered(_GLM4, gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
        gate_up_fused=True,
        attention_bias_o=False,
        rope="gptj",
        defaults=(("head_dim", 128), ("partial_rotary_factor", 0.5)),
    ),
    replace(_PIXTRAL_ARCH, name="Mistral3ForConditionalGeneration", defaults=(("tie_word_embeddings", True),)),
    replace(_PIXTRAL_ARCH, name="LlavaForConditionalGeneration"),
    replace(_QWEN2_VL_ARCH, name="Qwen2VLForConditionalGeneration"),
    replace(_QWEN2_VL_ARCH, name="Qwen2_5_VLForConditionalGeneration"),
    Arch(
        "Cohere2ForCausalLM",
        output=_COHERE,
        source=_COHERE,
        norm=_LAYER_NORM,
        rope="gptj",
        rope_on="sliding",
        window=WindowRule("pattern", 4),
        tied=True,
        needs_bos=True,
        defaults=(
            ("logit_scale", 0.0625),
            ("layer_norm_eps", 1e-5),
            ("sliding_window", 4096),
            ("sliding_window_pattern", 4),
        ),
        loader_differences=(
            "positions: the loader applies RoPE on every layer; the model defines none on full-attention layers",
            _WINDOW_WIDER,
        ),
    ),
    Arch("YiForCausalLM", output=_YI, source=_YI),
    Arch("OrionForCausalLM", norm=NormRule("layer", ("rms_norm_eps",), bias=True)),
    Arch("IndexForCausalLM"),
    Arch("MiniCPMForCausalLM", scaled_by_model_base=True),
    replace(
        _GPT_BIGCODE_ARCH,
        name="GPT2LMHeadModel",
        linears_transposed=True,
        single_kv_head=False,
        fixed=(
            Fixed("scale_attn_weights", (True,), "the loader always scales attention scores"),
            Fixed("scale_attn_by_inverse_layer_idx", (False,), "the loader does not scale attention by layer"),
        ),
    ),
    Arch(
        "DbrxForCausalLM",
        output=_DBRX,
        source=_DBRX_SOURCE,
        qkv="fused",
        experts_fused=True,
        norm=NormRule("layer", (), eps=1e-5),
        qkv_clip_key="attn_config.clip_qkv",
        fixed=(
            Fixed("ffn_config.ffn_act_fn.name", ("silu",), "the loader runs the experts with SiLU"),
            Fixed("ffn_config.moe_normalize_expert_weights", (1,), "the loader always normalises routing weights to sum 1"),
        ),
        loader_differences=("clip_qkv: the loader does not clamp q, k and v; the model does",),
    ),
    replace(
        _GEMMA_ARCH,
        name="GemmoeForCausalLM",
        output=_MIXTRAL,
        source=_MIXTRAL,
        activation="gelu",
        loader_differences=("activation: the loader decodes with tanh GELU and prefills with the exact form",),
    ),
)

ARCHITECTURES: dict[str, Arch] = {a.name: a for a in _ENTRIES}
