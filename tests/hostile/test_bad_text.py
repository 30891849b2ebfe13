"""Text that fits a model to nothing, and models that predict no better than counting: named; sound ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_models import HEAD, Edit, doubts, edited, fill, parquet

from exl2ray.calibration.rows import builtin_rows
from exl2ray.calibration.soundness import Baseline, baseline, row_warnings, unigram_perplexity
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.evaluate.forward import RunOptions, open_model, run_model
from exl2ray.plan.problems import examine
from exl2ray.recipe import Recipe
from exl2ray.result_warnings import output_warnings, source_warnings

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
PAGE = "Pack my box with five dozen jugs of 0123456789, quoth he. "
ROWS: dict[str, tuple[list[str], str]] = {
    "one character": (["a" * 9000], "1 distinct token among 512, 100% of them token"),
    "two characters": (["ab" * 5000], "2 distinct tokens"),
    "mostly blanks": ([("word" + " " * 30) * 300], "of them token"),
    "four letters": (["".join("acgt"[(i * i // 3 + i) % 4] for i in range(9000))], "4 distinct tokens"),
    "a sentence again and again": ([PAGE] * 99, "repeat earlier ones"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_hardly_any_text(case: str, tiny: Path, tmp_path: Path) -> None:
    texts, says = ROWS[case]
    found = doubts(tiny, tmp_path, parquet(tmp_path / "rows.parquet", *texts))
    assert len(found) == 2, found  # for measuring and for quantising
    assert "of the measurement" in found[0]
    assert "of the quantisation" in found[1]
    assert says in found[1]


def test_rows_that_are_copies_are_counted() -> None:
    ids = torch.randint(0, 1000, (4, 128)).repeat(3, 1)
    (found,) = row_warnings(ids, "rows")
    assert "67%" in found
    assert "8 of 12 rows are copies" in found
    noise = torch.full((5, 128), -1)
    assert row_warnings(torch.cat([ids[:4], noise]), "rows") == []
    assert row_warnings(noise, "rows") == []


def test_unigram_perplexity_of_known_frequencies() -> None:
    """By hand: a token that stands alone is predicted as a new one, the others by what is left without them."""
    ids = torch.tensor([[0, 0, 0, 1]])
    known, new = (3 - 1 + 2 / 4) / (4 - 1 + 2), (0 + 2 / 4) / (4 - 1 + 2)
    expected = (known * known * new) ** (-1 / 3)
    assert unigram_perplexity(ids, ids, 4) == pytest.approx(expected)
    even = torch.arange(16).repeat(2000)[torch.randperm(32000)].view(10, -1)
    assert unigram_perplexity(even, even, 16) == pytest.approx(16, rel=1e-3)
    assert unigram_perplexity(even, even[:0], 16) is None
    assert baseline(torch.full((2, 8), -1), 2, 16) == Baseline(16, None, 0)


@pytest.mark.parametrize(
    ("perplexity", "says"),
    [(6.0, ""), (60.0, ""), (90.0, ""), (110.0, "not much better"), (610.0, "no better than the frequencies"),
     (1999.0, "no better than guessing"), (2e4, "no better than guessing"), (None, "")],
)  # fmt: skip
def test_steps_of_the_source(perplexity: float | None, says: str) -> None:
    found = source_warnings(perplexity, Baseline(2000, 600.0, 20000))
    assert len(found) == bool(says)
    assert all(says in f for f in found)


def test_a_quantised_model_is_held_against_the_same() -> None:
    known = Baseline(2000, 600.0, 20000)
    assert output_warnings(90.0, 80.0, known) == []
    assert "no better than the frequencies" in output_warnings(650.0, 80.0, known)[0]
    assert "suspicious" in output_warnings(31.0, 12.0, known)[0]
    assert output_warnings(700.0, 650.0, known) == []  # the source has its own warning


def told_of(model: Path, scale: float | None = None) -> list[str]:
    """What is said of a source, from its perplexity on the rows that a conversion reports."""
    opened = open_model(model, RunOptions(rope_scale=scale))
    rows = builtin_rows(load_tokenizer(model, opened.source.config, opened.vocab_size), "quantize", 128, 0, opened.vocab_size)
    reported = rows.ids[:19]
    logits = run_model(opened, reported, "cpu", RunOptions(rope_scale=scale)).logits(slice(None), slice(0, -1))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), reported[:, 1:].flatten())
    return source_warnings(float(loss.exp()), baseline(rows.ids, len(reported), opened.vocab_size))


def shuffled_tokenizer(model: Path) -> None:
    found = json.loads((model / "tokenizer.json").read_text())
    vocab = found["model"]["vocab"]
    names = [n for n, i in vocab.items() if i >= 300]
    for name, number in zip(names, [vocab[n] for n in reversed(names)], strict=True):
        vocab[name] = number
    (model / "tokenizer.json").write_text(json.dumps(found))


BROKEN: dict[str, tuple[Edit | None, dict[str, Any], float | None, str]] = {
    "sound": (None, {}, None, ""),
    "two empty layers": (lambda t: (fill("layers.3.")(t), fill("layers.4.")(t)) and None, {}, None, "not much better"),
    "RoPE scaled": (None, {}, 1000.0, "not much better"),
    "another base": (None, {"rope_theta": 100.0, "rope_parameters": None}, None, "not much better"),
    "eight heads for four": (
        None, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}, None, "not much better",
    ),
    "an empty head": (fill(HEAD), {}, None, "no better than guessing"),
    "an epsilon of 0.1": (None, {"rms_norm_eps": 0.1}, None, "no better than the frequencies"),
    "another tokenizer": (None, {}, None, "no better than guessing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_trained_model(case: str, tmp_path: Path) -> None:
    edit, config, scale, says = BROKEN[case]
    model = edited(DEMO, tmp_path / "m", edit, **config)
    if case == "another tokenizer":
        shuffled_tokenizer(model)
    found = told_of(model, scale)
    assert len(found) == bool(says), found
    assert all(says in f for f in found)


@pytest.mark.parametrize("name", ["tiny-llama-7m", "tiny-mixtral-8m"])
def test_other_trained_models_have_no_warning(name: str, shared_dir: Path, tmp_path: Path) -> None:
    model = shared_dir / "models" / name
    if not model.is_dir():
        pytest.skip(f"{name} is not there")
    assert told_of(model) == []
    found = examine(Recipe(str(model), str(tmp_path / "work"), device="cpu", length=256, measurement_length=256))
    found.raise_any()
    assert found.doubts == []


def test_the_demo_model_is_planned_without_doubts(tmp_path: Path) -> None:
    found = examine(Recipe(str(DEMO), str(tmp_path / "work"), device="cpu", length=512, measurement_length=2048))
    assert (found.doubts, found.notes) == ([], [])
