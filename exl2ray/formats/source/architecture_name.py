"""``architectures`` of config.json: the name that counts, where it is absent or not one that loaders know.

transformers chooses the class of a model by ``model_type``; ``architectures`` is what ExLlamaV2 reads. A config without
the second, or with the name of a class that somebody derived, is what transformers makes of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exl2ray.errors import SourceError, UnknownArchitectureError

BY_MODEL_TYPE = {
    "Yi": "YiForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemmoe": "GemmoeForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "granite": "GraniteForCausalLM",
    "index": "IndexForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "minicpm": "MiniCPMForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "orion": "OrionForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
KNOWN = frozenset(BY_MODEL_TYPE.values())
TASKS = {  # end of a class's name -> what its model does
    "ForSequenceClassification": "a classifier or reward model, whose head gives scores and not words",
    "ForTokenClassification": "a tagger, whose head gives labels and not words",
    "ForQuestionAnswering": "a model that marks answers in a text, without a head for words",
    "ForMaskedLM": "an encoder that fills gaps; EXL2 holds models that go on with a text",
    "ForImageClassification": "a vision model, not a language model",
    "ForSpeechSeq2Seq": "a model for speech, not a language model",
    "RewardModel": "a reward model, whose head gives scores and not words",
}


def resolved(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """(config with one name in ``architectures``, notes).

    An unknown name is replaced only if model_type is known. Raises SourceError if no name can be told, and
    UnknownArchitectureError for classes of other tasks. ``where``: the file, for messages.
    """
    given, kind = config.get("architectures"), config.get("model_type")
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    names = list(dict.fromkeys(n for n in names if isinstance(n, str)))
    implied = BY_MODEL_TYPE.get(kind) if isinstance(kind, str) else None
    if len(names) == 1:
        for end, what in TASKS.items():
            if names[0].endswith(end):
                raise UnknownArchitectureError(
                    f"{where}: {names[0][:80]} is {what}", "convert the language model that it was made from"
                )
        if names[0] in KNOWN or implied is None:
            return {**config, "architectures": names}, _disagreement(names[0], kind, implied, where)
        note = f"{where}: architectures is {names[0][:80]!r}, which loaders do not know"
        return {**config, "architectures": [implied]}, [f"{note}; by its model_type {kind!r} it is {implied}"]
    if len(names) > 1:
        text = ", ".join(n[:40] for n in names[:5])
        raise SourceError(f"{where}: architectures has {len(names)} names ({text})", "leave the one that the weights are of")
    if implied is not None:
        note = f"{where}: architectures is absent; by its model_type {kind!r} it is {implied}"
        return {**config, "architectures": [implied]}, [note]
    found = f"architectures is {str(given)[:80]}, and model_type {str(kind)[:40]!r} is not one that can be converted"
    raise SourceError(
        f"{where}: {found}",
        'add the class of the model, as its original config.json has it, e.g. "architectures": ["LlamaForCausalLM"]',
    )


def _disagreement(name: str, kind: Any, implied: str | None, where: str) -> list[str]:
    """A note where transformers runs another family than ``architectures`` says."""
    if implied is None or name == implied or name not in KNOWN:
        return []
    if {name, implied} == {"LlamaForCausalLM", "YiForCausalLM"}:
        return []
    said = f"{where}: architectures says {name}, model_type {kind!r} says {implied}"
    return [f"{said}; converted as {name}, as ExLlamaV2 loads it"]


def unknown_hint(config: Mapping[str, Any], supported: str) -> str:
    """What to do about an architecture that is not in the table."""
    if config.get("is_encoder_decoder") is True:
        return "it has an encoder and a decoder; EXL2 holds decoders only"
    names = [n for n in config.get("architectures") or [] if isinstance(n, str)]
    if "vision_config" not in config and any(w in n for n in names for w in ("Vision", "CLIP", "Siglip", "ViT")):
        return "it is a vision model; EXL2 holds language models"
    if any(n.startswith(("Bert", "Roberta", "XLMRoberta", "DistilBert", "NomicBert", "Deberta")) for n in names):
        return "it is an encoder, as for embeddings; EXL2 holds models that go on with a text"
    return supported
