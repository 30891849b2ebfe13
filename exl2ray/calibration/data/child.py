"""In the child: the pieces of text of one file, served as they are asked for.

A piece is text, or the messages of a conversation as JSON. Documents are handed out whole up to some megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from exl2ray.calibration.data import plain
from exl2ray.calibration.data.columns import (
    Choice,
    Kind,
    choose,
    common_kind,
    conversation_of,
    flat,
    kind_of_value,
    pair_of,
    with_system,
)
from exl2ray.calibration.data.csv_text import CsvTable, kinds_of
from exl2ray.calibration.data.json_text import records_of_json, records_of_lines
from exl2ray.calibration.data.problem import CALLED_TXT, HOW_TO_MAKE_ONE, DataError
from exl2ray.calibration.data.sources import KINDS, kind_by_name

MOST_PIECES = 4096  # in one answer
SAMPLE, SAMPLE_BYTES = 64, 4 << 20  # records that show which columns there are
MAX_CHAT = 512 << 10  # characters of a conversation that a template is given
TEXT, CHAT = "text", "chat"


@dataclass(frozen=True)
class Piece:
    kind: str  # TEXT or CHAT
    starts: bool  # a document; else it goes on
    data: bytes


class DataReader:
    """One file. whole: bytes up to which a document is one piece. described: what is read, as JSON. Raises DataError."""

    def __init__(self, path: str, column: str | None, whole: int) -> None:
        self._whole = whole
        self.skipped = 0  # records without text
        self._problem: DataError | None = None
        self._pieces = iter(self._open(path, column))

    def _open(self, path: str, column: str | None) -> Iterator[Piece]:
        raw = plain.open_regular(path)
        named, head = kind_by_name(path), raw.read(6)
        if head[:4] == b"PAR1" or head == b"ARROW1" or (named == "Arrow" and head[:4] == b"\xff\xff\xff\xff"):
            raw.seek(0)
            return self._table(raw, "Parquet" if head[:4] == b"PAR1" else "Arrow", column)
        raw.close()
        source = plain.Source(path)
        plain.refuse_others(source.head)
        if named == "Parquet":
            raise DataError("is no Parquet file (those begin with PAR1)", f"is the download complete? {HOW_TO_MAKE_ONE}")
        if named == "Arrow":
            begins = "those begin with ARROW1, streams with FF FF FF FF"
            raise DataError(f"is no Arrow file ({begins})", "is the download complete?")
        if named == "CSV":
            return self._csv(path, source, column)
        if named in ("JSON", "JSON lines"):
            return self._json(path, source, named, column)
        if named in ("text", "Markdown"):
            if column is not None:
                raise DataError("a text file has no columns", f"leave out :{column}", True)
            self.described: dict[str, Any] = {"format": "text", "columns": [], "ignored": [], "form": "text", "note": ""}
            return self._text(source)
        if source.head.lstrip().startswith(b"{"):
            return self._json(path, source, "JSON lines", column)
        endings = ", ".join(e for endings in KINDS.values() for e in endings)
        as_text = f"{CALLED_TXT}; else " if plain.looks_like_text(source.head) else ""
        raise DataError(f"is of a kind that is not read ({endings} are)", as_text + HOW_TO_MAKE_ONE)

    def next(self, size: int) -> tuple[list[tuple[str, bool]], list[bytes], bool]:
        """Some pieces, ``size`` bytes or a little more; whether that was all. What came before a fault is served first."""
        if self._problem is not None:
            raise self._problem
        heads: list[tuple[str, bool]] = []
        out: list[bytes] = []
        have = 0
        try:
            for piece in islice(self._pieces, MOST_PIECES):
                heads.append((piece.kind, piece.starts))
                out.append(piece.data)
                have += len(piece.data)
                if have >= size:
                    return heads, out, False
        except (DataError, MemoryError, RecursionError) as e:
            self._problem = e if isinstance(e, DataError) else DataError(_too_large(e), "split it into several documents")
            if not out:
                raise self._problem from e
            return heads, out, False
        return heads, out, len(out) < MOST_PIECES

    # ---- kinds of files -------------------------------------------------------------------------------------------------

    def _text(self, source: plain.Source) -> Iterator[Piece]:
        starts = True
        for data in plain.pieces_of_file(source, self._whole):
            yield Piece(TEXT, starts, data)
            starts = False

    def _table(self, file: Any, kind: str, column: str | None) -> Iterator[Piece]:
        from exl2ray.calibration.data.arrow import ArrowTable
        from exl2ray.calibration.data.parquet import ParquetTable

        table = ParquetTable(file) if kind == "Parquet" else ArrowTable(file)
        choice = choose(table.columns.kinds, column, joins_strings=True)
        table.columns.check(choice)
        self._describe(kind, choice)
        return chain.from_iterable(self._row(where, cells, choice) for where, cells in table.rows(choice))

    def _csv(self, path: str, source: plain.Source, column: str | None) -> Iterator[Piece]:
        table = CsvTable(path, source)
        rows = table.rows()
        sample = list(islice(rows, SAMPLE))
        if not sample:
            raise DataError("holds no records", HOW_TO_MAKE_ONE)
        choice = choose(kinds_of(table.names, [cells for _, cells in sample]), column, joins_strings=False)
        self._describe("CSV", choice)
        wanted = [table.names.index(name) for name in choice.columns]
        records = chain(sample, rows)
        return chain.from_iterable(self._row(where, [cells[i] for i in wanted], choice) for where, cells in records)

    def _json(self, path: str, source: plain.Source, kind: str, column: str | None) -> Iterator[Piece]:
        records = records_of_lines(source) if kind == "JSON lines" else records_of_json(source)
        if kind == "JSON lines" and source.head.lstrip().startswith(b"["):
            first = _first_line(records)
            if first is None:
                kind, source = "JSON", plain.Source(path)
                records = records_of_json(source)
            else:
                records = chain([first], records)
        sample: list[tuple[str, Any]] = []
        for record in records:
            sample.append(record)
            if len(sample) == SAMPLE or source.position > SAMPLE_BYTES:
                break
        if not sample:
            raise DataError("holds no records", HOW_TO_MAKE_ONE)
        kinds = _kinds([value for _, value in sample])
        if kinds is None:
            if column is not None:
                raise DataError(f"has no columns: it holds {kind_of_value(sample[0][1])}", f"leave out :{column}", True)
            talk = common_kind(kind_of_value(value) for _, value in sample) == "messages"
            choice = Choice((), "messages" if talk else "text")
        else:
            choice = choose(kinds, column, joins_strings=False)
        self._describe(kind, choice)
        return chain.from_iterable(self._record(where, value, choice) for where, value in chain(sample, records))

    def _describe(self, kind: str, choice: Choice) -> None:
        self.described = {
            "format": kind, "columns": list(choice.columns), "ignored": list(choice.ignored), "form": choice.form,
            "note": choice.note,
        }  # fmt: skip

    # ---- records --------------------------------------------------------------------------------------------------------

    def _record(self, where: str, value: Any, choice: Choice) -> Iterator[Piece]:
        if not choice.columns:
            yield from self._row(where, [value], choice)
        elif isinstance(value, dict):
            yield from self._row(where, [value.get(name) for name in choice.columns], choice)
        else:
            self.skipped += 1

    def _row(self, where: str, cells: Sequence[Any], choice: Choice) -> Iterator[Piece]:
        if choice.form == "pair":
            said = pair_of(choice.roles, [None if c is None else _string(c, where).decode() for c in cells])
            yield from self._conversation(said)
            return
        if choice.form == "messages" or (len(cells) == 1 and isinstance(cells[0], (list, dict))):
            beside = cells[1] if len(cells) > 1 else None
            said = with_system(conversation_of(cells[0]), None if beside is None else _string(beside, where).decode())
            if said or choice.form == "messages":
                yield from self._conversation(said)
                return
        parts = [part for part in (_bytes(c) for c in cells) if part is not None]
        text = parts[0] if len(parts) == 1 else b" ".join(parts)
        if not text:
            self.skipped += 1
            return
        position = 0
        for data in plain.pieces(text, self._whole):
            yield Piece(TEXT, position == 0, _checked(data, position, where))
            position += len(data)

    def _conversation(self, said: Sequence[tuple[str, str]]) -> Iterator[Piece]:
        said = [(_whole(role), _whole(content)) for role, content in said]
        if not said:
            self.skipped += 1
        elif sum(len(content) for _, content in said) > MAX_CHAT:  # too much for a template
            text = "\n\n".join(f"{role.capitalize()}: {content}" for role, content in said).encode("utf-8", "replace")
            for i, data in enumerate(plain.pieces(text, self._whole)):
                yield Piece(TEXT, i == 0, data)
        else:
            yield Piece(CHAT, True, json.dumps(said).encode())


def _first_line(records: Iterator[tuple[str, Any]]) -> tuple[str, Any] | None:
    """The first record of JSON lines that begin with a list; None where the file is one list, whatever its name says."""
    try:
        first = next(records)
    except (DataError, StopIteration):
        return None
    return None if kind_of_value(first[1]) == "other" else first


def _kinds(values: Sequence[Any]) -> dict[str, Kind] | None:
    """Of the columns of objects; None for values that are texts or conversations themselves."""
    objects = [v for v in values if isinstance(v, dict)]
    if not objects:
        if common_kind(kind_of_value(v) for v in values) not in ("text", "messages", "lists"):
            raise DataError("holds neither objects nor texts", HOW_TO_MAKE_ONE)
        return None
    names = dict.fromkeys(name for v in objects for name in v)
    return {name: common_kind(kind_of_value(v.get(name)) for v in objects) for name in names}


def _bytes(cell: Any) -> bytes | memoryview | None:
    if cell is None or isinstance(cell, (bytes, memoryview)):
        return cell
    if isinstance(cell, list):
        return "\n".join(str(v) for v in flat(cell) if v is not None).encode("utf-8", "replace")
    if isinstance(cell, dict):
        return None
    return str(cell).encode("utf-8", "replace")


def _whole(text: str) -> str:
    """``text`` without halves of characters, which JSON can write (a lone surrogate) and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _string(cell: Any, where: str) -> bytes:
    return _checked(bytes((_bytes(cell) or b"")[:MAX_CHAT]), 0, where)


def _checked(data: bytes, position: int, where: str) -> bytes:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        message = f"{where}: not UTF-8 at its byte {position + e.start}"
        raise DataError(message, "write the column as UTF-8 strings") from e
    return data


def _too_large(e: BaseException) -> str:
    return "needs too much memory at once" if isinstance(e, MemoryError) else "is nested too deeply"


# ---- requests -----------------------------------------------------------------------------------------------------------

Answer = tuple[dict[str, Any], list[bytes]]


def handlers() -> dict[str, Any]:
    readers: list[DataReader] = []

    def open_file(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        readers[:] = []
        try:
            readers.append(DataReader(request["path"], request["column"], request["whole"]))
        except (DataError, MemoryError, RecursionError) as e:
            return _fault(e), []
        return readers[0].described, []

    def next_pieces(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        try:
            heads, out, end = readers[0].next(request["bytes"])
        except DataError as e:
            return _fault(e), []
        return {"pieces": heads, "end": end, "skipped": readers[0].skipped}, out

    return {"open": open_file, "next": next_pieces}


def _fault(e: BaseException) -> dict[str, Any]:
    if not isinstance(e, DataError):
        return {"fault": _too_large(e), "hint": HOW_TO_MAKE_ONE, "usage": False}
    return {"fault": e.message, "hint": e.hint, "usage": e.usage}
