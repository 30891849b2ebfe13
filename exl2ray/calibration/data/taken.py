"""What calibration rows were made of, for people and for programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exl2ray.wording import plural, some

SHOWN, NAME_CHARACTERS = 8, 40  # columns in a message
PASSES = {"measure": "measurement", "quantize": "quantisation"}


@dataclass(frozen=True)
class Taken:
    """What rows were made of. documents: that were begun; tokens: of them in the rows."""

    source: str  # as it was named
    file: str  # below the source
    format: str  # "Parquet", "JSON lines", "JSON", "text"
    columns: tuple[str, ...]
    ignored: tuple[str, ...]
    form: str  # "text", "messages", "pair"
    documents: int
    tokens: int


def describe(taken: Taken) -> str:
    """What was taken, on one line."""
    what = {"messages": "conversations", "pair": "questions and answers"}.get(taken.form, "")
    names = some(taken.columns, SHOWN, NAME_CHARACTERS)
    columns = f"column{'s' if len(taken.columns) > 1 else ''} {names}" if names else ""
    what = " of ".join(part for part in (what, columns) if part)
    what += ", " if what else ""
    one = os.path.basename(taken.source).startswith(taken.file)  # a column may stand behind it
    place = taken.source if one else f"{taken.source}: {taken.file}"
    return f"{place} ({taken.format}): {what}{plural(taken.documents, 'document')}, {taken.tokens:,} tokens"


def described_passes(rows: Mapping[str, Any]) -> list[str]:
    """What the rows of each pass were made of; ``rows``: `exl2ray.calibration.rows.Rows` by pass."""
    return [f"{PASSES[name]} calibrates on {describe(taken)}" for name, found in rows.items() for taken in found.taken]
