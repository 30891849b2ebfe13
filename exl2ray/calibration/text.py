"""The built-in calibration text: original documents of fifteen kinds.

A git checkout keeps one file per document, ``text/<kind>/<name>.<ext>``; what was written later lies in ``text/more/``, and
is left out of the usual rows, whose bytes decide those of every conversion. A wheel carries the same files as one
compressed archive, ``text.tar.xz`` (written by ``pack_text`` while the wheel is built). Both are read here and give the
same documents in the same order.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from exl2ray.errors import CalibrationError

KINDS = (
    "essays",
    "fiction",
    "poetry",
    "letters",
    "forum",
    "instructions",
    "news",
    "legal_medical",
    "chat",
    "code",
    "formats",
    "maths",
    "technical",
    "multilingual",
    "unicode",
)
ARCHIVE = "text.tar.xz"
MORE = "more/"


@dataclass(frozen=True)
class Document:
    """One text of the built-in set; ``name`` is the file name with its extension."""

    kind: str
    name: str
    text: str
    more: bool = False  # written later: part of the larger set only

    @property
    def family(self) -> str:
        """What varies inside the kind: the language of multilingual text, the file type of code, else the kind."""
        if self.kind == "multilingual":
            return re.split(r"[_.]", self.name, maxsplit=1)[0]
        if self.kind in ("code", "formats", "unicode"):
            return f"{self.kind}:{Path(self.name).suffix.lower()}"
        return self.kind


@dataclass(frozen=True)
class Conversation:
    """A chat document. ``messages`` are (role, content); roles are system (first only), user, assistant."""

    title: str
    messages: tuple[tuple[str, str], ...]


def builtin_documents(more: bool = False) -> tuple[Document, ...]:
    """The usual built-in documents, sorted by kind (order of ``KINDS``) and name; ``more``: the larger set, for tuning and
    ``--builtin-text all``.

    Raises CalibrationError if the installation has no text, or holds a file that is not UTF-8 or of no known kind.
    """
    return tuple(d for d in _all_documents() if more or not d.more)


@lru_cache(maxsize=1)
def _all_documents() -> tuple[Document, ...]:
    root = Path(str(resources.files("exl2ray.calibration")))
    if (root / "text").is_dir():
        return load_tree(root / "text")
    if (root / ARCHIVE).is_file():
        return load_archive((root / ARCHIVE).read_bytes(), root / ARCHIVE)
    raise CalibrationError(
        f"built-in calibration text not found: neither text/ nor {ARCHIVE} in {root}",
        "reinstall exl2ray, or give your own text with -c FILE.parquet",
    )


def load_tree(root: Path) -> tuple[Document, ...]:
    """Documents of a folder ``<kind>/<name>``."""
    return _documents((p.relative_to(root).as_posix(), p.read_bytes()) for p in _text_files(root))


def load_archive(data: bytes, origin: Path) -> tuple[Document, ...]:
    """Documents of an archive made by ``pack_text``; ``origin`` names it in errors."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar:
            members = [(m.name, tar.extractfile(m)) for m in tar.getmembers() if m.isfile()]
            return _documents((name, f.read()) for name, f in members if f is not None)
    except (tarfile.TarError, EOFError, OSError) as e:
        raise CalibrationError(f"{origin}: broken text archive: {e}", "reinstall exl2ray") from e


def pack_text(dest: Path, root: Path | None = None) -> Path:
    """Write the documents under ``root`` (default: the checkout's) to the archive ``dest``; equal text, equal bytes."""
    source = root if root is not None else Path(__file__).parent / "text"
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:xz", preset=9, format=tarfile.PAX_FORMAT) as tar:
        for path in _text_files(source):
            data = path.read_bytes()
            info = tarfile.TarInfo(path.relative_to(source).as_posix())
            info.size = len(data)  # owner, mode and time stay at their defaults, so they do not vary
            tar.addfile(info, io.BytesIO(data))
    dest.write_bytes(raw.getvalue())
    return dest


def parse_chat(doc: Document) -> Conversation:
    """The conversation in a chat document; raises CalibrationError naming the file and what is wrong."""
    where = f"calibration text {doc.kind}/{doc.name}"
    try:
        obj = json.loads(doc.text)
        title, raw = obj["title"], obj["messages"]
        messages = tuple((_string(m["role"]), _string(m["content"])) for m in raw)
        conversation = Conversation(_string(title), messages)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise CalibrationError(f"{where}: not a conversation: {type(e).__name__}: {e}") from e
    turns = [role for role, _ in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise CalibrationError(f"{where}: roles {[r for r, _ in messages]}: user and assistant must alternate")
    if not all(content.strip() for _, content in messages):
        raise CalibrationError(f"{where}: a message is empty")
    return conversation


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _text_files(root: Path) -> list[Path]:
    files = (p for p in root.rglob("*") if p.is_file())
    # Python files among the documents may have been compiled by an installer.
    kept = (p for p in files if not p.name.startswith(".") and "__pycache__" not in p.parts)
    return sorted(kept, key=lambda p: p.relative_to(root).as_posix())


def _documents(files: Iterable[tuple[str, bytes]]) -> tuple[Document, ...]:
    documents = []
    for rel, data in files:
        kind, _, name = rel.removeprefix(MORE).partition("/")
        if kind not in KINDS or not name or "/" in name:
            raise CalibrationError(f"calibration text {rel}: not <kind>/<file> with a kind of {', '.join(KINDS)}")
        try:
            documents.append(Document(kind, name, data.decode("utf-8"), rel.startswith(MORE)))
        except UnicodeDecodeError as e:
            raise CalibrationError(f"calibration text {rel}: not UTF-8 at byte {e.start}") from e
    return tuple(sorted(documents, key=lambda d: (KINDS.index(d.kind), d.name)))
