"""In the child: opening files, decompressing as much as is read, and telling what is no data. Plain text in pieces."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from exl2ray.calibration.data.problem import HOW_TO_MAKE_ONE, DataError
from exl2ray.errors import reading_hint
from exl2ray.formats.json_file import ENCODINGS, LFS_POINTER

MIB = 1 << 20
HEAD = 4096  # bytes that are looked at
BLOCK = 256 << 10
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
OTHER_FORMATS = {
    b"PK\x03\x04": "a ZIP file (or XLSX, NPZ)", b"%PDF": "a PDF", b"GGUF": "a GGUF file", b"ARROW1": "compressed Arrow",
    b"FEA1": "an old Feather", b"\x93NUMPY": "a NumPy array", b"SQLite format 3": "an SQLite database", b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file", b"\x89HDF": "an HDF5 file", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture",
    b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle",
    b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"PARE": "an encrypted Parquet file",
}  # fmt: skip
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)  # what decompressors raise
AGAIN = "fetch the file again"


def open_regular(path: str) -> BinaryIO:
    """The file, which is a regular one; never waits for a FIFO or device. Raises DataError."""
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
        info = os.fstat(file.fileno())
    except OSError as e:
        raise DataError(f"cannot be read: {e.strerror}", reading_hint(e, "is the path right?")) from e
    if not stat.S_ISREG(info.st_mode):
        raise DataError("not a regular file", "what a pipe gives must be written to a file first")
    if info.st_size == 0:
        raise DataError("is empty", AGAIN)
    return file


def decompressed(file: BinaryIO) -> BinaryIO:
    """The content of a file that may be compressed, from its begin. Nothing is decompressed before it is read."""
    head = file.read(8)
    file.seek(0)
    name = next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)
    if name == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if name == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if name == "xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    if name == "zstd":
        import pyarrow as pa

        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
    return file


class Source:
    """Bytes of a file, decompressed, of which the first can be looked at. Raises DataError."""

    def __init__(self, path: str) -> None:
        self.file = open_regular(path)
        try:
            self._stream: Any = decompressed(self.file)
            self._ahead = self._read(HEAD)
        except BROKEN as e:
            raise DataError(f"cannot be decompressed: {e}", AGAIN) from e
        self.position = 0  # of the next byte
        if self.head.startswith(b"\xef\xbb\xbf"):
            self._ahead, self.position = self._ahead[3:], 3

    @property
    def head(self) -> bytes:
        return self._ahead[:HEAD]

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end only."""
        out = self._ahead[:size]
        self._ahead = self._ahead[size:]
        if len(out) < size:
            try:
                out += self._read(size - len(out))
            except BROKEN as e:
                raise DataError(f"breaks off at byte {self.position + len(out)}: {e}", AGAIN) from e
        self.position += len(out)
        return out

    def _read(self, size: int) -> bytes:
        out = bytearray()
        while len(out) < size:
            part = self._stream.read(min(size - len(out), BLOCK))
            if not part:
                break
            out += part
        return bytes(out)


def refuse_others(head: bytes) -> None:
    """DataError for content that is known to be something else than text."""
    if not head.strip() and len(head) < HEAD:
        raise DataError("is empty", AGAIN)
    if head and not head.strip(b"\0"):
        raise DataError("holds only zeros", f"the download or the copy broke off: {AGAIN}")
    if head.startswith(LFS_POINTER):
        raise DataError("is a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder")
    if re.match(rb"\s*<(!doctype html|html|\?xml)", head[:200], re.IGNORECASE):
        raise DataError("is a web page, not data", f"the server sent a page in place of the file: {AGAIN}")
    for mark, name in ENCODINGS:
        if head.startswith(mark):
            raise DataError(f"is {name} text; UTF-8 is needed", f"iconv -f {name} -t UTF-8 FILE > NEW")
    for mark, name in {**OTHER_FORMATS, **COMPRESSIONS}.items():
        if head.startswith(mark):
            raise DataError(f"is {name}, which is not read", HOW_TO_MAKE_ONE)
    if head[257:262] == b"ustar":
        raise DataError("is a tar archive", "unpack it and name the folder")


def looks_like_text(head: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8 text, the last character of which may be cut."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.start > len(head) - 4 and len(head) == HEAD
    return b"\0" not in head


def checked_text(data: bytes, position: int) -> bytes:
    """``data`` if it is UTF-8 text; DataError with the byte otherwise. ``position``: of its first byte."""
    zero = data.find(0)
    if zero >= 0:
        raise DataError(f"holds a zero byte at {position + zero}: this is not text", HOW_TO_MAKE_ONE)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"not UTF-8 at byte {position + e.start}", "iconv -f LATIN1 -t UTF-8 FILE > NEW") from e
    return data


def pieces_of_file(source: Source, most: int) -> Iterator[bytes]:
    """A text file as pieces of at most ``most`` bytes, cut behind lines. Line ends of Windows become those of Unix."""
    rest = b""
    while True:
        start = source.position - len(rest)
        block = source.read(most + 1 - len(rest))
        data = rest + block
        if len(data) <= most:
            if data:
                yield checked_text(data, start).replace(b"\r\n", b"\n")
            return
        cut = cut_before(data, most)
        yield checked_text(data[:cut], start).replace(b"\r\n", b"\n")
        rest = data[cut:]


def pieces(text: bytes | memoryview, most: int) -> Iterator[bytes]:
    """A document as it is, or as pieces of at most ``most`` bytes if it is longer; not checked."""
    start = 0
    while len(text) - start > most:
        part = bytes(text[start : start + most + 1])
        cut = cut_before(part, most)
        yield part[:cut]
        start += cut
    yield bytes(text[start:])


def cut_before(data: bytes, most: int) -> int:
    """Where to cut more than ``most`` bytes: behind the last line end in the second half, before its last blank, or between
    two characters.
    """
    half = most // 2
    line, blank = data.rfind(b"\n", half, most), data.rfind(b" ", half, most)
    if line >= 0:
        return line + 1
    if blank >= 0:
        return blank
    return next((cut for cut in range(most, most - 4, -1) if data[cut] & 0xC0 != 0x80), most)
