"""Whether files of a vocabulary are what their names say, told from their bytes.

transformers tries one reader after the other, and of a damaged file complains about a package for another kind, or makes a
tokenizer without a vocabulary of it.
"""

from __future__ import annotations

import re
from pathlib import Path

from exl2ray.errors import SourceError
from exl2ray.formats.json_file import parse_json_object

AGAIN = "download the file again"
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,10}")


def check_form(path: Path, data: bytes) -> None:
    """Raises SourceError for a file that holds no vocabulary of the kind of its name."""
    if path.suffix == ".model":
        _check_model(path, data)
    elif path.name == "vocab.json":
        ids = parse_json_object(data, str(path), SourceError, AGAIN).values()
        if not ids or not all(type(v) is int for v in ids):
            raise SourceError(f"{path}: no object from tokens to ids", AGAIN)
    elif path.name == "tekken.json":
        if not isinstance(parse_json_object(data, str(path), SourceError, AGAIN).get("vocab"), list):
            raise SourceError(f"{path}: has no list `vocab`, as vocabularies of Tekken do", AGAIN)
    else:  # merges.txt
        try:
            data.decode()
        except UnicodeDecodeError as e:
            raise SourceError(f"{path}: not UTF-8 (byte {e.start})", AGAIN) from e


def begins_as_vocabulary(head: bytes) -> bool:
    """Whether the first bytes of a tokenizer.model are those of a SentencePiece model, or of a file of tiktoken."""
    first = head.partition(b"\n")[0].strip()
    return _sentencepiece(head)[0] > 0 or TIKTOKEN_LINE.fullmatch(first) is not None


def _is_tiktoken(data: bytes) -> bool:
    """Whether each line is a token in base64 and its rank."""
    lines = data.splitlines()
    return bool(lines) and all(TIKTOKEN_LINE.fullmatch(line) for line in lines if line)


def _check_model(path: Path, data: bytes) -> None:
    """tokenizer.model is either kind; the other names are used for one of them each."""
    if _is_tiktoken(data):
        return
    pieces, whole = _sentencepiece(data)
    if pieces and whole:
        return
    if pieces or TIKTOKEN_LINE.fullmatch(data.partition(b"\n")[0].strip()):
        raise SourceError(f"{path}: cut off or damaged: it begins as a vocabulary and does not go on as one", AGAIN)
    raise SourceError(f"{path}: neither a SentencePiece model nor a file of tiktoken", AGAIN)


def _sentencepiece(data: bytes) -> tuple[int, bool]:
    """(pieces in a row from the start, whether the file ends where one of its fields does).

    A serialised ModelProto: fields 1 (a piece), 2 to 5 (settings), from 200 (extensions), each a message of a stated length.
    """
    at, pieces = 0, 0
    while at < len(data):
        field, at = _varint(data, at)
        length, at = _varint(data, at)
        number = field >> 3
        if field & 7 != 2 or number < 1 or 5 < number < 200 or at + length > len(data):
            return pieces, False
        pieces += number == 1
        at += length
    return pieces, True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where the next begins); past the end: a length that no file has."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    return 1 << 40, at
