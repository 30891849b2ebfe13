"""What ``exl2ray calibration --show`` prints, as data: which kinds of rows there are and how they begin."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl2ray.calibration.rows import Rows
from exl2ray.calibration.tokenizer import ModelTokenizer

FIRST_TOKENS = 48  # decoded for the preview


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


def describe_rows(rows: Rows, tokenizer: ModelTokenizer, words: int = 12) -> RowsView:
    """Summary of calibration rows, kinds in the order of their first row; previews have at most ``words`` words."""
    kinds = []
    for kind in dict.fromkeys(rows.kinds):
        ids = rows.ids[[i for i, k in enumerate(rows.kinds) if k == kind]]
        noise = bool((ids[0] < 0).any())
        text = "" if noise else tokenizer.tokenizer.decode(ids[0, :FIRST_TOKENS].tolist(), skip_special_tokens=False)
        distinct = 0 if noise else torch.unique(ids).numel()
        kinds.append(KindView(kind, ids.shape[0], ids.numel(), distinct, " ".join(text.split()[:words])))
    total, length = rows.ids.shape
    used = torch.unique(rows.ids[rows.ids >= 0]).numel()
    return RowsView(rows.source, total, length, used, tokenizer.vocab_size, tuple(kinds), rows.notes)
