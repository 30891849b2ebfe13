"""The architecture table: the model families that ExLlamaV2 0.3.2 loads, as data.

One ``Arch`` per name that config.json may have in ``architectures``; an entry states only where its family departs from
Llama. docs/adding-an-architecture.md explains how to add one.

Where ExLlamaV2 and the model's own definition (Hugging Face) disagree, the table states the definition, and
``loader_differences`` says what the loader does instead.
"""

from __future__ import annotations

from dataclasses import replace

from exl2ray.model import names
from exl2ray.model.rules import Arch, Fixed, HeadNormRule, NormRule, WindowRule

_LAYER_NORM = NormRule("layer", ("layer_norm_eps",))
_GPT_NORM = NormRule("layer", ("layer_norm_epsilon",), eps=1e-5, bias=True)
_GEMMA_NORM = NormRule("rms", ("rms_norm_eps",), eps=1e-6, offset=1.0)

_WINDOW_IGNORED = "sliding window: the loader ignores it (no effect while rows are not longer than the window)"
_WINDOW_WIDER = "sliding window: the loader lets a query see one key more than the model defines"
_QWEN3_NORM = "q/k norm: the loader subtracts the mean (LayerNorm); the model defines RMSNorm, which is used here"
_MROPE_FP16 = "RoPE: the loader rounds the inverse frequencies to float16"
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
    output=names.GEMMA2,
    source=names.GEMMA2,
    prefix="language_model.",
    source_layouts=names.LANGUAGE_MODEL,
    copied=names.GEMMA3_COPIED,
    head_norm=HeadNormRule("rms", offset=1.0),
    local_rope_theta=10000.0,
    window=WindowRule("pattern", 6),
    float32_states=True,
    factors=("query_pre_attn_scalar",),
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
    source_layouts=names.LANGUAGE_MODEL,
    copied=names.PIXTRAL_COPIED, vision_model="pixtral", text_models=("mistral", "llama", "ministral3", "granite"),
)
_QWEN2_VL_ARCH = replace(
    _QWEN2_ARCH,
    source_layouts=names.QWEN_VL_LAYOUTS,
    copied=names.QWEN_VL_COPIED,
    noise_rows=(5, 30),
    loader_differences=(_WINDOW_IGNORED, _MROPE_FP16),
)
_GPT_BIGCODE_ARCH = Arch(
    "GPTBigCodeForCausalLM",
    output=names.GPT,
    source=names.GPT2_SOURCE,
    source_layouts=names.GPT_LAYOUTS,
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
        output=names.MIXTRAL,
        source=names.MIXTRAL,
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
        output=names.QWEN3_MOE,
        source=names.QWEN3_MOE,
        head_norm=HeadNormRule("rms"),
        window=WindowRule("all", switch="use_sliding_window"),
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
        output=names.GEMMA2,
        source=names.GEMMA2,
        window=WindowRule("pattern", 1, reads_layer_types=False),
        float32_states=True,
        factors=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
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
        factors=("query_pre_attn_scalar", "final_logit_softcapping"),
        source_layouts=(names.PLAIN,),
        copied=(),
    ),
    Arch(
        "Phi3ForCausalLM",
        source=names.PHI3_SOURCE,
        qkv="fused",
        gate_up_fused=True,
        window=WindowRule("all"),
        defaults=(("original_max_position_embeddings", 4096), ("partial_rotary_factor", 1.0)),
        loader_differences=(_WINDOW_IGNORED,),
    ),
    Arch(
        "CohereForCausalLM",
        output=names.COHERE,
        source=names.COHERE,
        norm=_LAYER_NORM,
        head_norm=HeadNormRule("layer", per_head=True, always=False),
        rope="gptj",
        tied=True,
        needs_bos=True,
        factors=("logit_scale",),
        defaults=(("logit_scale", 0.0625), ("rope_theta", 500000.0), ("layer_norm_eps", 1e-5)),
    ),
    Arch(
        "InternLM2ForCausalLM",
        output=names.INTERNLM2,
        source=names.INTERNLM2_SOURCE,
        qkv="interleaved",
        fixed=(Fixed("bias", (False,), "the loader expects no bias in attention"),),
    ),
    Arch(
        "Starcoder2ForCausalLM",
        output=names.STARCODER2,
        source=names.STARCODER2,
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
        factors=("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"),
        defaults=(("attention_multiplier", 1.0),),
        loader_differences=("residual multiplier: the loader does not apply it to biases of o_proj and down_proj",),
    ),
    Arch(
        "Glm4ForCausalLM",
        output=names.GLM4,
        source=names.layered(names.GLM4, gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
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
        output=names.COHERE,
        source=names.COHERE,
        norm=_LAYER_NORM,
        rope="gptj",
        rope_on="sliding",
        window=WindowRule("pattern", 4),
        tied=True,
        needs_bos=True,
        factors=("logit_scale",),
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
    Arch("YiForCausalLM", output=names.YI, source=names.YI),
    Arch("OrionForCausalLM", norm=NormRule("layer", ("rms_norm_eps",), bias=True)),
    Arch("IndexForCausalLM", factors=("norm_head",)),
    Arch("MiniCPMForCausalLM", scaled_by_model_base=True, factors=("scale_emb", "scale_depth")),
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
        output=names.DBRX,
        source=names.DBRX_SOURCE,
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
        output=names.MIXTRAL,
        source=names.MIXTRAL,
        activation="gelu",
        loader_differences=("activation: the loader decodes with tanh GELU and prefills with the exact form",),
    ),
)

ARCHITECTURES: dict[str, Arch] = {a.name: a for a in _ENTRIES}
