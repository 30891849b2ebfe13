"""From texts to rows of exactly ``ctx`` tokens: the constructions that `exl2ray.calibration.rows` names, as functions.

``Pieces`` hands out the tokens of a category of rows piece by piece, in this order:

1. each text up to its first ``limit`` tokens, so that one long document cannot fill a set;
2. what was cut off: the remainders of long texts, and the ends that did not fit into a row;
3. with ``repeat``, a second pass over the texts, last one first, each without its first ``limit / 2`` tokens (or first
   half), so that nothing returns at the same place in a row;
4. generated text, without end.

No token of a text is handed out more than twice. ``used`` counts what came from where.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
WRITTEN, GENERATED, SECOND_PASS = "written", "generated", "second pass"
MIN_PIECE = 64  # tokens; a shorter remainder is not worth a place in a row
SHUFFLED_PIECE = 128  # tokens


class Pieces:
    """Supply of token pieces of one category of rows; ``encode`` turns a text into ids (n,)."""

    def __init__(
        self,
        texts: Sequence[str],
        repeat: bool,
        generated: Iterator[str],
        encode: Callable[[str], Ids],
        limit: int,
    ) -> None:
        self.used: Counter[str] = Counter()
        self._encode = encode
        self._limit = limit
        self._texts = deque(texts)
        self._rests: deque[tuple[str, Ids]] = deque()
        self._again: list[Ids] = []  # texts of the second pass; taken from the end
        self._repeat = repeat
        self._generated = generated

    def take(self) -> tuple[str, Ids]:
        """The next piece, (origin, ids (n,)) with 1 <= n <= limit."""
        while True:
            origin, ids = self._next()
            if len(ids) > self._limit:
                self._rests.append((origin, ids[self._limit :]))
                ids = ids[: self._limit]
            if len(ids):
                self.used[origin] += len(ids)
                return origin, ids

    def put_back(self, origin: str, ids: Ids) -> None:
        """Return the end of a piece; it is handed out again once all texts have been started."""
        self.used[origin] -= len(ids)
        if len(ids) >= MIN_PIECE:
            self._rests.append((origin, ids))

    def _next(self) -> tuple[str, Ids]:
        if self._texts:
            ids = self._encode(self._texts.popleft())
            if self._repeat:
                self._again.append(ids[min(len(ids), self._limit) // 2 :])
            return WRITTEN, ids
        if self._rests:
            return self._rests.popleft()
        if self._again:
            return SECOND_PASS, self._again.pop()
        return GENERATED, self._encode(next(self._generated))


def consecutive_rows(pieces: Pieces, rows: int, ctx: int) -> Ids:
    """Int64 (rows, ctx): the texts one after the other, cut every ``ctx`` tokens; no BOS or EOS."""
    parts, have = [], 0
    while have < rows * ctx:
        origin, ids = pieces.take()
        extra = max(0, have + len(ids) - rows * ctx)
        if extra:
            pieces.put_back(origin, ids[len(ids) - extra :])
        parts.append(ids[: len(ids) - extra])
        have += len(parts[-1])
    return np.concatenate(parts).reshape(rows, ctx)


def document_rows(pieces: Pieces, rows: int, ctx: int, bos: int | None, eos: int | None) -> Ids:
    """Int64 (rows, ctx): each row starts with a new piece and is filled with whole pieces, each between BOS and EOS.

    The second half of the rows (the larger one if odd) starts with BOS; in the first half that BOS is removed and the
    row starts with the first token of text. Without a BOS or EOS (None) the rows simply lack it.
    """
    return np.stack([_document_row(pieces, ctx, bos, eos, keep_bos=i >= rows // 2) for i in range(rows)])


def _document_row(pieces: Pieces, ctx: int, bos: int | None, eos: int | None, keep_bos: bool) -> Ids:
    skip = 0 if keep_bos or bos is None else 1
    head = np.array([] if bos is None else [bos], dtype=np.int64)
    tail = np.array([] if eos is None else [eos], dtype=np.int64)
    parts, have = [], 0
    while have < ctx + skip:
        origin, ids = pieces.take()
        room = ctx + skip - have - len(head)
        if room < len(ids):
            pieces.put_back(origin, ids[max(room, 0) :])
        parts += [head, ids, tail]
        have += len(head) + len(ids) + len(tail)
    return np.concatenate(parts)[skip : skip + ctx]


def shuffled_rows(tokens: Ids, rows: int, rng: random.Random) -> Ids:
    """Int64 (rows, ctx): 128-token pieces of ``tokens`` (n, ctx) in random order, none of them twice.

    The reference draws with replacement; without, no passage can pile up. ctx must be a multiple of 128 and n >= rows.
    """
    pieces = tokens.reshape(-1, SHUFFLED_PIECE)
    order = rng.sample(range(len(pieces)), rows * tokens.shape[1] // SHUFFLED_PIECE)
    return pieces[order].reshape(rows, tokens.shape[1])


def uniform_rows(rows: int, ctx: int, vocab_size: int, rng: random.Random) -> Ids:
    """Int64 (rows, ctx): ids drawn uniformly from [0, vocab_size)."""
    # random() is the one method whose sequence Python promises to keep.
    ids = np.array([int(rng.random() * vocab_size) for _ in range(rows * ctx)], dtype=np.int64)
    return ids.reshape(rows, ctx)


def interleave(families: dict[str, list[str]], rng: random.Random) -> list[str]:
    """Texts in random order, taken in turn from each family (language, file type, kind) while it lasts."""
    queues = []
    for name in sorted(families):
        queue = list(families[name])
        rng.shuffle(queue)
        queues.append(queue)
    rng.shuffle(queues)
    longest = max((len(q) for q in queues), default=0)
    return [q[i] for i in range(longest) for q in queues if i < len(q)]
