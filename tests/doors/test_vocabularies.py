"""Vocabularies without a tokenizer.json: converted where transformers can, else what to do is named."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import pytest
from tokenizer_folders import BASE, TEXTS, load, put, token_folder
from tokenizers import Tokenizer

from exl2ray.calibration.output_files import tokenizer_output
from exl2ray.calibration.text import builtin_documents
from exl2ray.errors import SourceError

transformers = pytest.importorskip("transformers")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return token_folder(tmp_path)


def sentencepiece_model(folder: Path, kind: str) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = [line for doc in builtin_documents()[:60] for line in doc.text.splitlines() if line]
    out = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=900, model_type=kind, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())


def test_sentencepiece_alone(folder: Path) -> None:
    """transformers converts it in memory; the output gets the result, and the ids are SentencePiece's."""
    (folder / "tokenizer.json").unlink()
    sentencepiece_model(folder, "bpe")
    put(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    before = sorted(p.name for p in folder.iterdir())
    with load(folder, rows=900) as tokenizer:
        assert tokenizer.warnings == ()
        original = sys.modules["sentencepiece"].SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for text in ("Some text, and then more.", "two  spaces", "Straße 今日"):
            assert tokenizer.encode(text).tolist() == original.encode(text)
    assert sorted(p.name for p in folder.iterdir()) == before
    written = Tokenizer.from_str(tokenizer_output(folder, tokenizer)["tokenizer.json"].decode())
    assert written.encode("Some text", add_special_tokens=False).ids == original.encode("Some text")


def test_a_conversion_that_sentencepiece_does_not_agree_with(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    sentencepiece_model(folder, "unigram")
    put(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with load(folder, rows=900) as tokenizer:
        assert "sample lines get other ids than SentencePiece" in tokenizer.warnings[0]


def test_vocabulary_and_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    put(folder, "vocab.json", {**model["vocab"], "th": BASE, "the": BASE + 1})
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with load(folder) as tokenizer:
        for text in ("the other", *TEXTS):
            assert tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, r"tokenizer not found.*hint: download tokenizer\.json"),
    "merges alone": ({"merges.txt": b"a b\n"}, r"there is merges\.txt, which is not enough"),
    "vocab.json alone": ({"vocab.json": b"{}"}, r"there is vocab\.json, which is not enough"),
    "pointer": ({"tokenizer.json": POINTER}, r"tokenizer\.json: a Git LFS pointer.*git lfs pull"),
    "pointer of SentencePiece": ({"tokenizer.model": POINTER}, r"tokenizer\.model: a Git LFS pointer.*git lfs pull"),
    "empty SentencePiece": ({"tokenizer.model": b""}, r"tokenizer\.model: is empty"),
    "bytes for SentencePiece": ({"tokenizer.model": bytes(range(256))}, r"tokenizer\.model: neither a .*hint: download"),
    "zeros for SentencePiece": ({"tokenizer.model": b"\0" * 5000}, r"tokenizer\.model: neither a SentencePiece model nor"),
    "text for SentencePiece": ({"spiece.model": b"hello world\n" * 50}, r"spiece\.model: neither a SentencePiece model nor"),
    "SentencePiece cut off": ({"tokenizer.model": b"\x0a\x03\x0a\x01a" * 9 + b"\x0a\x03\x0a"}, r"tokenizer\.model: cut off"),
    "SentencePiece damaged": ({"tokenizer.model": b"\x0a\x03\x0a\x01a" * 9 + b"\xff" * 40}, r"tokenizer\.model: cut off or"),
    "settings without a piece": ({"tokenizer.model": b"\x12\x00"}, r"tokenizer\.model: neither a SentencePiece model nor"),
    "tiktoken cut off": ({"tokenizer.model": b"IQ== 0\nIg== 1\nIw"}, r"tokenizer\.model: cut off or damaged.*hint: download"),
    "tiktoken damaged": ({"tiktoken.model": b"IQ== 0\n\0\0\0\0\n"}, r"tiktoken\.model: cut off or damaged"),
    "vocab.json cut off": ({"vocab.json": b'{"a": 0,', "merges.txt": b"a b\n"}, r"vocab\.json: not valid JSON"),
    "vocab.json of something": ({"vocab.json": b'{"a": "b"}', "merges.txt": b"a b\n"}, r"vocab\.json: no object from tokens"),
    "vocab.json, empty": ({"vocab.json": b"{}", "merges.txt": b"a b\n"}, r"vocab\.json: no object from tokens to ids"),
    "merges of bytes": ({"vocab.json": b'{"a": 0}', "merges.txt": b"\xff\xfe"}, r"merges\.txt: not UTF-8 \(byte 0\)"),
    "tekken.json cut off": ({"tekken.json": b'{"vocab": ['}, r"tekken\.json: not valid JSON"),
    "tekken.json of something": ({"tekken.json": b'{"a": 1}'}, r"tekken\.json: has no list `vocab`"),
    "byte order mark": ({"tokenizer.json": b"\xef\xbb\xbf{}"}, r"byte order mark"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_tokenizer(name: str, folder: Path) -> None:
    files, words = REFUSED[name]
    (folder / "tokenizer.json").unlink()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    with pytest.raises(SourceError) as e:
        load(folder)
    assert re.search(words, str(e.value).replace("\n", " ")), str(e.value)


def test_tiktoken_is_not_installed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound file of that kind: the package is named, and not that the file is no vocabulary."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    put(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tiktoken.py").write_text("raise ImportError('No module named tiktoken')")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    with pytest.raises(SourceError, match="of tiktoken; converting it needs that package") as e:
        load(folder)
    assert "pip install tiktoken and run again" in e.value.hint


BESIDE: dict[str, tuple[str, str, str]] = {
    "settings cut off": ("tokenizer_config.json", '{"a":', "download the file again"),
    "settings are a list": ("tokenizer_config.json", "[1]", "download the file again"),
    "added tokens are a list": ("added_tokens.json", '["<y>"]', "download the file again"),
    "entries are a list": ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "download the file again"),
    "special tokens cut off": ("special_tokens_map.json", "{", "download the file again"),
    "a page for a template": ("chat_template.jinja", "<!DOCTYPE html>", "fetch it again"),
    "an encoding of old": ("chat_template.jinja", "\u00e9", "save it again as UTF-8"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_broken_beside_a_tokenizer_has_a_remedy(name: str, folder: Path) -> None:
    file, text, hint = BESIDE[name]
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError) as e:
        load(folder)
    assert file in e.value.message
    assert hint in e.value.hint


def test_transformers_is_not_installed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are named: what to install, and how to convert elsewhere."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x00")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "transformers.py").write_text("raise ImportError('No module named transformers')")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    with pytest.raises(SourceError, match=r"only tokenizer\.model; converting it needs transformers") as e:
        load(folder)
    assert "pip install 'exl2ray[sentencepiece]'" in e.value.hint
    assert "AutoTokenizer" in e.value.hint
