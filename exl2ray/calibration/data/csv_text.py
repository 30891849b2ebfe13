"""In the child: records of CSV files. The first line names the columns, unless what it holds is text itself.

Cells are text as they stand between the delimiters; an empty one is none. A line with more cells than the first one is an
error: it is text whose commas are not quoted, and would be taken in part.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from exl2ray.calibration.data.columns import Kind, common_kind
from exl2ray.calibration.data.json_text import FIRST_READ, MAX_RECORD
from exl2ray.calibration.data.plain import Source
from exl2ray.calibration.data.problem import DataError

DELIMITERS = {".tsv": "\t", ".psv": "|"}  # by ending; else that of these which the first line has most of:
USUAL = ",;\t|"
LONGEST_NAME = 120  # characters; what is longer is no name of a column
QUOTES = "cells that hold the delimiter or line ends stand in quotes, quotes in them twice; or call plain text *.txt"


def is_separator(line: str) -> bool:
    """Whether it only names the delimiter, as Excel has it: sep=;"""
    return line.startswith("sep=") and len(line.rstrip("\r\n")) == 5


def delimiter_of(name: str, first_line: str) -> str:
    """Of a file of this name that begins with this line."""
    stem, ending = os.path.splitext(name.lower())
    ending = ending if ending in (".csv", *DELIMITERS) else os.path.splitext(stem)[1]
    if is_separator(first_line):
        return first_line[4]
    bare = "".join(first_line.split('"')[::2])  # what is outside of quotes
    return DELIMITERS.get(ending) or max(USUAL, key=bare.count)


class CsvTable:
    """``names`` of the columns; `rows` gives (where, cells). Raises DataError."""

    def __init__(self, name: str, source: Source) -> None:
        csv.field_size_limit(MAX_RECORD)
        lines = _lines(source)
        first = next(lines, "")
        self._before = int(is_separator(first))  # lines in front of what the reader is given
        whole = lines if self._before else chain([first], lines)
        self._reader = csv.reader(whole, delimiter=delimiter_of(name, first), strict=True)
        self._first: list[str] | None = self._next() or []
        self.names = _unique([n.strip() for n in self._first])
        if any(len(n) > LONGEST_NAME for n in self._first):
            self.names = [f"column {i + 1}" for i in range(len(self._first))]
        else:
            self._first = None

    def rows(self) -> Iterator[tuple[str, list[str | None]]]:
        """(where, cells) of each record; a cell that is empty or missing is None."""
        width = len(self.names)
        while True:
            cells = self._first or self._next()
            self._first = None
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            where = f"line {self._line()}"
            if any(cells[width:]):
                raise DataError(f"{where} has {len(cells)} cells, the first line {width}", QUOTES)
            yield where, [c or None for c in cells[:width]] + [None] * (width - len(cells))

    def _line(self) -> int:
        return max(1, self._reader.line_num + self._before)

    def _next(self) -> list[str] | None:
        try:
            return next(self._reader, None)
        except csv.Error as e:
            where = f"line {self._line()}"
            raise DataError(f"{where} is not CSV: {e}", f"is the file complete? {QUOTES}") from e


def kinds_of(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> Mapping[str, Kind]:
    """What columns hold, as these rows of them show: all cells are text, some of it numbers."""
    return {name: common_kind(_kind(row[i]) for row in rows) for i, name in enumerate(names)}


def _kind(cell: str | None) -> Kind:
    if cell is None:
        return "null"
    try:
        float(cell)
    except ValueError:
        return "number" if cell.lower() in ("true", "false") else "text"
    return "number"


def _unique(names: Sequence[str]) -> list[str]:
    """Names that are all there and differ: "text", "text.1" as pandas has it."""
    out: list[str] = []
    for i, given in enumerate(names):
        name = given or f"column {i + 1}"
        same = sum(n == name or (n.startswith(f"{name}.") and n[len(name) + 1 :].isdigit()) for n in out)
        out.append(f"{name}.{same}" if same else name)
    return out


def _lines(source: Source) -> Iterator[str]:
    """Lines with their ends. Raises DataError for what is not UTF-8 text, and for a line without end."""
    rest, number = b"", 0
    while True:
        block = source.read(max(FIRST_READ, len(rest)))
        lines = (rest + block).splitlines(keepends=True)
        rest = lines.pop() if block else b""
        for line in lines:
            number += 1
            if b"\0" in line:
                raise DataError(f"line {number} holds a zero byte: this is not text", "fetch the file again")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as e:
                what = f"line {number}: not UTF-8 at its byte {e.start}"
                raise DataError(what, "iconv -f LATIN1 -t UTF-8 FILE > NEW") from e
        if not block:
            return
        if len(rest) > MAX_RECORD:
            raise DataError(f"line {number + 1} is longer than {MAX_RECORD >> 20} MiB", "split it into several documents")
