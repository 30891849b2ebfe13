"""Tokenizers that cut words to pieces: said of large vocabularies, and of no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_model
from tokenizers import Tokenizer, models, pre_tokenizers

from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.formats.hf import SourceModel
from exl2ray.plan.doubts import LARGE_VOCABULARY, PLAIN_ENGLISH, tokenizer_doubts
from exl2ray.plan.problems import examine
from exl2ray.recipe import Recipe

WORDS = sorted({w.strip(",.") for w in PLAIN_ENGLISH.split()})
FILLING = [f"<{i}>" for i in range(LARGE_VOCABULARY)]


def write_tokenizer(folder: Path, words: list[str], filling: list[str]) -> None:
    """Whole words and signs, and characters for all others."""
    alphabet = sorted({*PLAIN_ENGLISH, *"abcdefghijklmnopqrstuvwxyz"} - {" "})
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*alphabet, *words, *filling]))}
    model: Any = models.Unigram([("?", -30.0), *((t, -1.0 if t in words else -9.0) for t in vocabulary)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(("words", "filling", "size", "said"), [
    (WORDS, FILLING, LARGE_VOCABULARY + 200, False),
    ([], FILLING, LARGE_VOCABULARY + 200, True),
    ([], [], 272, False),  # made for few words, or none
])  # fmt: skip
def test_words_in_pieces(words: list[str], filling: list[str], size: int, said: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", "Llama")
    write_tokenizer(model, words, filling)
    with load_tokenizer(model, SourceModel(model).config, size) as tokenizer:
        found = tokenizer_doubts(tokenizer)
    assert len(found) == said
    if said:
        assert f"{model / 'tokenizer.json'}: 4." in found[0]
        assert "tokens for a plain English word, where a vocabulary of" in found[0]


def test_checks_tell_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m", "Llama")
    monkeypatch.setattr("exl2ray.plan.problems.tokenizer_doubts", lambda tokenizer: [f"{tokenizer.path} is odd"])
    found = examine(Recipe(str(model), str(tmp_path / "w"), (4.0,), device="cpu"))
    assert f"{model / 'tokenizer.json'} is odd" in found.doubts
