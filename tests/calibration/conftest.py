"""Tokenizers built here, and a small document set that does not depend on the built-in text."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from calibration_helpers import train_bpe, write_model
from tokenizers import Tokenizer

from exl2ray.calibration import generate
from exl2ray.calibration.text import Document, builtin_documents
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """2048 tokens, trained on generated text only."""
    return train_bpe([t for name in generate.WRITERS for t in islice(generate.texts(name, 7), 20)], 2048)


@pytest.fixture(scope="session")
def make_tokenizer(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelTokenizer]:
    def make(**settings: Any) -> ModelTokenizer:
        directory = write_model(tmp_path_factory.mktemp("model"), bpe, settings)
        return load_tokenizer(directory, {}, vocab_size=2048)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., ModelTokenizer]) -> ModelTokenizer:
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def documents() -> tuple[Document, ...]:
    """Short synthetic documents of every kind, enough for 115 rows of 128 tokens of the ``bpe`` tokenizer."""
    sources = {
        "letters": "web", "essays": "articles", "fiction": "articles", "poetry": "web", "code": "code",
        "formats": "formats", "maths": "technical", "unicode": "formats",
    }  # fmt: skip
    made = [
        Document(kind, f"{i:02d}.txt", text)
        for kind, name in sources.items()
        for i, text in enumerate(islice(generate.texts(name, sum(map(ord, kind))), 12))
    ]
    made += [
        Document("multilingual", f"{'de fr ja'.split()[i % 3]}_{i:02d}.txt", text)
        for i, text in enumerate(islice(generate.texts("articles", 99), 12))
    ]
    for i, c in enumerate(islice(generate.conversations(98), 12)):
        messages = [{"role": role, "content": content} for role, content in c.messages]
        made.append(Document("chat", f"{i}.json", json.dumps({"title": c.title, "messages": messages})))
    return tuple(made)


@pytest.fixture(scope="session")
def builtin() -> tuple[Document, ...]:
    return builtin_documents()
