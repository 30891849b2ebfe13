"""The access token: where it comes from, and how it is kept out of everything that is shown or logged."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from exl2ray.errors import UsageError

MASK = "<token>"
MAX_TOKEN = 4096


@dataclass(frozen=True)
class Token:
    """An access token. ``source``: where it was found, in words."""

    value: str = field(repr=False)
    source: str

    def redact(self, text: str) -> str:
        """``text`` with the token masked."""
        return text.replace(self.value, MASK)


def read_token(path: str | Path) -> Token:
    """From a file that holds nothing else. Raises UsageError, never with a part of the content."""
    try:
        with Path(path).open("rb") as f:
            raw = f.read(MAX_TOKEN + 1)
    except OSError as e:
        text = f"--token-file {path}: cannot be read: {e.strerror or type(e).__name__}"
        raise UsageError(text, "name a file of yours that holds the token and nothing else") from e
    text = raw.removeprefix(codecs.BOM_UTF8).decode("ascii", errors="replace")
    return checked(text, f"--token-file {path}")


def checked(text: str, source: str) -> Token:
    """A token of one printable word: anything else would come back, in full, in the error of the HTTP library."""
    value = text.strip()
    if not 8 <= len(value) <= MAX_TOKEN or not value.isascii() or not all("!" <= c <= "~" for c in value):
        raise UsageError(
            f"{source}: this is no access token; it has to be one word of at least 8 letters and digits",
            "make one with write access at https://huggingface.co/settings/tokens",
        )
    return Token(value, source)


@contextmanager
def redacted_logs(token: Token) -> Iterator[None]:
    """Masks the token in the message and the traceback of every record that is logged meanwhile, by whatever library."""
    make = logging.getLogRecordFactory()
    formatter = logging.Formatter()

    def masked(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit: logging would print them on standard error
            message = f"{token.value}: unreadable record"
        if token.value in message:
            record.msg, record.args = token.redact(message), None
        if isinstance(record.exc_info, tuple):
            record.exc_text = token.redact(formatter.formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(masked)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
