"""How a job is shown: JSON lines for programs, plain lines for files and pipes; ``live.py`` has the terminal's display.

The event vocabulary is that of ``exl2ray.events``. Nothing here decides what is said, only how.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, TextIO

from exl2ray.formats.elsewhere import named
from exl2ray.store.pace import Pace
from exl2ray.wording import duration, file_size, perplexity, plural

Clock = Callable[[], float]
WIDEST_TEXT = 110  # columns of running text


class JsonLines:
    """One object {"event": name, ...fields} per line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def event(self, name: str, **fields: Any) -> None:
        say(self._stream, json_line({"event": name, **fields}))

    def close(self) -> None:
        pass


class Warnings:
    """Warnings on standard error, and nothing else, where standard output is for a program to read."""

    def event(self, name: str, **fields: Any) -> None:
        if name == "warning":
            say(sys.stderr, clean(f"warning: {fields['message']}"))

    def close(self) -> None:
        pass


class Plain:
    """One line per event, without control characters."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._workers = 1
        self._paces: dict[str, Pace] = {}

    def event(self, name: str, **fields: Any) -> None:
        for line in self._lines(name, fields):
            say(self._stream, clean(line))

    def close(self) -> None:
        pass

    def _lines(self, name: str, f: Mapping[str, Any]) -> list[str]:
        if name == "start":
            self._workers = f.get("workers") or 1
            return job_lines(f)
        if name == "stage":
            self._paces[f["stage"]] = Pace(f["items"], f["done"], self._workers, self._clock())
            return [f"[{f['stage']}] {stage_text(f['items'], f['done'])}"]
        if name == "item":
            return [self._item(f)]
        if name == "end":
            return [f"[{f['stage']}] finished in {duration(f['seconds'])}"]
        if name in ("note", "warning"):
            return [f"{name}: {f['message']}"]
        if name == "table":
            return [*([f["title"]] if f["title"] else []), *text_table(f["columns"], f["rows"])]
        if name == "done":
            return [*text_table(*outputs_table(f["outputs"])), *repeated_warnings(f), done_text(f)]
        return []  # "error" is shown by whoever ends the program

    def _item(self, f: Mapping[str, Any]) -> str:
        pace = self._paces.get(f["stage"])
        parts = [f"[{f['stage']}] {f['done']}/{f['items']}", f["key"], duration(f["seconds"]), f.get("detail") or ""]
        if pace is not None:
            now = self._clock()
            pace.finished(f["done"], now, f.get("worker", ""), f["seconds"], f.get("workers", 0))
            eta = pace.eta_seconds(now)
            parts.append("" if eta is None or f["done"] >= f["items"] else f"ETA {duration(eta)}")
        return "  ".join(p for p in parts if p)


def say(stream: TextIO, line: str) -> None:
    """One line, written at once: lines of several threads do not run into each other."""
    stream.write(line + "\n")
    stream.flush()


# ---- texts ----------------------------------------------------------------------------------------------------------


def json_line(value: Any) -> str:
    """One line of strict JSON: NaN and infinity become null, dataclasses objects, everything unknown text."""
    return named(json.dumps(_json_value(value), allow_nan=False))


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _json_value(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in value]
    return str(value)


def clean(text: str) -> str:
    """Text on one line, with escapes for whatever is not printable: names from files may hold anything, and a line end in one
    would begin a line that looks like the program's own. Addresses come in place of the folders that stand for them.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in named(text))


def clean_lines(text: str) -> str:
    """As ``clean``, but line ends stay: for what has lines by nature, as answers of a model have."""
    return "\n".join(map(clean, text.split("\n")))


def show_text(text: str, start: str = "") -> None:
    """Running text on standard output, wrapped between words on a terminal; ``start`` stands before its first line."""
    text = clean(text)
    if not is_terminal(sys.stdout):
        print(start + text)
        return
    width = max(30, min(WIDEST_TEXT, shutil.get_terminal_size().columns - 1))
    indent = " " * len(start)
    lines = textwrap.TextWrapper(width, start, indent, break_long_words=False, break_on_hyphens=False)
    print(lines.fill(text))


def aside(text: str) -> None:
    """A line on standard error: what a command is at, beside what it is asked for."""
    print(clean(text), file=sys.stderr, flush=True)


def job_lines(f: Mapping[str, Any]) -> list[str]:
    """The fields of a "start" event in words, one line or two."""
    bits = ", ".join(f"{b:g}" for b in f.get("bits", ()))
    workers = f.get("workers") or 0
    parts = [
        f"{f.get('architecture', 'model')} in {f.get('model', '?')}",
        f"{f.get('modules', '?')} modules",
        f"{bits} bits per weight" if bits else "",
        str(f.get("device", "")),
        f"{workers} workers" if workers > 1 else "",
        "resumed" if f.get("resumed") else "",
    ]
    return [", ".join(p for p in parts if p), *([places_text(f)] if "source" in f else [])]


def places_text(f: Mapping[str, Any]) -> str:
    """What a "start" event says is read, and where is written."""
    return f"source {f['source']} -> target {', '.join(f['targets'])}; work directory {f['work']}"


def stage_text(items: int, done: int) -> str:
    """How many items a stage has, and how many of them are done."""
    return plural(items, "item") + (f", {done} already done" if done else "")


def repeated_warnings(f: Mapping[str, Any]) -> list[str]:
    """The warnings of a "done" event, as lines: what was told an hour ago has scrolled away."""
    return [f"warning: {text}" for text in f.get("warnings") or ()]


def done_text(f: Mapping[str, Any]) -> str:
    """The last line of a conversion, from the fields of "done"."""
    count = len(f.get("warnings") or ())
    return f"done in {duration(f['seconds'])}" + (f", with {plural(count, 'warning')}: read above" if count else "")


def outputs_table(outputs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the finished models of a "done" event."""
    columns = ["-b", "decoder bpw", "head bpw", "size", "perplexity", "source perplexity", "where"]
    rows = []
    for out in outputs:
        where = out.get("directory") or os.path.dirname((out.get("files") or [""])[0])
        figures = [perplexity(out.get("calibration_perplexity")), perplexity(out.get("reference_perplexity"))]
        bits = [f"{out['bits']:g}", f"{out['achieved_bpw']:.4f}", _figure(out, "head_bpw", ".2f")]
        rows.append([*bits, file_size(out["file_bytes"]), *figures, where])
    if any(out.get("kl") is not None for out in outputs):
        columns[-1:-1] = ["held-out perplexity", "KL", "top-1"]
        for row, out in zip(rows, outputs, strict=True):
            row[-1:-1] = [_figure(out, "heldout_perplexity", ".4g"), _figure(out, "kl", ".4f"), _figure(out, "top1", ".1%")]
    return columns, rows


def _figure(out: Mapping[str, Any], name: str, form: str) -> str:
    return "-" if out.get(name) is None else format(out[name], form)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of an aligned table; columns of numbers are right-aligned. Nothing for a table without rows."""
    if not rows:
        return []
    cells = [[clean(str(c)) for c in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [is_numeric(column) for column in zip(*cells[1:], strict=True)]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]


def is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column reads as numbers (with units): every cell that says something begins with a digit or sign."""
    return all(c[0].isdigit() or (c[0] in "+-" and c[1:2].isdigit()) for c in cells if c not in ("", "-"))


# ---- where it goes --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """Yields the real standard output for JSON; whatever else is printed meanwhile goes to standard error.

    The file descriptor is replaced, so this holds for C libraries and child processes too.
    """
    try:
        number, errors = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, AttributeError, io.UnsupportedOperation):  # captured by a test or a notebook
        stream = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            yield stream
        return
    sys.stdout.flush()
    kept = os.dup(number)
    os.dup2(errors, number)
    stream = open(os.dup(kept), "w", encoding="utf-8")
    try:
        yield stream
        stream.flush()
    finally:
        with contextlib.suppress(OSError):  # if its reader is gone, that has been raised
            stream.close()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(kept, number)
        os.close(kept)


def is_terminal(stream: TextIO) -> bool:
    """Whether a live display makes sense on a stream."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
