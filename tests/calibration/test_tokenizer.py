"""Tokenizer files: BOS and EOS ids, vocabulary against the embedding, and every way to be broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from exl2ray.calibration.text import Conversation
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.calibration.tokenizer_files import read_tokenizer_files
from exl2ray.errors import SourceError

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "<end>"]


@pytest.fixture
def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    specials = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    return tokenizer


def write(directory: Path, tokenizer: Tokenizer, settings: Any = None) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_small_texts_after_large_ones(word_level: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator keeps of large encodings was more than a later request was allowed: no thread could start."""
    monkeypatch.setattr("exl2ray.calibration.tokenizer.MEMORY_BYTES", 120 << 20)
    with load_tokenizer(write(tmp_path, word_level), {}, 7) as loaded:
        large = "the cat " * 200_000
        assert [len(ids) for ids in loaded.encode_batch([large, large])] == [400_000] * 2
        assert [len(ids) for ids in loaded.encode_batch(["the cat sat"] * 100)] == [3] * 100


def test_text_is_encoded_without_special_tokens(word_level: Tokenizer, tmp_path: Path) -> None:
    word_level.enable_truncation(2)
    word_level.enable_padding(length=10)
    loaded = load_tokenizer(write(tmp_path, word_level), {}, 7)
    assert loaded.encode("the cat sat </s>").tolist() == [3, 4, 5, 2]
    assert [ids.tolist() for ids in loaded.encode_batch(["the", "cat sat", ""])] == [[3], [4, 5], []]
    assert loaded.encode("the").dtype == "int64"


@pytest.mark.parametrize(
    ("config", "settings", "bos", "eos"),
    [
        ({"bos_token_id": 3, "eos_token_id": 4}, {"bos_token": "<s>", "eos_token": None}, 3, 4),
        ({"eos_token_id": [5, 2]}, None, 1, 5),
        ({"eos_token_id": []}, None, 1, 2),
        ({}, {"bos_token": "cat", "eos_token": {"content": "<end>", "lstrip": False}}, 4, 6),
        ({"bos_token_id": None}, {"bos_token": None, "eos_token": None}, None, None),
        ({}, {}, 1, 2),
        ({}, None, 1, 2),
        ({"eos_token_id": [7, 5, 2]}, None, 1, 5),
        ({"bos_token_id": 7, "eos_token_id": -1}, None, None, None),
        ({"eos_token_id": 7}, {"eos_token": "<end>"}, 1, 6),
        ({}, {"eos_token": "<missing>"}, 1, None),
    ],
)
def test_bos_and_eos(word_level: Tokenizer, tmp_path: Path, config: Any, settings: Any, bos: Any, eos: Any) -> None:
    loaded = load_tokenizer(write(tmp_path, word_level, settings), config, 7)
    assert (loaded.bos_id, loaded.eos_id) == (bos, eos)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"eos_token_id": "2"}, None, r"eos_token_id is '2', not an integer"),
        ({"eos_token_id": True}, None, r"eos_token_id is True"),
    ],
)
def test_unusable_bos_or_eos(word_level: Tokenizer, tmp_path: Path, config: Any, settings: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_tokenizer(write(tmp_path, word_level, settings), config, 7)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer not found: .*tokenizer\.json"):
        load_tokenizer(tmp_path, {}, 7)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b'{"version": "1.0", "model": ', b"\xff\xfe\x00"])
def test_broken_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path, {}, 7)


def test_broken_tokenizer_config(word_level: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, word_level)
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(SourceError, match=r"tokenizer_config\.json"):
            load_tokenizer(tmp_path, {}, 7)


def test_tokenizer_larger_than_the_head(word_level: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, word_level)
    with pytest.raises(SourceError, match=r"up to id 6 \('<end>'\) and needs 7 embedding rows; the model has 6"):
        load_tokenizer(tmp_path, {}, 6)
    word_level.add_tokens([AddedToken("<pad>")])
    write(tmp_path, word_level)
    loaded = load_tokenizer(tmp_path, {}, 7)
    (warning,) = loaded.warnings
    assert "1 added tokens have no embedding row (the model has 7): '<pad>' (7)" in warning
    assert loaded.vocab_size == 7
    assert loaded.encode("the <pad>").tolist() == [3, 7]
    assert load_tokenizer(tmp_path, {}, 8).vocab_size == 8
    assert load_tokenizer(tmp_path, {}, 8).warnings == ()


def test_chat_template_sources(word_level: Tokenizer, tmp_path: Path) -> None:
    def template(settings: Any) -> str | None:
        return read_tokenizer_files(write(tmp_path, word_level, settings)).chat_template

    assert template({}) is None
    assert template({"chat_template": "A"}) == "A"
    named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "C"}]
    assert template({"chat_template": named}) == "C"
    assert template({"chat_template": named[:1]}) is None
    (tmp_path / "chat_template.jinja").write_text("D")
    assert template({"chat_template": "A"}) == "D"


def test_special_token_texts_for_templates(word_level: Tokenizer, tmp_path: Path) -> None:
    template = "{{ bos_token }} {{ pad_token }} {{ eos_token }} {{ messages[0].content }}"
    settings = {"bos_token": {"content": "<s>"}, "pad_token": "<unk>", "chat_template": template}
    with load_tokenizer(write(tmp_path, word_level, settings), {"eos_token_id": 6}, 7) as loaded:
        assert loaded.templates is not None
        assert loaded.templates.render(Conversation("", (("user", "the"),))) == "<s> <unk> <end> the"


def test_a_real_tokenizer(shared_dir: Path) -> None:
    model = shared_dir / "models" / "tiny-llama-7m"
    config = json.loads((model / "config.json").read_text())
    loaded = load_tokenizer(model, config, config["vocab_size"])
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (4096, 1, 2)
    text = "Ein Satz, then code: `x = 3`\n"
    assert loaded.decode(loaded.encode(text).tolist()) == text
