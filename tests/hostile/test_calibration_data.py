"""Calibration data from strangers: files that would take memory or time without end, or that are something else.

Every case is run by `plan` within limits that are watched from outside. It ends with status 4 and a message, or it works.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounded import exl2ray
from small_sources import write_source
from special_files import make_socket

MB = 1_000_000
WORDS = "the quick brown fox jumps over the lazy dog and runs on. "
FEW = ("-b", "4", "-r", "3", "-mr", "2", "-l", "128", "-ml", "128", "--device", "cpu")
Make = Callable[[Path], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("model") / "m")


def raw(name: str, *parts: bytes, hole: int = 0) -> Make:
    """A file of these bytes, and ``hole`` bytes that take no room."""

    def make(root: Path) -> Path:
        with (root / name).open("wb") as f:
            for part in parts:
                f.write(part)
            if hole:
                f.truncate(f.tell() + hole)
        return root / name

    return make


def table(columns: dict[str, object], metadata: dict[str, str] | None = None, **options: object) -> Make:
    def make(root: Path) -> Path:
        made = pa.table(columns)
        pq.write_table(made.replace_schema_metadata(metadata) if metadata else made, root / "t.parquet", **options)
        return root / "t.parquet"

    return make


def large_cells(rows: int, size: int, dictionary: bool = False) -> Make:
    """A few kilobytes that hold ``rows`` cells of ``size`` bytes."""

    def make(root: Path) -> Path:
        schema = pa.schema([("text", pa.string())])
        options = {"compression": "lz4", "use_dictionary": dictionary, "write_statistics": False}
        with pq.ParquetWriter(root / "t.parquet", schema, **options) as writer:
            for start in range(0, rows, 4):
                cells = ["a b c d " * (size // 8) for _ in range(min(4, rows - start))]
                writer.write_table(pa.table({"text": cells}, schema=schema))
        return root / "t.parquet"

    return make


def dictionary_bomb(rows: int) -> Make:
    """One cell of 120 MB, stored once, in every row."""

    def make(root: Path) -> Path:
        cells = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a b c d " * (15 * MB)]))
        pq.write_table(
            pa.table({"text": cells}), root / "t.parquet", compression="zstd", store_schema=False,
            dictionary_pagesize_limit=1 << 30,
        )  # fmt: skip
        assert (root / "t.parquet").stat().st_size < MB
        return root / "t.parquet"

    return make


def packed(name: str, compress: Callable[[bytes], bytes], block: bytes, times: int) -> Make:
    """Many compressed blocks one behind the other: gigabytes in little room. Compressed only where they are needed."""
    return lambda root: raw(name, *([compress(block)] * times))(root)


def damaged(where: float, change: bytes) -> Make:
    def make(root: Path) -> Path:
        path = table({"text": [WORDS * 3 + str(i) for i in range(4000)]}, compression="zstd")(root)
        data = bytearray(path.read_bytes())
        at = int(len(data) * where)
        data[at : at + len(change)] = change
        path.write_bytes(bytes(data))
        return path

    return make


def cut(where: float) -> Make:
    def make(root: Path) -> Path:
        path = table({"text": [WORDS + str(i) for i in range(4000)]})(root)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * where)])
        return path

    return make


def special(kind: str) -> Make:
    def make(root: Path) -> Path:
        path = root / f"x.{kind}"
        if kind == "fifo.txt":
            os.mkfifo(path)
        elif kind == "device.txt":
            path.symlink_to("/dev/zero")
        elif kind == "socket.txt":
            make_socket(path)
        elif kind == "loop.txt":
            path.symlink_to(path.name)
        else:
            path.mkdir()
        return path

    return make


def deep_columns(root: Path) -> Path:
    kind: pa.DataType = pa.string()
    for _ in range(40):
        kind = pa.list_(kind)
    pq.write_table(pa.table({"text": pa.array([None] * 3, type=kind)}), root / "t.parquet")
    return root / "t.parquet"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
PAGE = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
LINE = json.dumps({"text": WORDS}).encode() + b"\n"
REFUSED: dict[str, tuple[Make, str]] = {
    "LFS pointer, Parquet": (raw("a.parquet", LFS), "Git LFS pointer"),
    "LFS pointer, JSON lines": (raw("a.jsonl", LFS), "Git LFS pointer"),
    "LFS pointer, text": (raw("a.txt", LFS), "Git LFS pointer"),
    "empty Parquet": (raw("a.parquet", b""), "is empty"),
    "empty text": (raw("a.txt", b""), "is empty"),
    "blanks": (raw("a.txt", b" \n" * 100), "is empty"),
    "web page, Parquet": (raw("a.parquet", PAGE), "a web page"),
    "web page, JSON": (raw("a.json", PAGE), "a web page"),
    "web page in gzip": (raw("a.jsonl.gz", gzip.compress(PAGE)), "a web page"),
    "zeros": (raw("a.parquet", b"", hole=6 << 30), "only zeros"),
    "sparse text": (raw("a.txt", b"some words\n" * 500, hole=6 << 30), "a zero byte at 5500"),
    "sparse JSON lines": (raw("a.jsonl", LINE, hole=6 << 30), "line 2 is longer than"),
    "sparse JSON": (raw("a.json", b'["a"', hole=6 << 30), "element 1"),
    "a line of 100 MB": (raw("a.jsonl", b'{"text": "' + b"a" * (100 * MB)), "longer than"),
    "deep JSON line": (raw("a.jsonl", b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"), "nested too deeply"),
    "deep JSON": (raw("a.json", b"[" * 200_000 + b"]" * 200_000), "nested too deeply"),
    "a number of 100 000 digits": (raw("a.jsonl", b'{"text": ' + b"1" * 100_000 + b"}\n"), "a number of more digits"),
    "no JSON lines": (raw("a.jsonl", b"hello\nworld\n"), "line 1 is not JSON"),
    "Latin-1": (raw("a.txt", "café ".encode("latin-1") * 1000), "not UTF-8 at byte 3"),
    "Latin-1 in JSON lines": (raw("a.jsonl", b'{"text": "caf\xe9"}\n'), "line 1: not UTF-8"),
    "UTF-16": (raw("a.txt", (WORDS * 100).encode("utf-16")), "UTF-16"),
    "gzip of blank lines": (packed("a.jsonl.gz", gzip.compress, b"\n" * (64 * MB), 64), "of blanks before line"),
    "gzip of zeros": (packed("a.txt.gz", gzip.compress, bytes(64 * MB), 64), "only zeros"),
    "bzip2 of blanks": (packed("a.jsonl.bz2", bz2.compress, b" " * (16 * MB), 64), "longer than"),
    "xz of one line": (packed("a.jsonl.xz", lzma.compress, b'"' + b"a" * (64 * MB), 4), "longer than"),
    "gzip in gzip": (raw("a.txt.gz", gzip.compress(gzip.compress(b"words " * 1000))), "is gzip"),
    "broken gzip": (raw("a.txt.gz", gzip.compress(WORDS.encode() * 20)[:40]), "cannot be decompressed"),
    "no gzip": (raw("a.txt.gz", b"\x1f\x8b" + b"nothing of the kind"), "cannot be decompressed"),
    "xz with a dictionary of 1.5 GiB": (
        raw("a.txt.xz", b"\xfd7zXZ\0\0\x01\x69\x22\xde\x36\x02\x00\x21\x01\x27\0\0\0\0\0\0\0\0\0"), "cannot be decompressed"),
    "ZIP": (raw("a.jsonl", b"PK\x03\x04" + bytes(100)), "a ZIP file"),
    "pickle": (raw("a.json", b"\x80\x04\x95" + bytes(100)), "a pickle"),
    "SQLite": (raw("a.txt", b"SQLite format 3\0" + bytes(100)), "an SQLite database"),
    "CSV": (raw("a.csv", b"id,text\n1,hello, world\n"), "line 2 has 3 cells, the first line 2"),
    "magic alone": (raw("a.parquet", b"PAR1"), "not a readable Parquet file"),
    "footer of 2 GB": (raw("a.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1"), "not a readable Parquet file"),
    "half of it": (cut(0.5), "not a readable Parquet file"),
    "pages of zeros": (damaged(0.01, bytes(3000)), "reading failed"),
    "noise in the pages": (damaged(0.001, b"\xff\x80" * 2000), ""),
    "noise in the footer": (damaged(0.995, b"\xfe\x01" * 40), "not a readable Parquet file"),
    "a cell of 500 MB": (large_cells(1, 400 * MB), "memory"),
    "columns of lists of lists": (deep_columns, "no column holds text"),
    "only numbers": (table({"a": [1, 2, 3], "b": [0.5, 1, 2]}), "no column holds text: a (number), b (number)"),
    "5000 columns of numbers": (table({f"c{i}": [i] for i in range(5000)}), "and 4988 more"),
    "no columns": (table({}), "no columns"),
    "pictures": (table({"image": [b"\x89PNG" * 100] * 3}), "no column holds text"),
    "all null": (table({"text": pa.array([None] * 500_000, type=pa.string())}), "needs 256 tokens"),
    "not UTF-8 in Parquet": (table({"text": pa.array([b"caf\xe9"] * 9).view(pa.string())}), "data row 0: not UTF-8"),
    "FIFO": (special("fifo.txt"), "a FIFO, not a regular file"),
    "device": (special("device.txt"), "a device"),
    "socket": (special("socket.txt"), "a device or socket"),
    "link to itself": (special("loop.txt"), "cannot be read"),
    "empty folder": (special("folder.parquet"), "holds no file of calibration text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_time(case: str, model: Path, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    run = exl2ray("convert", "-i", model, "-o", tmp_path / "work", "-c", make(tmp_path), *FEW, "--dry-run")
    run.ends_with(4, *([words] if words else []), "hint: ")


def with_metadata(value: object) -> Make:
    text = value if isinstance(value, str) else json.dumps(value)
    return table({"text": [WORDS] * 100}, {"pandas": text})


TAKEN: dict[str, Make] = {
    "pandas metadata of a list": with_metadata([1, 2]),
    "pandas metadata without end": with_metadata("[" * 100_000),
    "pandas metadata, index of lists": with_metadata({"index_columns": [["text"], {"kind": "range"}, 5]}),
    "pandas metadata, index a number": with_metadata({"index_columns": 7}),
    "pandas metadata, no JSON": with_metadata("no JSON"),
    "64 cells of 120 MB in a dictionary": dictionary_bomb(64),
    "6400 cells of 120 MB in a dictionary": dictionary_bomb(6400),
    "16 cells of 20 MB": large_cells(16, 20 * MB),
    "5000 columns of text": table({f"c{i}": [WORDS] for i in range(5000)}),
    "sparse text behind enough of it": raw("a.txt", WORDS.encode() * 50_000, hole=6 << 30),
    "JSON of 1 GB behind enough of it": raw("a.json", b"[" + (json.dumps(WORDS) + ",").encode() * 2000, hole=1 << 30),
    "a text of 20 MB": raw("a.txt", *([WORDS.encode() * 10_000] * 35)),
    "gzip of 6 GB": packed("a.txt.gz", gzip.compress, WORDS.encode() * 1_000_000, 100),
    "noise behind enough rows": raw("a.jsonl", LINE * 200, b"\xff\xfe\0" * 1000),
}


@pytest.mark.parametrize("case", TAKEN)
def test_it_is_taken_without_reading_it_all(case: str, model: Path, tmp_path: Path) -> None:
    run = exl2ray("convert", "-i", model, "-o", tmp_path / "work", "-c", TAKEN[case](tmp_path), *FEW, "--dry-run")
    run.ends_with(0, "384 tokens")


@pytest.mark.parametrize("name", ["\x1b[2Jx.parquet", "a\nb.jsonl", "-x.txt"])
def test_names_reach_the_terminal_as_text(name: str, model: Path, tmp_path: Path) -> None:
    path = raw(name, LFS)(tmp_path)
    run = exl2ray("convert", "-i", model, "-o", tmp_path / "work", "-c", path, *FEW, "--dry-run")
    run.ends_with(4, "Git LFS pointer")
    assert "\x1b[2J" not in run.out + run.err
