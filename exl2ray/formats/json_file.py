"""JSON from outside: config.json, indexes, tokenizer settings, measurements, headers of weights.

Such files come from downloads, so their size, the depth of their nesting and the length of their numbers are bounded before
Python's parser sees them, and what is not JSON is named as what it is. Of a key that appears twice the last one counts, as
for ``transformers``; who cannot have that asks for ``unique`` keys.

NaN and Infinity are no JSON, but Python writes and reads them, and some models' files have them (``time_step_limit``). Who
reads only some keys of a file asks for ``odd`` values: each becomes a `NoNumber`, which passes no check of a type.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from exl2ray.errors import Exl2RayError, SourceError, reading_hint
from exl2ray.formats.regular import NotRegularError, open_regular

Error: TypeAlias = type[Exl2RayError]

MAX_DEPTH = 64  # lists and objects within each other; configs and measurements have fewer than 10
MAX_NUMBER_CHARACTERS = 300  # so every integer fits into a double; 10^30 is as long as integers get in real files
MIB = 1 << 20
# What a file of each kind may hold, by name; published ones are smaller by a factor of ten or more.
LIMITS: Mapping[str, int] = {
    "config.json": 8 * MIB,
    "generation_config.json": 1 * MIB,
    "tokenizer_config.json": 32 * MIB,  # lists every added token
    "special_tokens_map.json": 8 * MIB,
    "added_tokens.json": 32 * MIB,
    "preprocessor_config.json": 1 * MIB,
    "adapter_config.json": 8 * MIB,
    "tokenizer.json": 256 * MIB,
}
OTHER_LIMIT = 8 * MIB
LFS_POINTER = b"version https://git-lfs"  # begins a file that stands for another one
ENCODINGS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
BINARIES = ((b"\x1f\x8b", "a gzip file"), (b"PK\x03\x04", "a ZIP file"), (b"GGUF", "a GGUF file"), (b"%PDF", "a PDF"))


def read_json_object(
    path: str | Path,
    error: Error = SourceError,
    hint: str = "",  # of errors that have no better one
    max_bytes: int | None = None,  # None: LIMITS of the file's name
    odd: bool = False,
) -> dict[str, Any]:
    """The JSON object in a regular file; odd: of `parse_json_object`. Raises ``error`` naming the file, what is wrong and
    where."""
    path = Path(path)
    limit = LIMITS.get(path.name, OTHER_LIMIT) if max_bytes is None else max_bytes
    return parse_json_object(read_bounded(path, limit, error, hint), str(path), error, hint, odd=odd)


@dataclass(frozen=True)
class NoNumber:
    """What stands in a file where a number should, as it is written there: NaN, -Infinity, 1e999."""

    text: str

    def __repr__(self) -> str:
        return self.text[:40]

    @property
    def json(self) -> str:
        """What stands for it in valid JSON: infinities are numbers beyond all others, for NaN there is null."""
        return "null" if self.text == "NaN" else "-1e999" if self.text.startswith("-") else "1e999"


def odd_values(obj: Any) -> Iterator[tuple[str, NoNumber]]:
    """Each with the keys on the way to it, joined by dots."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(obj, ())]
    while waiting:
        value, keys = waiting.pop()
        if isinstance(value, NoNumber):
            yield ".".join(repr(k[:80])[1:-1] for k in keys), value  # control characters shown as text
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [(v, (*keys, str(k))) for k, v in entries if isinstance(v, (dict, list, NoNumber))]


def as_json(obj: Any, **how: Any) -> str:
    """``obj`` as valid JSON, with odd values, and floats that are not finite, as `NoNumber.json` says. how: of `json.dumps`.
    TypeError for what is neither."""
    text = json.dumps(obj, default=_as_float, **how)
    return _STRING_OR_ODD.sub(lambda m: m[0] if m[0].startswith('"') else NoNumber(m[0]).json, text)


_STRING_OR_ODD = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')


def _as_float(value: Any) -> float:
    if not isinstance(value, NoNumber):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return float(value.text)


def as_number(value: Any) -> float | None:
    """``value`` as a float if it is a finite number, truth values not counted; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def read_bounded(path: str | Path, max_bytes: int, error: Error = SourceError, hint: str = "") -> bytes:
    """All bytes of a regular file of at most ``max_bytes``; raises ``error`` otherwise. Never waits for a FIFO or device."""
    path = Path(path)
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            raw = b"" if size > max_bytes else f.read(max_bytes + 1)
    except NotRegularError as e:
        raise error(f"{path}: {e.strerror}", hint) from e
    except OSError as e:
        missing = "missing" if e.errno == errno.ENOENT and not os.path.islink(path) else f"cannot be read: {e.strerror or e}"
        raise error(f"{path}: {missing}", reading_hint(e, hint)) from e
    except ValueError as e:  # a NUL in the name
        raise error(f"{str(path)!r}: not a file name", hint) from e
    if max(size, len(raw)) > max_bytes:
        text = f"{path}: {max(size, len(raw))} bytes; larger than {max_bytes} bytes, which such a file may have"
        raise error(text, hint or "is it the file that its name says? fetch it again")
    return raw


def parse_json_object(
    raw: bytes, what: str, error: Error = SourceError, hint: str = "", unique: bool = False, odd: bool = False
) -> dict[str, Any]:
    """``read_json_object`` for bytes; ``what`` names their origin and opens every message. unique: refuses a key that appears
    twice in one object, too. odd: NaN, Infinity and what is beyond the range of numbers become a `NoNumber` each."""
    text = _text(raw, what, error, hint)
    if _depth_exceeds(raw, MAX_DEPTH):
        raise error(f"{what}: nested too deeply, more than {MAX_DEPTH} lists and objects within each other", hint)

    refused: list[tuple[NoNumber, str]] = []  # what the parser met, and why not; its place is known only when all is read

    def integer(digits: str) -> Any:
        return int(digits) if len(digits) <= MAX_NUMBER_CHARACTERS else refuse(f"a number of {len(digits)} digits")

    def fraction(digits: str) -> Any:
        if len(digits) > MAX_NUMBER_CHARACTERS:
            return refuse(f"a number of {len(digits)} characters")
        value = float(digits)
        return strange(digits, ", beyond the range of numbers") if math.isinf(value) else value

    def constant(name: str) -> Any:
        return strange(name, ", which is not a JSON number")

    def strange(text: str, why: str) -> NoNumber:
        return NoNumber(text) if odd else refuse(text, why)

    def refuse(text: str, why: str = "") -> NoNumber:
        refused.append((NoNumber(text), why))
        return refused[-1][0]

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise error(f"{what}: the key {twice[:80]!r} appears twice in one object", hint)
        return out

    try:
        obj = json.loads(
            text, object_pairs_hook=once if unique else None, parse_int=integer, parse_float=fraction,
            parse_constant=constant,
        )  # fmt: skip
    except json.JSONDecodeError as e:
        raise error(f"{what}: not valid JSON: {_syntax(text, e)}", hint) from e
    except RecursionError as e:  # whoever called was deep already
        raise error(f"{what}: nested too deeply", hint) from e
    if not isinstance(obj, dict):
        this = str(obj) if isinstance(obj, NoNumber) else "null" if obj is None else f"a {JSON_NAMES[type(obj)]}"
        raise error(f"{what}: a JSON object is needed, this is {this}", hint)
    if refused:
        number, why = refused[0]  # the last of equal keys counts, so it may be gone
        place = next((place for place, value in odd_values(obj) if value is number), "a value")
        raise error(f"{what}: {place} is {number}{why}", hint)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(obj, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as e:
            raise error(f"{what}: holds half a character (a lone surrogate, {e.object[e.start]!r})", hint) from e
    return obj


# ---- what it is that is not JSON ----------------------------------------------------------------------------------------


def refuse_substitute(raw: bytes, what: str, error: Error) -> None:
    """Raises ``error`` for what git and servers put in the place of a file, told from its first bytes."""
    if raw.startswith(LFS_POINTER):
        raise error(f"{what}: a Git LFS pointer, not the file itself", "run `git lfs pull` in the model's folder")
    if re.match(rb"\s*<(!doctype|html|\?xml)", raw[:200], re.IGNORECASE):
        raise error(f"{what}: a web page, not the file itself", "the server sent a page in its place: fetch it again")


def _text(raw: bytes, what: str, error: Error, hint: str) -> str:
    """``raw`` as text; raises ``error`` for what can be told from its first bytes."""
    if not raw.strip():
        raise error(f"{what}: is empty: not valid JSON", hint)
    if not raw.strip(b"\0"):
        raise error(f"{what}: holds only zeros: not valid JSON", "the download or the copy broke off: fetch it again")
    refuse_substitute(raw, what, error)
    for mark, name in ENCODINGS:
        if raw.startswith(mark):
            raise error(f"{what}: not valid JSON: {name} text; UTF-8 is needed", "save it again as UTF-8")
    if raw[:4] in (raw[:1] + b"\0" + raw[2:3] + b"\0", b"\0" + raw[1:2] + b"\0" + raw[3:4]):
        raise error(f"{what}: not valid JSON: UTF-16 text; UTF-8 is needed", "save it again as UTF-8")
    for mark, name in BINARIES:
        if raw.startswith(mark):
            raise error(f"{what}: not valid JSON: {name}", hint)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise error(f"{what}: not valid JSON: not UTF-8 (byte {e.start})", hint) from e


def _syntax(text: str, e: json.JSONDecodeError) -> str:
    """What is wrong where; the mistakes of editing by hand by name."""
    place = f"line {e.lineno} column {e.colno}"
    rest, before = text[e.pos : e.pos + 16].lstrip(), text[:e.pos].rstrip()[-1:]
    if not text[e.pos :].strip():
        return f"cut off at {place}"
    if rest.startswith(("//", "/*", "#")):
        return f"a comment at {place}; JSON has none"
    ahead = re.match(r",\s*[\]}]", text[e.pos : e.pos + 200])  # newer Pythons point at the comma
    if ahead or (before == "," and rest[:1] in ("]", "}")):
        return f"a trailing comma before {place}"
    if rest.startswith("'"):
        return f"single quotes at {place}; JSON needs double ones"
    word = re.match(r"(True|False|None|nan|inf|undefined)\b", rest)
    if word:
        return f"{word[0]} at {place} is not JSON"
    return f"{e.msg} at {place}"


JSON_NAMES: dict[type, str] = {list: "list", str: "text", int: "number", float: "number", bool: "boolean"}


def _depth_exceeds(raw: bytes, limit: int) -> bool:
    """Whether lists and objects are nested more than ``limit`` deep. Linear in time; brackets in strings do not count."""
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return False
    import numpy as np

    # Without escaped backslashes, then without escaped quotes, every quote opens or closes a string.
    plain = np.frombuffer(raw.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside, depth = 0, 0
    for start in range(0, len(plain), 4 * MIB):
        part = plain[start : start + 4 * MIB]
        quoted = (np.cumsum(part == ord('"'), dtype=np.uint32) + inside) & 1
        opening = ((part == ord("[")) | (part == ord("{"))) & (quoted == 0)
        closing = ((part == ord("]")) | (part == ord("}"))) & (quoted == 0)
        depths = depth + np.cumsum(opening.astype(np.int8) - closing.astype(np.int8), dtype=np.int64)
        if int(depths.max()) > limit:
            return True
        inside, depth = int(quoted[-1]), int(depths[-1])
    return False
