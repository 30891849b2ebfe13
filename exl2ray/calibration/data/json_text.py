"""In the child: records of JSON lines, and of JSON files, which are read element by element however large they are."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from exl2ray.calibration.data.plain import AGAIN, MIB, Source
from exl2ray.calibration.data.problem import DataError

MAX_RECORD = 32 * MIB  # bytes of a line, or of an element of a JSON file
FIRST_READ = 64 << 10
LISTS = ("data", "train", "rows", "examples", "instances", "conversations", "documents", "items")
BLANKS = b" \t\r\n"
FLAT = 'records are flat: {"text": "..."}, or {"messages": [{"role": "user", "content": "..."}, ...]}'


def records_of_lines(source: Source) -> Iterator[tuple[str, Any]]:
    """(where, value) of every line that is not empty. Raises DataError with the number of the line."""
    rest, number, blank = b"", 0, 0
    while True:
        block = source.read(max(FIRST_READ, len(rest)))
        lines = (rest + block).split(b"\n")
        rest = lines.pop() if block else b""
        if not any(lines):  # a block of line ends alone, counted at once: gigabytes of them may follow
            number, blank = number + len(lines), blank + len(lines)
            lines = []
        for line in lines:
            number += 1
            if line.strip(BLANKS):
                blank = 0
                yield f"line {number}", _parsed(line, f"line {number}")
                continue
            blank += len(line) + 1
        if blank > MAX_RECORD:
            raise DataError(f"holds more than {MAX_RECORD >> 20} MiB of blanks before line {number}", AGAIN)
        if not block:
            return
        if len(rest) > MAX_RECORD:
            raise DataError(f"line {number + 1} is longer than {MAX_RECORD >> 20} MiB", "split it into several documents")


def records_of_json(source: Source) -> Iterator[tuple[str, Any]]:
    """(where, value) of the elements of a list, or of the one list in an object; the object itself; or JSON lines."""
    head = source.head.lstrip(BLANKS)
    if head.startswith(b"["):
        yield from _elements(source)
        return
    first, _, more = head.partition(b"\n")
    if more.strip(BLANKS) and _is_json(first):
        yield from records_of_lines(source)
        return
    whole = source.read(MAX_RECORD + 1)
    if len(whole) > MAX_RECORD:
        raise DataError(f"is one JSON object of more than {MAX_RECORD >> 20} MiB", "write one object per line: JSON lines")
    value = _parsed(whole, "the file")
    lists = {k: v for k, v in value.items() if isinstance(v, list)} if isinstance(value, dict) else {}
    name = next((n for n in LISTS if n in lists), None) or (next(iter(lists)) if len(lists) == 1 == len(value) else None)
    if name is None or (name == "conversations" and len(value) > 1):
        yield "the object", value
        return
    for i, element in enumerate(lists[name]):
        yield f"{name}[{i}]", element


def _elements(source: Source) -> Iterator[tuple[str, Any]]:
    """The elements of a top-level list, with as little of the file in memory as one of them takes."""
    decoder, text, position, number, complete = json.JSONDecoder(), "", 0, 0, False
    utf8 = codecs.getincrementaldecoder("utf-8")()

    def more() -> bool:
        """Appends to ``text``; False at the end of the file."""
        nonlocal text, position, complete
        block = source.read(max(FIRST_READ, len(text) - position))
        try:
            text, position = text[position:] + utf8.decode(block), 0
        except UnicodeDecodeError as e:
            at = source.position - len(e.object) + e.start
            raise DataError(f"not UTF-8 at byte {at}", "iconv -f LATIN1 -t UTF-8 FILE > NEW") from e
        complete = not block
        return not complete

    more()
    position = text.index("[") + 1
    while True:
        position = _skip(text, position)
        if position >= len(text):
            if not more():
                raise DataError(f"breaks off behind element {number}", "fetch the file again")
            continue
        if text[position] == "]":
            return
        if text[position] == "," and number:
            position = _skip(text, position + 1)
        try:
            value, end = decoder.raw_decode(text, position)
            after = _skip(text, end)
            if after < len(text) or complete:  # else a number may go on
                yield f"element {number}", value
                position, number = after, number + 1
                continue
        except ValueError as e:
            problem: Exception = e
        except RecursionError as e:
            raise DataError(f"element {number} is nested too deeply", FLAT) from e
        else:
            problem = EOFError("breaks off")
        if len(text) - position > MAX_RECORD:
            text = f"element {number}: not JSON, or longer than {MAX_RECORD >> 20} MiB: {_short(problem)}"
            raise DataError(text, "is the file complete? else split it into several documents")
        if not more():
            raise DataError(f"element {number} is not JSON: {_short(problem)}", "is the file complete?")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 at its byte {e.start}", "iconv -f LATIN1 -t UTF-8 FILE > NEW") from e
    except ValueError as e:
        if "integer string conversion" in str(e):
            raise DataError(f"{where} holds a number of more digits than can be read", "write it as text, in quotes") from e
        raise DataError(f"{where} is not JSON: {_short(e)}", "JSON lines have one object per line") from e
    except RecursionError as e:
        raise DataError(f"{where} is nested too deeply", FLAT) from e


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
        return True
    except (ValueError, RecursionError):
        return False


def _short(e: Exception) -> str:
    return str(e)[:120]
