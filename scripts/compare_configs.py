#!/usr/bin/env python3
"""Changes every key of config.json in turn, and compares the logits with those of transformers.

    python scripts/compare_configs.py                          # all families that transformers has; minutes
    python scripts/compare_configs.py LlamaForCausalLM --keys rope_scaling sliding_window

For each family a tiny random model (tests/oracles.py); for each key of its config, and for keys that other families have,
values that mean something, values that mean nothing, and none. In multimodal configs a key is set inside of text_config and
beside it. A line for each finding: logits differ and no warning says so ("silent"), or something else than an error of
exl2ray was raised ("crash"). The exit status is 1 if there is any that is not in ``KNOWN``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from oracles import ORACLES, VOCAB  # noqa: E402
from torch import Tensor  # noqa: E402

from exl2ray.errors import Exl2RayError  # noqa: E402
from exl2ray.formats.hf import SourceModel  # noqa: E402
from exl2ray.model.arch import load_spec  # noqa: E402
from exl2ray.model.blocks import load_block  # noqa: E402

LENGTH = 24  # tokens: longer than the windows and the shortest contexts below
DIFFERENT = 2e-4  # of the norm of the logits
ABSENT = "<absent>"
ROPE: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {"rope_type": "default"}, {"factor": 2.0},
    {"type": "mrope", "mrope_section": [2, 3, 3]}, {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}, {"rope_type": "spiral"}, {},
]  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
# Keys that some family has, and what may stand there. A config's own keys get more values by their type (`_of_type`).
VALUES: dict[str, list[Any]] = {
    "rope_scaling": ROPE, "rope_parameters": ROPE, "rope_theta": [5000.0, 1e6, "10000"],
    "partial_rotary_factor": [0.5], "rope_local_base_freq": [5000.0], "max_position_embeddings": [8, 65536],
    "original_max_position_embeddings": [8], "head_dim": [None, 16], "num_key_value_heads": [None, 4],
    "attention_bias": [True, False], "mlp_bias": [True, False], "use_qk_norm": [True], "use_bias": [True, False],
    "sliding_window": [4, None], "use_sliding_window": [True, False], "max_window_layers": [0, 1],
    "sliding_window_pattern": [2, 3], "layer_types": [[SLIDING, FULL], [FULL, SLIDING], [FULL, FULL]],
    "attn_logit_softcapping": [5.0], "final_logit_softcapping": [5.0], "query_pre_attn_scalar": [48], "logit_scale": [0.5],
    "logits_scaling": [2.0], "attention_multiplier": [0.5], "residual_multiplier": [0.5], "embedding_multiplier": [2.0],
    "scale_emb": [2.0], "scale_depth": [1.4], "norm_head": [1], "clip_qkv": [0.2],
    "hidden_act": ["gelu", "relu", "silu", "swish", "gelu_pytorch_tanh"], "hidden_activation": ["gelu", "silu"],
    "rms_norm_eps": [1e-3], "layer_norm_eps": [1e-3], "layer_norm_epsilon": [1e-3], "norm_epsilon": [1e-3],
    "norm_topk_prob": [True, False], "num_experts_per_tok": [1, 3], "tie_word_embeddings": [True, False],
    "scale_attn_weights": [False], "scale_attn_by_inverse_layer_idx": [True], "decoder_sparse_step": [2],
    "mlp_only_layers": [[0]], "is_causal": [False], "use_bidirectional_attention": [True], "model_type": ["llama", "mistral"],
}  # fmt: skip
STRUCTURE = {"architectures", "dtype", "text_config", "torch_dtype", "transformers_version", "vision_config"}
ANY = "any value"
# What is known, and why it stays: part of a family's name, key, value, reason.
KNOWN: list[tuple[str, str, Any, str]] = [
    ("Gemma3", "rope_parameters", ANY, "flat, and the class takes what has an entry for each type of layer"),
    ("Gemma3", "rope_scaling", ANY, "beside rope_parameters of two types, or with `type`, for which the class does not look"),
    ("VLFor", "rope_scaling", ANY, "without a base, beside rope_parameters that has one, which the class leaves out then"),
    ("Granite", "attention_multiplier", 0.0, "the loader takes 0 for none"),
    ("Granite", "logits_scaling", 0.0, "the loader takes 0 for none"),
    ("Granite", "residual_multiplier", 0.0, "the loader takes 0 for none"),
    ("Gemma2", "attn_logit_softcapping", 0.0, "transformers divides by it"),
    ("Gemma2", "final_logit_softcapping", 0.0, "transformers divides by it"),
    ("", "sliding_window", 0, "transformers masks everything"),
    ("Dbrx", "rope_parameters", ANY, "beside two more bases, of which class and loader take different ones"),
    ("Dbrx", "rope_scaling", ANY, "beside two more bases, of which class and loader take different ones"),
    ("Dbrx", "num_experts_per_tok", ANY, "beside ffn_config.moe_top_k, which is what the class reads"),
    ("Mistral3", "model_type", None, "transformers takes another class for the text"),
]


@dataclass(frozen=True)
class Finding:
    """what: "silent" or "crash". said: the difference, or the exception."""

    family: str
    key: str
    value: Any
    place: str
    what: str
    said: str

    @property
    def reason(self) -> str:
        """Why it is left as it is; empty for one that is new."""
        here = (r for part, key, value, r in KNOWN if part in self.family and key == self.key and value in (ANY, self.value))
        return next(here, "")

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        known = f"; known: {self.reason}" if self.reason else ""
        return f"{self.what} {self.family}{where}: {self.key} {self.value!r}: {self.said}{known}"


def changes(config: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """(key, value, place) of every change; ``keys``: none for all."""
    part = config.get("text_config", config)
    for key in dict.fromkeys([*part, *VALUES]):
        if key in STRUCTURE or (keys and key not in keys):
            continue
        seen: list[Any] = []
        for value in [*VALUES.get(key, []), *([*_of_type(part[key]), ABSENT] if key in part else [])]:
            if value in seen or (key in part and part[key] == value and type(part[key]) is type(value)):
                continue
            seen.append(value)
            yield key, value, "text_config" if part is not config else ""
            if part is not config and key in VALUES and value != ABSENT:
                yield key, value, "beside"


def _of_type(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value // 2, 0]
    return [value * 2, value / 2, 0.0] if isinstance(value, float) else [None]


def ours(path: Path, ids: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """(logits, warnings)"""
    source = SourceModel(path)
    spec, x = load_spec(source), ids
    for module in spec.modules:
        x = load_block(spec, module, source, "cpu", torch.float32, state_dtype=torch.float32).forward(x)
    return x.float(), spec.warnings


def theirs(model: Any, path: Path, ids: Tensor) -> Tensor | None:
    """None where transformers refuses the config, or finds no weights for it."""
    try:
        found, loaded = model.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if any(loaded.get(k) for k in ("missing_keys", "mismatched_keys", "unexpected_keys")):
            return None
        with torch.no_grad():
            return torch.as_tensor(found.eval()(input_ids=ids, use_cache=False).logits.float())
    except Exception:  # whatever it says of a config that means nothing
        return None


def compared(family: str, folder: Path, keys: Sequence[str]) -> Iterator[Finding | None]:
    """One for every change; None where nothing is wrong."""
    oracle = ORACLES[family](folder)
    ids = torch.randint(3, VOCAB - 9, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    config = json.loads((folder / "config.json").read_text())
    for key, value, place in changes(config, keys):
        changed = json.loads(json.dumps(config))
        part = changed["text_config"] if place == "text_config" else changed
        if value == ABSENT:
            del part[key]
        else:
            part[key] = value
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            found, warnings = ours(folder, ids)
        except Exl2RayError:
            yield None
            continue
        except Exception as e:
            yield Finding(family, key, value, place, "crash", f"{type(e).__name__}: {e}"[:200])
            continue
        wanted = theirs(type(oracle.model), folder, ids)
        kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else None
        told = any(str(word) in w for w in warnings for word in (key.lstrip("_"), kind, "partial_rotary") if word)
        same = wanted is None or (found.shape == wanted.shape and bool((found - wanted).norm() <= DIFFERENT * wanted.norm()))
        far = "" if wanted is None or same else f"{float((found - wanted).norm() / wanted.norm()):.3f} of the logits"
        yield None if same or told else Finding(family, key, value, place, "silent", far)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names of architectures; all that transformers has if absent")
    parser.add_argument("--keys", nargs="*", default=[], help="of config.json; all if absent")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    new = count = 0
    for family in args.families or [name for name in ORACLES if hasattr(transformers, name)]:
        with tempfile.TemporaryDirectory() as folder:
            for finding in compared(family, Path(folder), args.keys):
                count += 1
                if finding is not None:
                    new += not finding.reason
                    print(finding, flush=True)
    print(f"{count} changes, {new} findings that are new")
    return 1 if new else 0


if __name__ == "__main__":
    raise SystemExit(main())
