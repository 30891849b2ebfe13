"""What ``exl2ray calibration --show`` prints, as data: which kinds of rows there are and how they begin."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import torch

from exl2ray.calibration.data.taken import Taken
from exl2ray.calibration.rows import Rows
from exl2ray.calibration.tokenizer import ModelTokenizer

FIRST_TOKENS = 48  # decoded for the preview
PREVIEW_CHARACTERS = 4000  # of a text that are looked at: a decoder may make megabytes of a few tokens
PREVIEW_COLUMNS = 44  # what a table of 80 columns has left for the preview


@dataclass(frozen=True)
class KindView:
    """The rows of one kind. ``distinct`` counts different token ids; ``first_words`` starts the kind's first row."""

    kind: str
    rows: int
    tokens: int
    distinct: int
    first_words: str


@dataclass(frozen=True)
class RowsView:
    source: str
    rows: int
    length: int  # tokens of a row
    distinct: int  # different token ids in all rows, of ``vocab_size``
    vocab_size: int
    kinds: tuple[KindView, ...]
    notes: tuple[str, ...]
    taken: tuple[Taken, ...]  # of the user's own data


def preview(text: str, words: int, columns: int = PREVIEW_COLUMNS) -> str:
    """The first ``words`` words of ``text`` on one line, at most ``columns`` wide on a terminal, "..." where cut."""
    # Cut between tokens, a character of several bytes decodes to U+FFFD.
    line = " ".join(text[:PREVIEW_CHARACTERS].rstrip("\ufffd").split()[:words])
    if sum(map(_columns, line)) <= columns:
        return line
    room, kept = columns - 3, ""
    for char in line:
        room -= _columns(char)
        if room < 0:
            break
        kept += char
    return kept.rstrip() + "..."


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def describe_rows(rows: Rows, tokenizer: ModelTokenizer, words: int = 12) -> RowsView:
    """Summary of calibration rows, kinds in the order of their first row, with ``preview`` of their first tokens."""
    kinds = []
    for kind in dict.fromkeys(rows.kinds):
        ids = rows.ids[[i for i, k in enumerate(rows.kinds) if k == kind]]
        noise = bool((ids[0] < 0).any())
        text = "" if noise else tokenizer.decode(ids[0, :FIRST_TOKENS].tolist())
        distinct = 0 if noise else torch.unique(ids).numel()
        kinds.append(KindView(kind, ids.shape[0], ids.numel(), distinct, preview(text, words)))
    total, length = rows.ids.shape
    used = torch.unique(rows.ids[rows.ids >= 0]).numel()
    return RowsView(rows.source, total, length, used, tokenizer.vocab_size, tuple(kinds), rows.notes, rows.taken)
