"""Text that the source model writes itself, to tune on: a job of its own, in pieces, each kept as soon as it is there.

Three ways to begin: a passage of the built-in text that the model goes on with; a conversation, either a question of the
built-in text or one that the model asks itself behind its template's first marks, then turn by turn; a single token.
Measured on SmolLM2-135M-Instruct with a trial script, at 3.0 bpw from `balanced`, a million tokens each: single tokens and
empty chats at temperature 1 brought KL to 0.80 times, real text to 0.60. Hence most rows begin with real text and
temperatures are mixed; what that brings has not been measured.

A piece is one batch of rows side by side. It depends on the model, the seed, its number and the shape of the batch alone, so
a job that was stopped goes on with the next piece and comes to the same text (on one kind of device).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from exl2ray.calibration.text import Conversation, Document, builtin_documents, parse_chat
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError, UsageError
from exl2ray.evaluate.chat import stop_ids
from exl2ray.evaluate.forward import OpenModel
from exl2ray.evaluate.generate import Draft, Generator
from exl2ray.events import Reporter
from exl2ray.quant.memory import device_bytes
from exl2ray.store.fs import Store
from exl2ray.store.records import Record, Records, hash_inputs, item_file
from exl2ray.store.tensors import get_tensors, put_tensors
from exl2ray.tune.documents import Ids, Kind
from exl2ray.wording import file_size

VERSION = 1  # of what equal settings come to
STAGE = "write text"
TEMPERATURES = (0.7, 0.85, 1.0)
BEGINNINGS = ("continued", "continued", "asked", "continued", "answered", "continued", "asked", "token")  # of rows, in turn
SHORTEST_BEGINNING, LONGEST_BEGINNING = 16, 96  # tokens of a passage
MOST_QUESTION = 160  # tokens of a prompt with a question; longer ones are left out
MOST_ROWS, LEAST_ROWS = 256, 4
CACHE_BYTES, GPU_SHARE = 1 << 30, 0.25  # for keys and values: on the CPU, and of a GPU's memory
MARKS = ("\x01question\x01", "\x01answer\x01", "\x01again\x01")


def self_written(
    model: OpenModel,  # the source
    tokenizer: ModelTokenizer,
    tokens: int,
    length: int,  # tokens of a row
    seed: int,
    device: torch.device,
    store: Store,
    kind: str,  # of the records in ``store``: "quant/written"
    reporter: Reporter,
) -> list[Kind]:
    """Documents that ``model`` wrote, ``tokens`` in all or a few more; kinds "self: chat", "self: continued", "self: token".

    BOS of families that need it is left out: rows get it again. Raises what reading the weights raises, NumericError for
    states that are not finite, StoreError for a piece that cannot be kept, UsageError for a model that a GPU has no room for.
    """
    if device.type == "cuda":
        check_weights(model, device_bytes(device))
    rows = rows_at_once(model, length, device)
    records = Records(store)
    inputs = {
        "version": VERSION, "source": model.source.fingerprint(), "tokenizer": tokenizer.vocab_size, "length": length,
        "rows": rows, "seed": seed, "device": device.type,
    }  # fmt: skip
    pieces = -(-tokens // (rows * length))
    writer: _Writer | None = None
    out: dict[str, list[Ids]] = {}
    have = number = 0
    reporter.event("stage", stage=STAGE, items=pieces, done=0)
    start = time.monotonic()
    while have < tokens:
        if number >= 8 * pieces:
            raise CalibrationError(f"{model.path}: what it writes ends at once: {have} tokens in {number} batches of {rows}")
        begun = time.monotonic()
        name, key = f"piece-{number:05d}", hash_inputs(**inputs, number=number)
        record = records.find(kind, name, key)
        if record is None:
            writer = writer or _Writer(model, tokenizer, length, seed, device)
            ref = put_tensors(store, item_file(kind, "tensors", name, key), writer.piece(number, rows))
            record = Record(kind, name, key, {}, (ref,), time.monotonic() - begun)
            records.commit(record)
        for label, ids in _documents(get_tensors(store, record.files[0].rel, expect=record.files[0])):
            out.setdefault(label, []).append(ids)
            have += len(ids)
        number += 1
        reporter.event(
            "item", stage=STAGE, key=name, done=number, items=max(pieces, number), seconds=time.monotonic() - begun,
            detail=f"{have:,} tokens",
        )  # fmt: skip
    reporter.event("end", stage=STAGE, seconds=time.monotonic() - start)
    return [Kind(f"self: {label}", documents) for label, documents in sorted(out.items())]


def rows_at_once(model: OpenModel, length: int, device: torch.device) -> int:
    """Rows whose keys and values have room; by shapes and the device's total memory alone."""
    h = model.spec.hyper
    size = 2 * h.num_layers * h.kv_heads * h.head_dim * length * (4 if device.type == "cpu" else 2)
    room = CACHE_BYTES if device.type == "cpu" else int(GPU_SHARE * device_bytes(device))
    return max(LEAST_ROWS, min(MOST_ROWS, room // size))


def check_weights(model: OpenModel, total_bytes: int) -> None:
    """UsageError if the weights in 16 bits, beside keys and values, are more than a GPU of ``total_bytes`` holds."""
    h = model.spec.hyper
    weights = 2 * (model.spec.weights + h.vocab_size * h.hidden_size)
    if weights > (0.95 - GPU_SHARE) * total_bytes:
        raise UsageError(
            f"self: the source writes with all of its weights on one GPU: {file_size(weights)}, of {file_size(total_bytes)}",
            "leave out self, and give files or builtin",
        )


class _Writer:
    """The model in memory, and what rows begin with."""

    def __init__(
        self, model: OpenModel, tokenizer: ModelTokenizer, length: int, seed: int, device: torch.device
    ) -> None:
        self.length, self.seed, self.model = length, seed, model
        self.stops = stop_ids(model, tokenizer)
        self.head = [] if model.bos_id is None else [model.bos_id]
        documents = builtin_documents(more=True)
        texts = [d.text for d in documents if d.kind != "chat"]
        self.passages = [ids[ids < model.vocab_size] for ids in tokenizer.encode_batch(texts)]
        self.words = np.unique(np.concatenate(self.passages))
        self.chats = _Chats(tokenizer, [d for d in documents if d.kind == "chat"], self.stops)
        self.generator = Generator(model, device)

    def piece(self, number: int, rows: int) -> dict[str, Tensor]:
        """The documents of one batch: ids one after the other, the length of each, and which of LABELS it is."""
        rng = random.Random(f"{self.seed}/written/{number}")
        labels, drafts = zip(*(self._draft(BEGINNINGS[r % len(BEGINNINGS)], r, rng) for r in range(rows)), strict=True)
        found = self.generator.sampled(drafts, self.length + len(self.head), self.stops, rng.getrandbits(48))
        found = [ids[len(self.head) :] if self.head and ids[:1] == self.head else ids for ids in found]
        return {
            "ids": torch.tensor([i for ids in found for i in ids], dtype=torch.int32),
            "lengths": torch.tensor([len(ids) for ids in found], dtype=torch.int32),
            "labels": torch.tensor([LABELS.index(label) for label in labels], dtype=torch.int32),
        }

    def _draft(self, beginning: str, row: int, rng: random.Random) -> tuple[str, Draft]:
        warmth = TEMPERATURES[row % len(TEMPERATURES)]
        most = max(1, self.length // 2)
        if beginning == "asked" and self.chats.opening:
            return "chat", Draft(self._begun(self.chats.opening), warmth, self.chats.turns)
        if beginning in ("asked", "answered") and self.chats.questions:
            return "chat", Draft(self._begun(rng.choice(self.chats.questions)), warmth, self.chats.after_answer)
        if beginning == "token":
            return "token", Draft([*self.head, int(rng.choice(self.words))], warmth)
        ids = rng.choice(self.passages)
        size = min(most, len(ids), rng.randint(SHORTEST_BEGINNING, LONGEST_BEGINNING))
        first = rng.randrange(len(ids) - size + 1)
        return "continued", Draft([*self.head, *ids[first : first + size].tolist()], warmth)

    def _begun(self, prompt: Sequence[int]) -> list[int]:
        """With BOS in front, if the family needs it and the template has not put it there."""
        return list(prompt) if not self.head or list(prompt[:1]) == self.head else [*self.head, *prompt]


LABELS = ("chat", "continued", "token")


class _Chats:
    """What the chat template puts around turns, as ids.

    opening: in front of a user's first words; turns: what follows the token that ends a user's turn, and an assistant's;
    after_answer: the same where the assistant speaks first; questions: prompts that ask for an answer. All empty without a
    template; without an opening if no token ends a user's turn, since the model would not know that it is done asking.
    """

    def __init__(self, tokenizer: ModelTokenizer, documents: Sequence[Document], stops: frozenset[int]) -> None:
        self.opening: list[int] = []
        self.turns: tuple[tuple[int, ...], ...] = ()
        self.after_answer: tuple[tuple[int, ...], ...] = ()
        self.questions: list[list[int]] = []
        templates = tokenizer.templates
        if templates is None:
            return
        ask, say, again = MARKS
        try:
            text = templates.render(Conversation("", (("user", ask), ("assistant", say), ("user", again))))
            prompts = [
                templates.render(Conversation("", tuple(parse_chat(d).messages[:n])), reply=True)
                for d in documents
                for n in range(1, len(parse_chat(d).messages) + 1)
                if parse_chat(d).messages[n - 1][0] == "user"
            ]
        except CalibrationError:
            return  # a template that fails is told of where calibration rows are made
        first, second, third = text.find(ask), text.find(say), text.find(again)
        if not 0 <= first < second < third:
            return
        before = tokenizer.encode(text[:first]).tolist()
        after_question = tokenizer.encode(text[first + len(ask) : second]).tolist()
        after_answer = tokenizer.encode(text[second + len(say) : third]).tolist()
        if after_answer[:1] and after_answer[0] in stops and after_question[:1] and after_question[0] in stops:
            self.opening = before
            self.turns = (tuple(after_question[1:]), tuple(after_answer[1:]))
            self.after_answer = (self.turns[1], self.turns[0])
        self.questions = [ids for p in prompts if len(ids := tokenizer.encode(p).tolist()) <= MOST_QUESTION]


def _documents(tensors: dict[str, Tensor]) -> list[tuple[str, Ids]]:
    ids = tensors["ids"].numpy().astype(np.int64)
    ends = np.cumsum(tensors["lengths"].numpy())
    parts = np.split(ids, ends[:-1])
    return [(LABELS[int(k)], part) for k, part in zip(tensors["labels"], parts, strict=True) if len(part) > 1]
