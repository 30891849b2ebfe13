"""Text to tune on, by kind and document; and which documents of a kind are held out.

What is held out shall say what tuning does to text that it has not seen, so no document lies in both parts, and neither
does a copy of one. A document that is longer than what is wanted (a text file is one document, whatever it was made of)
gives passages instead, and as much text as a row holds is dropped between them and the rest.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from exl2ray.calibration import generate
from exl2ray.calibration.chat_text import ChatText
from exl2ray.calibration.data.sources import WRITTEN, Source
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.rows import ROW_CATEGORIES
from exl2ray.calibration.text import Document, builtin_documents, parse_chat
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.tune.judge import MEAN, WATCHED

PASSAGES = 4  # at most, of one document
OTHER_NAMES = frozenset({MEAN, *(category.name for category in ROW_CATEGORIES)})
OTHER_BEGINNINGS = (WATCHED, f"{WRITTEN}: ")
CHARACTERS = 8  # of a token, at most, in the mean of a document
Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of text; documents: the tokens (n,) of each."""

    name: str
    documents: Sequence[Ids]

    @property
    def tokens(self) -> int:
        return _length(self.documents)

    @property
    def distinct(self) -> int:
        """Tokens without those of copies of a document."""
        return _length({_digest(ids): ids for ids in self.documents}.values())


@dataclass(frozen=True, eq=False)
class Parted:
    """A kind of text in two parts. cut: whether passages are held out in place of documents. apart: digests of documents of
    which something is held out, so that no copy is trained on."""

    name: str
    trained: tuple[Ids, ...]
    held: tuple[Ids, ...]
    cut: bool
    apart: frozenset[bytes]

    def without(self, apart: frozenset[bytes]) -> tuple[Ids, ...]:
        """What is trained on, without copies of these documents."""
        return tuple(ids for ids in self.trained if _digest(ids) not in apart)


def kinds_of_files(sources: Sequence[Source], tokenizer: ModelTokenizer, tokens: int) -> list[Kind]:
    """``tokens`` tokens of all sources together, as many of each as far as they have so much text; a source is a kind, once
    if it is given twice."""
    with ExitStack() as stack:
        data = [stack.enter_context(CalibrationData([s], tokenizer, most_tokens=tokens)) for s in sources]
        level, found = 0, [list[Ids]() for _ in data]
        while (missing := tokens - sum(map(_length, found))) > 0:
            longer = [i for i, documents in enumerate(found) if _length(documents) == level]
            if not longer:
                break
            level += -(-missing // len(longer))
            for i in longer:
                found[i] = data[i].documents(level)
    out: dict[str, list[Ids]] = {}
    for name, documents in zip(_names(sources), found, strict=True):
        out.setdefault(name, []).extend(documents)
    return [Kind(name, documents) for name, documents in out.items()]


def _names(sources: Sequence[Source]) -> list[str]:
    """What the kind of each source is called: as its file, but no two alike, none like a kind that is no file or like their
    mean, and in UTF-8, which names of files need not be."""
    found: dict[str, str] = {}
    for source in sources:
        name = source.name.encode("utf-8", "backslashreplace").decode()
        if name in OTHER_NAMES or name.startswith(OTHER_BEGINNINGS):
            name = f"file {name}"
        taken = {v for given, v in found.items() if given != source.given}
        alike = (name, *(f"{name} ({n})" for n in range(2, len(sources) + 2)))
        found.setdefault(source.given, next(x for x in alike if x not in taken))
    return [found[source.given] for source in sources]


def _length(documents: Iterable[Ids]) -> int:
    return sum(map(len, documents))


def builtin_kinds(tokenizer: ModelTokenizer, seed: int, least: int | None = None) -> list[Kind]:
    """All of the built-in text, in the kinds of `exl2ray.calibration.rows`; between BOS and EOS where rows of a kind are.

    least: some documents of each kind, about so many tokens or more, as far as there are."""
    chat = ChatText(tokenizer.templates, next(generate.conversations(seed)))
    out = []
    for category in ROW_CATEGORIES:
        documents = [d for d in builtin_documents(more=True) if d.kind in category.kinds]
        if not documents:
            continue  # shuffled and random rows are no text
        if least is not None:
            documents = _some(documents, CHARACTERS * least, f"{seed}/{category.name}")
        templated = category.name == "chat" and chat.templated
        texts = [chat.text(parse_chat(d)) if d.kind == "chat" else d.text.strip("\n") for d in documents]
        if not category.documents:
            texts = [text + "\n\n\n" for text in texts]
        ends = (tokenizer.bos_id, tokenizer.eos_id) if category.documents and not templated else (None, None)
        head, tail = (np.array([] if i is None else [i], dtype=np.int64) for i in ends)
        ids = [np.concatenate([head, found, tail]) for found in tokenizer.encode_batch(texts)]
        out.append(Kind(category.name, ids))
    return out


def _some(documents: list[Document], characters: int, seed: str) -> list[Document]:
    """Documents drawn at random until they have so many characters."""
    random.Random(seed).shuffle(documents)
    ends = accumulate(len(d.text) for d in documents)
    return documents[: sum(end < characters for end in ends) + 1]


def part(kind: Kind, wanted: int, length: int, seed: int) -> Parted:
    """Holds out documents of ``wanted`` tokens, at most twice that; passages of the longest one if they are not enough.

    length: tokens of a row, for what is dropped beside passages.
    """
    documents = list(kind.documents)
    order = list(range(len(documents)))
    random.Random(f"{seed}/{kind.name}").shuffle(order)
    held, have = [], 0
    for i in order:
        if have < wanted and have + len(documents[i]) <= 2 * wanted:
            held.append(i)
            have += len(documents[i])
    trained, passages = [i for i in range(len(documents)) if i not in set(held)], []  # type: list[int], list[Ids]
    rest: list[Ids] = [documents[i] for i in trained]
    apart = {_digest(documents[i]) for i in held}
    cut = have < wanted and bool(trained)
    if cut:
        longest = max(trained, key=lambda i: len(documents[i]))
        rest = [documents[i] for i in trained if i != longest]
        kept, passages = _passages(documents[longest], wanted - have, length)
        rest += kept
        apart.add(_digest(documents[longest]))
    kept_out = (*(documents[i] for i in sorted(held)), *passages)
    found = Parted(kind.name, tuple(filter(len, rest)), kept_out, cut, frozenset(apart))
    return replace(found, trained=found.without(found.apart))


def _passages(ids: Ids, wanted: int, length: int) -> tuple[list[Ids], list[Ids]]:
    """(what is left, passages): each passage is the end of one of as many equal sections."""
    wanted = min(wanted, len(ids) // 2)
    count = max(1, min(PASSAGES, wanted // (4 * length)))
    size, gap = wanted // count, min(length, wanted // count)
    left, passages, start = [], [], 0
    for j in range(count):
        end = (j + 1) * len(ids) // count
        left.append(ids[start : max(start, end - size - gap)])
        passages.append(ids[end - size : end])
        start = min(end + gap, len(ids))
    return left, passages


def _digest(ids: Ids) -> bytes:
    return hashlib.sha256(ids.tobytes()).digest()
