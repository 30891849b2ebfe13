"""The text that a model is tuned on, as rows of tokens, a part of them held out to judge by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2ray.calibration.data.sources import Source
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.rows import MAX_BUILTIN_LENGTH, builtin_rows, check_ids
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError, UsageError

HELD_OUT = 10  # every tenth row of a kind
MOST_HELD_TOKENS = 1 << 17  # beyond, a held-out row says little more
Stack = tuple[str, NDArray[np.int64]]  # kind of text, rows (n, length)
LEAST_HELD_ROWS = 4
NO_TEXT = frozenset({"shuffled", "random"})  # kinds of built-in rows that are none


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
) -> TuningRows:
    """Raises CalibrationError for too little text, and what reading it raises."""
    text = length - (bos_id is not None)
    rows = max(2 * HELD_OUT, -(-tokens // length))
    held = max(LEAST_HELD_ROWS, min(rows // (HELD_OUT - 1), MOST_HELD_TOKENS // length))
    stacks = _of_files(sources, tokenizer, rows + held, text) if sources else _builtin(tokenizer, text, vocab_size, seed)
    kinds = [kind for kind, stack in stacks for _ in stack]
    if len(kinds) < 2 * HELD_OUT:
        raise CalibrationError(
            f"the text to tune on has {sum(s.size for _, s in stacks)} tokens; at least {2 * HELD_OUT} rows of {length} are "
            "needed",
            "give more text with --text, or a smaller --length",
        )
    ids = torch.from_numpy(np.concatenate([stack for _, stack in stacks]))
    check_ids(ids, vocab_size, tokenizer, kinds)
    if bos_id is not None:
        ids = torch.cat([torch.full((len(ids), 1), bos_id), ids], dim=1)
    kept = _held_out([len(stack) for _, stack in stacks], held)
    others = sorted(set(range(len(kinds))) - set(kept))[:rows]
    notes = []
    if len(others) < rows:
        notes.append(f"the text has {len(others) * length} tokens to tune on; {tokens} were asked for")
    return TuningRows(ids[others], ids[kept], tuple(kinds[i] for i in kept), tuple(notes))


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


def batches(rows: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Row numbers (size,) of every step: all rows in random order, again in another one when they are through."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * size // rows)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(passes)])
    return [order[i * size : (i + 1) * size] for i in range(steps)]


def _of_files(sources: Sequence[Source], tokenizer: ModelTokenizer, rows: int, length: int) -> list[Stack]:
    """Rows of each source, as even as their lengths allow."""
    out = []
    share = -(-rows // len(sources)) * length
    for source in sources:
        with CalibrationData([source], tokenizer, most_tokens=share) as data:
            ids = data.tokens(share)
        count = len(ids) // length
        out.append((source.name, ids[: count * length].reshape(count, length)))
    return out


def _builtin(tokenizer: ModelTokenizer, length: int, vocab_size: int, seed: int) -> list[Stack]:
    found = builtin_rows(tokenizer, "quantize", MAX_BUILTIN_LENGTH, seed, vocab_size, exclude=NO_TEXT)
    out = []
    for kind in dict.fromkeys(found.kinds):
        ids = found.ids[[i for i, k in enumerate(found.kinds) if k == kind]].flatten().numpy()
        count = len(ids) // length
        out.append((kind, ids[: count * length].reshape(count, length)))
    return out


def _held_out(counts: Sequence[int], most: int) -> list[int]:
    """Numbers of the rows that are held out: every tenth of each kind, and at least one of each with two; ``most`` in all, as
    even over the kinds as their lengths allow."""
    by_kind, start = [], 0
    for count in counts:
        tenth = list(range(start + HELD_OUT - 1, start + count, HELD_OUT)) or list(range(start + 1, start + min(count, 2)))
        by_kind.append(tenth)
        start += count
    wanted = max(most, sum(1 for rows in by_kind if rows))
    share = max(1, -(-wanted // max(1, sum(1 for rows in by_kind if rows))))
    return [row for rows in by_kind for row in _spread(rows, share)]


def _spread(rows: list[int], most: int) -> list[int]:
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
