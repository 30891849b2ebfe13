"""The text that a model is tuned on as rows of tokens, a part of every kind held out (`exl2ray.tune.documents`).

Where none of it is built-in, some built-in text of every kind is watched beside what is held out, so that a tuning on one
kind of text does not spoil others unseen (`exl2ray.tune.judge.WATCHED`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from exl2ray.calibration.data.sources import BUILTIN, Source
from exl2ray.calibration.rows import ROW_CATEGORIES, check_ids
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError, UsageError
from exl2ray.tune.documents import Ids, Kind, builtin_kinds, kinds_of_files, part
from exl2ray.tune.judge import WATCHED
from exl2ray.tune.mixture import PASSES, cut, passes_of, shares

HELD_OUT = 10  # a tenth of every kind
MOST_HELD_TOKENS = 1 << 17  # beyond, a held-out row says little more
LEAST_HELD_ROWS = 4
WATCHED_ROWS = 8  # at most, of each kind of built-in text: a few percent of the time that tuning takes


@dataclass(frozen=True, eq=False)
class TuningRows:
    """ids (R, T), held_ids (H, T) int64, ``held_kinds`` of the latter; BOS in front of every row of families that need it."""

    ids: Tensor
    held_ids: Tensor
    held_kinds: tuple[str, ...]
    notes: tuple[str, ...]


def tuning_rows(
    sources: Sequence[Source],  # none: the built-in text
    tokenizer: ModelTokenizer,
    tokens: int,  # to train on, of all rows together; fewer if there is less text
    length: int,
    vocab_size: int,  # rows of the embedding
    bos_id: int | None = None,
    seed: int = 0,
    written: Sequence[Kind] = (),  # what the source wrote itself (`exl2ray.tune.written`)
    flag: str = "--text",  # that the sources were given with
) -> TuningRows:
    """Of all sources together: files, the built-in text if it is named (or nothing is), and ``written``.

    Raises CalibrationError for too little text, and what reading it raises."""
    text = length - (bos_id is not None)
    rows = max(2 * HELD_OUT, -(-tokens // length))
    held = max(LEAST_HELD_ROWS, min(rows // (HELD_OUT - 1), MOST_HELD_TOKENS // length))
    wanted = (rows + 3 * held) * text  # held-out documents may be longer than what is wanted of them
    files = [s for s in sources if s.files]
    builtin = not sources or any(s.name == BUILTIN and not s.files for s in sources)
    own = builtin_kinds(tokenizer, seed) if builtin else []
    beside = sum(kind.tokens for kind in (*own, *written))
    of_files = max(wanted * len(files) // max(1, len(sources)), wanted - beside)
    of_user = kinds_of_files(files, tokenizer, of_files) if files else []
    groups, passes = [*([kind] for kind in of_user), own, written], [PASSES] * (len(of_user) + 1) + [1]
    kinds = [kind for group in groups for kind in group]
    _check_enough(kinds, text, length, flag)
    trained, kept, notes = _in_two(kinds, held, text, seed)
    _check_left(trained, text, length, flag)
    sizes = iter([sum(map(len, documents)) // text for documents in trained])
    have = [[next(sizes) for _ in group] for group in groups]
    counts = zip(kinds, trained, shares(have, passes, rows), strict=True)
    chosen = [passes_of(documents, count, text, f"{seed}/{kind.name}/passes") for kind, documents, count in counts]
    if (tokens_there := sum(map(sum, have)) * length) < rows * length:
        notes.append(f"the text has {tokens_there} tokens to tune on; {tokens} were asked for")
    if not builtin:
        notes.append(f"trained on this text alone: with {_text_flag(flag)} {BUILTIN} beside it other kinds of text gain, too")
    watched = [] if builtin else _watched(tokenizer, held, text, vocab_size, seed)
    ids, held_ids = (torch.from_numpy(np.concatenate(parts)) for parts in (chosen, [*kept, *(x for _, x in watched)]))
    names = tuple(kind.name for kind, stack in zip(kinds, kept, strict=True) for _ in stack)
    names += tuple(name for name, stack in watched for _ in stack)
    for part_ids, of in ((ids, [k.name for k, stack in zip(kinds, chosen, strict=True) for _ in stack]), (held_ids, names)):
        check_ids(part_ids, vocab_size, tokenizer, of)
    if bos_id is not None:
        ids, held_ids = (torch.cat([torch.full((len(t), 1), bos_id), t], dim=1) for t in (ids, held_ids))
    return TuningRows(ids, held_ids, names, tuple(notes))


def check_text(
    sources: Sequence[Source], tokenizer: ModelTokenizer, length: int, vocab_size: int, bos_id: int | None, flag: str
) -> None:
    """Raises what `tuning_rows` would for text in files; of each it reads as much as could be enough alone. Other text is
    always enough."""
    files, text = [s for s in sources if s.files], length - (bos_id is not None)
    kinds = kinds_of_files(files, tokenizer, len(files) * 2 * HELD_OUT * text) if files else []
    for kind in kinds:
        rows = torch.from_numpy(cut(kind.documents, text))
        if len(rows):
            check_ids(rows, vocab_size, tokenizer, [kind.name] * len(rows))
    if files and len(files) == len(sources):
        _check_enough(kinds, text, length, flag)
        _check_left(_in_two(kinds, MOST_HELD_TOKENS // length, text, seed=0)[0], text, length, flag)


def _check_enough(kinds: Sequence[Kind], text: int, length: int, flag: str) -> None:
    sizes = [kind.distinct for kind in kinds]
    if sum(n // text for n in sizes) < 2 * HELD_OUT or max(sizes, default=0) < 2 * text:
        copies = sum(kind.tokens for kind in kinds) - sum(sizes)
        have = f"{sum(sizes)} tokens" + (f", and {copies} in copies of its documents" if copies else "")
        raise CalibrationError(
            f"{flag}: the text to tune on has {have}; at least {2 * HELD_OUT} rows of {length} are needed",
            _more_text(flag),
        )


def _check_left(trained: Sequence[tuple[Ids, ...]], text: int, length: int, flag: str) -> None:
    """Of many kinds with two or three rows each all may be held out, or lie beside what is."""
    if not any(sum(map(len, documents)) >= text for documents in trained):
        raise CalibrationError(
            f"{flag}: of {len(trained)} kinds of text none has a row of {length} tokens left beside what is held out",
            _more_text(flag),
        )


def _more_text(flag: str) -> str:
    return f"give more text, or the built-in text too: {_text_flag(flag)} {BUILTIN}"


def _text_flag(flag: str) -> str:
    """Where more text is given; -c may be what the text at hand was given with."""
    return "--tune-text" if flag == "-c" else flag


def _watched(tokenizer: ModelTokenizer, held: int, length: int, vocab_size: int, seed: int) -> list[tuple[str, Ids]]:
    """Rows of every kind of built-in text that has one; as many in all as are held out, or fewer. Nobody asked for them, so
    those with words that the model does not have are left out."""
    most = max(1, min(WATCHED_ROWS, held // len(ROW_CATEGORIES)))
    kinds = builtin_kinds(tokenizer, seed, most * length)
    rows = {kind.name: cut(kind.documents, length) for kind in kinds}
    return [(WATCHED + name, _spread(x[(x < vocab_size).all(axis=1)], most)) for name, x in rows.items()]


def _in_two(
    kinds: Sequence[Kind], held: int, length: int, seed: int
) -> tuple[list[tuple[Ids, ...]], list[Ids], list[str]]:
    """Documents of each kind to train on, rows held out, and notes. A tenth of each kind is held out, ``held`` rows in all as
    far as kinds with less text leave room; at least one row of a kind with two."""
    sizes = [kind.distinct for kind in kinds]
    share = max(1, -(-held // max(1, sum(size >= 2 * length for size in sizes))))
    parts, kept, notes = [], [], list[str]()
    for kind, size in zip(kinds, sizes, strict=True):
        tenth = size // (HELD_OUT * length)
        wanted = max(1, min(tenth, share)) * length if size >= 2 * length else 0
        found = part(kind, wanted, length, seed)
        parts.append(found)
        kept.append(_spread(cut(found.held, length), share))
        if found.cut:
            notes.append(f"{kind.name}: documents are long; passages of one are held out, apart from what is trained on")
    apart = frozenset[bytes]().union(*(found.apart for found in parts))
    return [found.without(apart) for found in parts], kept, notes


def _spread(rows: Ids, most: int) -> Ids:
    count = min(most, len(rows))
    return rows[[i * len(rows) // count for i in range(count)]] if count else rows


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """What goes wrong with text inside is told of ``flag``: readers of text know it as -c."""
    try:
        yield
    except (CalibrationError, UsageError) as e:
        if not e.message.startswith("-c "):
            raise
        hint = re.sub(r"(?<![\w-])-c(?= )", flag, e.hint) if e.hint else e.hint
        raise type(e)(flag + e.message.removeprefix("-c"), hint) from e


class Batches(Sequence[Tensor]):
    """Row numbers (size,) of every step: all rows in random order, again in another one when they are through. The orders are
    made as they are come to: of all steps together they would take gigabytes."""

    def __init__(self, rows: int, size: int, steps: int, seed: int) -> None:
        self._rows, self._size, self._steps, self._seed = rows, size, steps, seed
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._generator, self._pass = torch.Generator().manual_seed(self._seed), -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, step: int) -> Tensor: ...

    @overload
    def __getitem__(self, step: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, step: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(step, slice):
            return [self[i] for i in range(self._steps)[step]]
        at = range(self._steps)[step] * self._size
        end, parts = at + self._size, []
        while at < end:
            number, first = divmod(at, self._rows)
            last = min(self._rows, first + end - at)
            parts.append(self._of_pass(number)[first:last])
            at += last - first
        return torch.cat(parts)

    def _of_pass(self, number: int) -> Tensor:
        if number < self._pass:
            self._begin_anew()
        while self._pass < number:
            self._order, self._pass = torch.randperm(self._rows, generator=self._generator), self._pass + 1
        return self._order
