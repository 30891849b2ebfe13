"""Calibration rows: sequences of tokens of equal length, and the built-in sets they come from.

The table follows the structure of ExLlamaV2's (19 rows for measuring, 115 for quantising; consecutive rows, rows of
documents with BOS and EOS, shuffled pieces, uniform random ids), filled with our own kinds of text:

| set | measure | quantise | kinds | construction |
|---|---|---|---|---|
| web | 2 | 12 | letters, forum, instructions | consecutive |
| articles | 3 | 20 | essays, news, legal_medical | documents with BOS and EOS; half the rows without their first BOS |
| code | 2 | 20 | code | consecutive |
| stories | 2 | 9 | fiction, poetry | as articles |
| chat | 1 | 9 | chat | as articles; with a chat template: as rendered, no further BOS or EOS |
| formats | 1 | 12 | formats, unicode | consecutive |
| multilingual | 3 | 15 | multilingual | consecutive |
| shuffled | 1 | 5 | multilingual | 128-token pieces of the multilingual rows in random order |
| random | 2 | 2 | - | uniform ids in [0, tokenizer vocabulary size) |
| technical | 2 | 11 | technical, maths | consecutive |
| noise | 0 or 5 | 0 or 30 | - | ids -1, for Qwen2-VL and Qwen2.5-VL |

Everything is drawn from ``seed``; equal seed, text and tokenizer give equal rows. When a set's text is too short for
the tokenizer, the rule in ``pieces`` applies (generated text; for stories first a second pass with another alignment)
and ``Rows.notes`` says how much of it there is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from exl2ray.calibration import generate
from exl2ray.calibration.chat_text import ChatText
from exl2ray.calibration.cutting import (
    GENERATED,
    SECOND_PASS,
    Ids,
    Pieces,
    consecutive_rows,
    document_rows,
    interleave,
    shuffled_rows,
    uniform_rows,
)
from exl2ray.calibration.data.taken import Taken
from exl2ray.calibration.limited_child import quoted
from exl2ray.calibration.text import Document, builtin_documents, parse_chat
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError, SourceError

RowSet = Literal["measure", "quantize"]  # the two sets of calibration rows
MAX_BUILTIN_LENGTH = 2048
LENGTH_STEP = 128  # shuffled rows are made of pieces this long
NOISE_ROWS = {"measure": 5, "quantize": 30}
MAX_CHARACTERS_PER_ID, ENOUGH_CHARACTERS = 100, 20_000  # of a tokenizer that can be used; real ones have 2 to 8
CHARACTERS_PER_ID = 2.5  # of text that is tokenised in one request; what is needed beyond it follows one by one
LENGTH_FLAGS = {"measure": "-ml/--measurement-length", "quantize": "-l/--length"}


@dataclass(frozen=True, eq=False)
class Rows:
    """Calibration data of one pass. ``kinds[r]`` names the set of row r; ``notes`` are for the user to read."""

    ids: Tensor  # (R, T) int64; -1 throughout a noise row
    kinds: tuple[str, ...]
    source: str  # "built-in" or what -c names
    notes: tuple[str, ...] = ()
    taken: tuple[Taken, ...] = ()  # of the user's own data
    digest: str | None = None  # SHA-256 of the texts of the user's own data that the rows are made of

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.ndim != 2 or self.ids.shape[0] != len(self.kinds):
            raise CalibrationError(
                f"calibration rows: ids {self.ids.dtype} {tuple(self.ids.shape)}, {len(self.kinds)} kinds; "
                "expected int64 (R, T) and R kinds"
            )


@dataclass(frozen=True)
class RowCategory:
    """One category of the built-in rows: how many to measure and to quantise on, and of which kinds of text."""

    name: str
    measure: int
    quantize: int
    kinds: tuple[str, ...]
    documents: bool = False  # rows of whole documents between BOS and EOS; else consecutive
    repeat: bool = False  # too little text: a second pass before generated text, which is no good match for the category


ROW_CATEGORIES = (
    RowCategory("web", 2, 12, ("letters", "forum", "instructions")),
    RowCategory("articles", 3, 20, ("essays", "news", "legal_medical"), documents=True),
    RowCategory("code", 2, 20, ("code",)),
    RowCategory("stories", 2, 9, ("fiction", "poetry"), documents=True, repeat=True),
    RowCategory("chat", 1, 9, ("chat",), documents=True),
    RowCategory("formats", 1, 12, ("formats", "unicode")),
    RowCategory("multilingual", 3, 15, ("multilingual",)),
    RowCategory("shuffled", 1, 5, ()),
    RowCategory("random", 2, 2, ()),
    RowCategory("technical", 2, 11, ("technical", "maths")),
)


def builtin_rows(
    tokenizer: ModelTokenizer,
    row_set: RowSet,
    length: int,  # tokens of a row, -l or -ml; clipped to 2048
    seed: int,
    vocab_size: int,  # rows of the model's embedding
    *,
    noise: bool = False,  # append noise rows (Qwen2-VL, Qwen2.5-VL)
    chat_rows: bool = True,  # render conversations with the model's chat template, if it has one
    max_positions: int | None = None,  # longest sequence the model takes
    documents: Sequence[Document] | None = None,  # default: the built-in text
) -> Rows:
    """The built-in rows of a pass: 19 to measure, 115 to quantise, plus 5 or 30 noise rows.

    Raises CalibrationError for an unusable length (naming the flag) or a set without any text, SourceError if the tokenizer
    yields an id the embedding does not have.
    """
    flag = LENGTH_FLAGS[row_set]
    ctx = min(MAX_BUILTIN_LENGTH, length)
    notes: list[str] = []
    if ctx != length:
        notes.append(f"{flag} {length}: rows of the built-in set have at most {ctx} tokens")
    check_length(ctx, flag, max_positions)
    if ctx % LENGTH_STEP:
        raise CalibrationError(
            f"{flag} {length} is not a multiple of {LENGTH_STEP}, which the built-in calibration set needs",
            f"use {max(LENGTH_STEP, ctx // LENGTH_STEP * LENGTH_STEP)}",
        )
    sources = _Sources(tokenizer, seed, chat_rows, builtin_documents() if documents is None else documents)
    made: dict[str, Ids] = {}
    for category in ROW_CATEGORIES:
        count = category.measure if row_set == "measure" else category.quantize
        rng = random.Random(f"{seed}/{category.name}")
        if category.name == "shuffled":
            made[category.name] = shuffled_rows(made["multilingual"], count, rng)
        elif category.name == "random":
            made[category.name] = uniform_rows(count, ctx, tokenizer.vocab_size, rng)
        else:
            made[category.name] = sources.rows(category, count, ctx, rng)
    kinds = [name for name, ids in made.items() for _ in ids]
    ids = torch.cat([torch.from_numpy(ids) for ids in made.values()])
    check_ids(ids, vocab_size, tokenizer, kinds)
    if noise:
        ids = torch.cat([ids, torch.full((NOISE_ROWS[row_set], ctx), -1)])
        kinds += ["noise"] * NOISE_ROWS[row_set]
    return Rows(ids, tuple(kinds), "built-in", tuple(notes + sources.notes))


def begun_with(rows: Rows, bos_id: int) -> Rows:
    """The same rows, BOS in the place of the first token of each; noise rows as they are.

    For models that say nothing sensible without it: their states of such text are like nothing that they are used for, and
    take part in Hessians and sensitivities (Gemma 3 270M: 0.6 times the KL at equal bytes, docs/log.md).
    """
    ids = rows.ids.clone()
    ids[ids[:, 0] >= 0, 0] = bos_id
    return replace(rows, ids=ids)


def check_length(length: int, flag: str, max_positions: int | None) -> None:
    """Raise CalibrationError naming ``flag`` if rows of ``length`` tokens cannot be used."""
    if length < LENGTH_STEP:
        raise CalibrationError(f"{flag} {length}: calibration rows have at least {LENGTH_STEP} tokens", "use 2048")
    if max_positions is not None and length > max_positions:
        usable = max_positions // LENGTH_STEP * LENGTH_STEP
        raise CalibrationError(
            f"{flag} {length} is longer than the {max_positions} positions of the model",
            f"use {usable}" if usable else "the model is too short for calibration rows",
        )


def check_ids(ids: Tensor, vocab_size: int, tokenizer: ModelTokenizer, kinds: Sequence[str]) -> None:
    """Raise SourceError if an id (R, T) has no embedding row, naming the token and its row; ``kinds``: of each row."""
    highest = int(ids.max())
    if highest < vocab_size:
        return
    row = int((ids >= vocab_size).any(dim=1).nonzero()[0, 0])
    token_id = int(ids[row][ids[row] >= vocab_size][0])
    text = tokenizer.process.tokens_of([token_id])[0]
    raise SourceError(
        f"{tokenizer.path}: row {row} ({kinds[row]}) of the calibration text holds token {quoted(text or '')} "
        f"with token id {token_id}; the model has {vocab_size} embedding rows",
        "leave out what holds it (chat template: --no-chat-rows), or resize the model's embedding",
    )


class _Sources:
    """Turns documents into the rows of a set, and notes what the user should know about them."""

    def __init__(self, tokenizer: ModelTokenizer, seed: int, chat_rows: bool, documents: Sequence[Document]) -> None:
        self.notes: list[str] = []
        self._tokenizer = tokenizer
        self._seed = seed
        self._documents = documents
        self._chat = ChatText(tokenizer.templates if chat_rows else None, next(generate.conversations(seed)))
        self._characters = self._ids = 0

    def rows(self, category: RowCategory, count: int, ctx: int, rng: random.Random) -> Ids:
        """Int64 (count, ctx) of one set of written text."""
        if not any(doc.kind in category.kinds for doc in self._documents):
            raise CalibrationError(
                f"built-in calibration text: no documents of kind {' or '.join(category.kinds)}",
                "reinstall exl2ray, or give your own text with -c FILE.parquet",
            )
        families: dict[str, list[str]] = {}
        for doc in self._documents:
            if doc.kind in category.kinds:
                families.setdefault(doc.family, []).append(self._text(category, doc))
        texts = interleave(families, rng)
        begins = accumulate(map(len, texts), initial=0)
        self._tokenizer.encode_ahead(t for t, at in zip(texts, begins, strict=False) if at < CHARACTERS_PER_ID * count * ctx)
        pieces = Pieces(texts, category.repeat, self._generated(category), self._encode, limit=ctx)
        if category.documents:
            templated = category.name == "chat" and self._chat.templated
            bos, eos = (None, None) if templated else (self._tokenizer.bos_id, self._tokenizer.eos_id)
            ids = document_rows(pieces, count, ctx, bos, eos)
        else:
            ids = consecutive_rows(pieces, count, ctx)
        for origin in (GENERATED, SECOND_PASS):
            if pieces.used[origin]:
                what = "generated text" if origin == GENERATED else "a second pass over the same text"
                self.notes.append(f"{category.name}: {pieces.used[origin]} of {count * ctx} tokens are {what}")
        if category.name == "chat":
            self.notes += self._chat.notes()
        return ids

    def _encode(self, text: str) -> Ids:
        """Ids of a text. Raises SourceError for a tokenizer that makes next to nothing of it: rows would never be full."""
        ids = self._tokenizer.encode_once(text)
        self._characters, self._ids = self._characters + len(text), self._ids + len(ids)
        if self._characters > ENOUGH_CHARACTERS and self._characters > MAX_CHARACTERS_PER_ID * self._ids:
            raise SourceError(
                f"{self._tokenizer.path}: fewer than one id for {MAX_CHARACTERS_PER_ID} characters of ordinary text",
                "it is not the tokenizer of a language model: take tokenizer.json from the model's first publisher",
            )
        return ids

    def _text(self, category: RowCategory, doc: Document) -> str:
        if doc.kind == "chat":
            return self._chat.text(parse_chat(doc))
        # Consecutive documents are parted by blank lines; others by BOS and EOS.
        return doc.text.strip("\n") + ("" if category.documents else "\n\n\n")

    def _generated(self, category: RowCategory) -> Iterator[str]:
        if category.name == "chat":
            return map(self._chat.text, generate.conversations(self._seed))
        end = "" if category.documents else "\n\n\n"
        return (text.strip("\n") + end for text in generate.texts(category.name, self._seed))
