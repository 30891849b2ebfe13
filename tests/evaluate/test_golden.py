"""The trained reference model: logits of ExLlamaV2 0.3.2, and perplexity of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation import evaluate

from exl2ray.evaluate.forward import run_model
from exl2ray.evaluate.tokens import find_tokenizer, load_tokens

FP16, EXL2 = "models/tiny-llama-7m", "golden/tiny-llama-7m-exl2-3.0bpw"


@pytest.mark.parametrize(("directory", "name"), [(FP16, "fp16"), (EXL2, "exl2-3.0bpw")])
def test_logits_are_those_of_the_loader(shared_dir: Path, directory: str, name: str) -> None:
    with np.load(shared_dir / "golden/exllamav2-0.3.2.npz") as golden:
        ids, expected = torch.from_numpy(golden["logits/ids"]), torch.from_numpy(golden[f"logits/{name}"]).float()
    found = run_model(shared_dir / directory, ids, "cpu").logits(slice(None), slice(0, None, 8))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 0.05
    first, second = expected.topk(2, dim=-1).values.unbind(-1)
    decided = first - second > 0.01  # stored logits near 8 are 0.008 apart: closer ones are a tie
    assert float(decided.float().mean()) > 0.95
    assert torch.equal(found.argmax(-1)[decided], expected.argmax(-1)[decided])


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(shared_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = load_tokens(shared_dir / "data/eval-tokens.npy", rows=4, length=512)
    result = evaluate(shared_dir / FP16, None, ids, "cpu")
    model = AutoModelForCausalLM.from_pretrained(shared_dir / FP16, dtype=torch.float32)
    with torch.inference_mode():
        log_probabilities = model(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    assert result.perplexity.value == pytest.approx(float(nll.exp()), rel=5e-5)


@pytest.mark.slow
def test_the_reference_conversion_has_its_published_quality(shared_dir: Path) -> None:
    """golden/README: KL 0.2489, top-1 0.7566, perplexity 12.280 / 9.944, on other rows of the same kind of text."""
    ids = load_tokens(shared_dir / "data/eval-tokens.npy", rows=8, length=512)
    result = evaluate(shared_dir / EXL2, shared_dir / FP16, ids, "cpu")
    assert result.kl is not None
    assert result.top1 is not None
    assert result.nll_increase is not None
    assert result.kl.value == pytest.approx(0.2489, abs=0.05)
    assert result.top1.value == pytest.approx(0.7566, abs=0.03)
    assert result.nll_increase.value == pytest.approx(np.log(12.280 / 9.944), abs=0.04)
    assert result.size.linears_bpw == pytest.approx(3.0, abs=0.01)
    assert result.size.file_bytes == 4704478


def test_text_reads_with_the_tokenizer_of_the_reference(shared_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The harbour was quiet before the storm came in from the west. " * 8, encoding="utf-8")
    tokenizer = find_tokenizer([shared_dir / EXL2, shared_dir / FP16])
    windows, rows = load_tokens(text, tokenizer, length=64, stride=16), load_tokens(text, tokenizer, length=64)
    overlapping = evaluate(shared_dir / FP16, None, windows, "cpu", stride=16)
    separate = evaluate(shared_dir / FP16, None, rows, "cpu")
    assert overlapping.predictions == 63 + 16 * (len(windows) - 1)
    assert overlapping.perplexity.value < separate.perplexity.value  # more context
