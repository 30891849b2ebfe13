"""Tokenizer files of strangers: pipelines that grow without bound, sizes, nesting, ids, and what is no tokenizer at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_models import VOCAB, write_model
from tokenizer_cases import Change, added, content, edited, entry, normalizer, plan, replace, settings, sparse

MEMORY, TIME, NOT_ONE = "MB of memory", "s of processor time", "not a tokenizer file"
FEW = "fewer than one id for 100 characters"
DEEP = "[" * 200_000
STEPS = '{"normalizer": ' + '{"type": "Sequence", "normalizers": [' * 5000
WORDS: dict[str, Any] = {"pre_tokenizer": None, "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tokenizers") / "model")


def bpe(**entries: Any) -> Change:
    return edited(lambda t: t["model"].update(entries))


def split(pattern: str) -> Change:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return edited(lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [step, t["pre_tokenizer"]]}))


def many_tokens(t: dict[str, Any]) -> None:
    t["added_tokens"] += [entry(1000 + i, f"<{i}>") for i in range(20_000)]


def a_fifo(d: Path) -> None:
    (d / "tokenizer.json").unlink()
    os.mkfifo(d / "tokenizer.json")


def linked(target: str) -> Change:
    def change(d: Path) -> None:
        (d / "tokenizer.json").unlink()
        (d / "tokenizer.json").symlink_to(target)

    return change


# name: (change, exit status, words of the message)
CASES: dict[str, tuple[Change, int, str]] = {
    "five replacements of everything": (normalizer(*[replace(".", "a" * 100)] * 5), 3, MEMORY),
    "long prepend": (normalizer({"type": "Prepend", "prepend": "a" * 50_000_000}), 3, MEMORY),
    "quantifiers": (normalizer(replace(r"(a|a|b?)*(x+x+)+y$|((\w+\s?)+)+!$", "b")), 3, "retry-limit"),
    "quantifiers when splitting": (split(r"((\w+\s?)+)+!$"), 3, "retry-limit"),
    "slow look-ahead": (split(r"(?=(.*.*.*.*.*z))."), 3, TIME),
    "everything removed": (normalizer(replace("(?m).|\n", "")), 3, FEW),
    "a single id for all": (edited(lambda t: t.update(WORDS)), 3, FEW),
    "thousands of nested steps": (content("tokenizer.json", STEPS), 3, NOT_ONE),
    "deep nesting": (content("tokenizer.json", DEEP), 3, NOT_ONE),
    "sparse tokenizer.json": (sparse("tokenizer.json", 6 << 30), 3, "larger than"),
    "zeros": (sparse("tokenizer.json", 1 << 20), 3, NOT_ONE),
    "empty file": (content("tokenizer.json", b""), 3, "is empty"),
    "not UTF-8": (content("tokenizer.json", b"\xff\xfe{\0}\0"), 3, "not UTF-8"),
    "FIFO": (a_fifo, 3, "a FIFO"),
    "device": (linked("/dev/zero"), 3, "a device"),
    "system file": (linked("/etc/passwd"), 3, NOT_ONE),
    "process": (linked("/proc/self/environ"), 3, "tokenizer.json"),
    "link to nothing": (linked("nowhere"), 3, "cannot be read"),
    "directory": (lambda d: ((d / "tokenizer.json").unlink(), (d / "tokenizer.json").mkdir()) and None, 3, "a directory"),  # type: ignore[func-returns-value]
    "id beyond 32 bits": (added(entry(1 << 32, "<big>")), 3, NOT_ONE),
    "negative id": (added(entry(-1, "<minus>")), 3, NOT_ONE),
    "vocabulary beyond the embedding": (edited(lambda t: t["model"]["vocab"].update(big=2**31)), 3, "needs 2147483649 emb"),
    "control characters in a token": (edited(lambda t: t["model"]["vocab"].update({"\x1b[2Jx": VOCAB})), 3, r"\x1b[2Jx"),
    "control characters in an added token": (added(entry(259, "\x1b[2Jx"), entry(300, "\x07y")), 0, ""),
    "long token": (edited(lambda t: t["model"]["vocab"].update({"x" * 5_000_000: VOCAB})), 3, "up to id 272"),
    "many added tokens": (edited(many_tokens), 0, "added tokens have no embedding row"),
    "unknown model": (edited(lambda t: t["model"].update(type="Quantum")), 3, NOT_ONE),
    "unknown version": (edited(lambda t: t.update(version="9.0")), 3, "pip install -U tokenizers"),
    "merges of unknown tokens": (bpe(merges=[["no", "such"]]), 3, NOT_ONE),
    "settings, deep": (content("tokenizer_config.json", '{"a": ' + DEEP), 3, "nested too deeply"),
    "settings, long number": (content("tokenizer_config.json", '{"a": ' + "9" * 100_000 + "}"), 3, "digits"),
    "settings, sparse": (sparse("tokenizer_config.json", 6 << 30), 3, "larger than"),
    "settings, a list": (content("tokenizer_config.json", "[]"), 3, "object is needed"),
    "decoder without ids": (settings(added_tokens_decoder={"x\x1b": {"content": "a"}}), 3, r"x\x1b"),
    "decoder, superscript id": (settings(added_tokens_decoder={"²": {"content": "a"}}), 3, "is not an id"),
    "decoder, a list": (settings(added_tokens_decoder=[1]), 3, "added_tokens_decoder is a list"),
    "decoder, large ids": (settings(added_tokens_decoder={str(2**31 - 1): {"content": "a"}}), 0, "left out"),
    "added_tokens.json, sparse": (sparse("added_tokens.json", 6 << 30), 3, "larger than"),
    "added_tokens.json, texts": (content("added_tokens.json", '{"a": "1"}'), 3, "has id '1'"),
    "added_tokens.json, many": (content("added_tokens.json", json.dumps({f"<{i}>": 259 + i for i in range(50_000)})), 0, ""),
    "special_tokens_map.json, FIFO": (lambda d: os.mkfifo(d / "special_tokens_map.json"), 3, "a FIFO"),
    "generation_config.json, deep": (content("generation_config.json", '{"a": ' + DEEP), 0, "nested too deeply"),
}


@pytest.mark.parametrize("name", CASES)
def test_tokenizers(name: str, model: Path, tmp_path: Path) -> None:
    change, status, words = CASES[name]
    run = plan(model, tmp_path / "m", change)
    run.ends_with(status, words)
    text = run.out + run.err
    assert "\x1b" not in text
    assert len(text) < 20_000
    assert "cp " not in text
