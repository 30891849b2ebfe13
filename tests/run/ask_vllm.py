"""Run by test_vllm_serving.py, one process for each model: what a model in vLLM says of two prompts, all of it.

ask_vllm.py MODEL OUT dtype [eager | compiled] [ranks]: log-probabilities (2, 39, words) of the tokens of exl2_models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def rows(prompt: Any) -> list[list[float]]:
    """vLLM's dictionaries, one for each position but the first, in the order of token ids."""
    return [[entry[i].logprob for i in sorted(entry)] for entry in prompt[1:]]


def main(model: str, out: str, dtype: str, mode: str, ranks: str) -> None:
    from vllm import LLM, SamplingParams

    config = json.loads((Path(model) / "config.json").read_text())
    text = {"architectures": ["Gemma3ForCausalLM"]} if config["model_type"] == "gemma3_text" else None
    llm = LLM(
        model, dtype=dtype, enforce_eager=mode == "eager", tensor_parallel_size=int(ranks), max_model_len=64, max_num_seqs=4,
        max_logprobs=-1, skip_tokenizer_init=True, hf_overrides=text,
    )  # fmt: skip
    from exl2_models import tokens  # loads numba, in front of which vLLM has to have started on a CPU

    asked = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=-1, detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in tokens().tolist()], asked)
    continued = [list(a.outputs[0].token_ids) for a in answers]  # by the fused kernel, as prompts are not
    np.savez(out, logprobs=np.array([rows(a.prompt_logprobs) for a in answers]), continued=np.array(continued))


if __name__ == "__main__":
    main(*sys.argv[1:])
