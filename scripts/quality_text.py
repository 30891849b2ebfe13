#!/usr/bin/env python3
"""Held-out text for `quality.py`, of several kinds, and none of it from where text to tune on comes from.

    python scripts/quality_text.py HELDOUT.jsonl [--apart-from TUNING.txt.xz]... [--most CHARACTERS] [KIND=FOLDER]...

Collects documents into one file, a line {"kind", "name", "text"} each, so that every machine judges by the same text:

* what was written for this project and is no part of its calibration text: `exl2ray/evaluate/heldout` and `scripts/heldout`,
* the library of the Python that runs this (code), and C headers beside it,
* licences, manuals, and the messages of programs in other languages, where this machine has them,
* KIND=FOLDER: text files of your own.

A document that shares passages with calibration text or with a file of --apart-from is left out, and said so: of all its
passages of 60 characters at most one in a hundred may occur there. Of each kind --most characters are kept (300,000).
"""

from __future__ import annotations

import argparse
import gettext
import hashlib
import json
import lzma
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from exl2ray.calibration.text import builtin_documents  # noqa: E402
from exl2ray.calibration.tokenizer import ModelTokenizer  # noqa: E402
from exl2ray.errors import CalibrationError  # noqa: E402
from exl2ray.evaluate.heldout import KINDS  # noqa: E402

PASSAGE, STRIDE, SHARED = 60, 16, 0.01
MOST = 300_000  # characters of a kind
MOST_CATALOGUES, MOST_OF_ONE = 200, 4000  # messages: how many files, and characters of each
SHARE = Path("/usr/share")


@dataclass(frozen=True)
class Document:
    kind: str
    name: str
    text: str


def written() -> Iterator[Document]:
    """What was written for evaluations."""
    folder = ROOT / "exl2ray" / "evaluate" / "heldout"
    for kind, patterns in KINDS.items():
        for pattern in patterns:
            yield from (Document(kind, p.name, p.read_text(encoding="utf-8")) for p in sorted(folder.glob(pattern)))
    for path in sorted((ROOT / "scripts" / "heldout").glob("*/*")):
        yield Document(path.parent.name.replace("_", " "), path.name, path.read_text(encoding="utf-8"))


def of_this_machine() -> Iterator[Document]:
    """Code, licences and messages that happen to be here."""
    for kind, folder, pattern in (
        ("code", Path(sysconfig.get_path("stdlib")), "*.py"),
        ("code in C", Path(sysconfig.get_path("include")), "**/*.h"),
        ("licences", SHARE / "common-licenses", "*"),
        ("manuals", SHARE, "vim/*/doc/*.txt"),
        ("manuals", SHARE, "perl/*/pod/*.pod"),
    ):
        for path in _shuffled(p for p in folder.glob(pattern) if p.is_file() and not p.is_symlink()):
            yield Document(kind, path.name, path.read_text(encoding="utf-8", errors="ignore"))
    for path in _shuffled(SHARE.glob("**/LC_MESSAGES/*.mo"))[:MOST_CATALOGUES]:
        text = _messages(path)[:MOST_OF_ONE]
        if text:
            yield Document("messages in many languages", "/".join(path.parts[-4:]), text)


def of_folder(kind: str, folder: Path) -> Iterator[Document]:
    for path in _shuffled(p for p in folder.rglob("*") if p.is_file()):
        yield Document(kind, path.name, path.read_text(encoding="utf-8", errors="ignore"))


def _shuffled(paths: Iterable[Path]) -> list[Path]:
    """In an order that neither names nor the disk decide."""
    return sorted(paths, key=lambda p: hashlib.sha256(p.name.encode()).digest() + str(p).encode())


def _messages(path: Path) -> str:
    try:
        with path.open("rb") as f:
            catalog = gettext.GNUTranslations(f)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, IndexError, KeyError):  # of files that are no such catalogue, or an odd one
        return ""
    return "\n".join(v for k, v in sorted(catalog.items(), key=str) if k and isinstance(v, str) and len(v) > 40)


class Known:
    """Passages of text that held-out text must not share."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._passages: set[int] = set()
        for text in texts:
            plain = " ".join(text.split())
            self._passages.update(hash(plain[i : i + PASSAGE]) for i in range(0, len(plain) - PASSAGE + 1, STRIDE))

    def share(self, text: str) -> float:
        """Of a text, how much lies in passages that are known, from 0 to 1."""
        plain = " ".join(text.split())
        places = range(len(plain) - PASSAGE + 1)
        found = sum(hash(plain[i : i + PASSAGE]) in self._passages for i in places)
        return found * STRIDE / len(places) if len(places) else 0.0


def collected(documents: Iterable[Document], known: Known, most: int) -> tuple[list[Document], list[str]]:
    """What is kept, kind by kind, and notes about what is not."""
    kept: dict[str, list[Document]] = {}
    notes = []
    for d in documents:
        have = sum(len(x.text) for x in kept.get(d.kind, ()))
        if have >= most or len(d.text) < PASSAGE:
            continue
        share = known.share(d.text)
        if share > SHARED:
            notes.append(f"{d.kind}: {d.name} left out: {share:.0%} of it is in text that may be trained on")
            continue
        kept.setdefault(d.kind, []).append(Document(d.kind, d.name, d.text[: most - have]))
    return [d for documents in kept.values() for d in documents], notes


def load(path: Path) -> list[Document]:
    """Raises CalibrationError for a file that is not what this script wrote."""
    try:
        return [Document(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as e:
        raise CalibrationError(f"{path}: no held-out text: {e}", "make it with scripts/quality_text.py") from e


def heldout_rows(
    documents: Sequence[Document], tokenizer: ModelTokenizer, length: int, most: int | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Int64 rows (R, length) and the kind of each. Rows do not cross from one kind to another. most: rows of a kind."""
    rows, kinds = [], []
    for kind in dict.fromkeys(d.kind for d in documents):
        ids = tokenizer.encode("\n\n".join(d.text.strip("\n") for d in documents if d.kind == kind))
        count = len(ids) // length if most is None else min(most, len(ids) // length)
        rows.append(ids[: count * length].reshape(count, length))
        kinds += [kind] * count
    return torch.from_numpy(np.concatenate(rows)), tuple(kinds)


def read(path: Path) -> str:
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8", errors="ignore") as f:
        return str(f.read())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", nargs="*", metavar="KIND=FOLDER")
    parser.add_argument("--apart-from", action="append", type=Path, default=[], metavar="FILE")
    parser.add_argument("--most", type=int, default=MOST)
    args = parser.parse_args(arguments)
    known = Known([*(d.text for d in builtin_documents(more=True)), *map(read, args.apart_from)])
    own = [d for text in args.folders for d in of_folder(*_named(text))]
    documents, notes = collected([*written(), *own, *of_this_machine()], known, args.most)
    lines = [json.dumps(asdict(d), ensure_ascii=False) for d in documents]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for note in notes:
        print(note)
    for kind in dict.fromkeys(d.kind for d in documents):
        mine = [d for d in documents if d.kind == kind]
        print(f"{kind}: {len(mine)} documents, {sum(len(d.text) for d in mine):,} characters")
    return 0


def _named(text: str) -> tuple[str, Path]:
    kind, _, folder = text.partition("=")
    return kind, Path(folder)


if __name__ == "__main__":
    raise SystemExit(main())
