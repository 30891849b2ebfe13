"""A bounded folder of blocks of remote files.

A conversion goes through the model several times, always from the front. Of files that do not fit, whatever replaces old
blocks by new ones throws out what the next pass wants first; so the first blocks stay, and of every pass that share is at
hand. Nothing is ever replaced, and the bound is a counter that processes share.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exl2ray.beneath import make_directories

BLOCK_BYTES = 8 << 20
SMALL_BYTES = 1 << 14  # smaller tensors, norms mostly, are fetched as they are
CHECK_BYTES = 4  # CRC-32 at the end of a block's file
THREADS = 8

Fetch = Callable[[memoryview, int], None]  # fills the buffer from an offset of a file


class Blocks:
    """Blocks of any number of files, in one folder of at most ``limit`` bytes. ``root`` None: nothing is kept."""

    def __init__(self, root: Path | None, limit: int) -> None:
        self.root, self.limit = root, limit
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, buffer: memoryview, offset: int, size: int, key: str, fetch: Fetch, keep: bool = True) -> None:
        """Fills ``buffer`` from ``offset`` of a file of ``size`` bytes. ``key``: of its content. ``keep``: whole blocks."""
        end = offset + len(buffer)
        if (not keep or len(buffer) <= SMALL_BYTES) and not self._has(key, offset // BLOCK_BYTES):
            return fetch(buffer, offset)
        jobs = []
        for number in range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            start = number * BLOCK_BYTES
            a, b = max(start, offset), min(start + BLOCK_BYTES, end)
            jobs.append((number, buffer[a - offset : b - offset], a - start, min(BLOCK_BYTES, size - start)))
        if len(jobs) == 1:
            self._one(key, fetch, *jobs[0])
            return
        for done in self._threads().map(lambda job: self._one(key, fetch, *job), jobs):
            assert done is None

    def _one(self, key: str, fetch: Fetch, number: int, part: memoryview, begin: int, length: int) -> None:
        """A part of a block, from ``begin`` in it; ``length``: of the whole block."""
        if self._load(key, number, part, begin, length):
            return
        start = number * BLOCK_BYTES
        if not self._reserve(length + CHECK_BYTES):
            return fetch(part, start + begin)
        whole = bytearray(length)
        fetch(memoryview(whole), start)
        self._store(self._path(key, number), whole)
        part[:] = memoryview(whole)[begin : begin + len(part)]

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(THREADS, "fetch")
        return self._pool[1]

    # ---- files -----------------------------------------------------------------------------------------------------

    def _path(self, key: str, number: int) -> Path:
        assert self.root is not None
        return self.root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}-{number:06d}"

    def _has(self, key: str, number: int) -> bool:
        return self.root is not None and self._path(key, number).exists()

    def _load(self, key: str, number: int, part: memoryview, begin: int, length: int) -> bool:
        """Whether the part is there, whole and as it was written."""
        if self.root is None:
            return False
        path = self._path(key, number)
        try:
            data = path.read_bytes()
        except OSError:
            return False
        if len(data) != length + CHECK_BYTES or zlib.crc32(data[:length]) != int.from_bytes(data[length:], "little"):
            path.unlink(missing_ok=True)
            self._reserve(-len(data))
            return False
        part[:] = memoryview(data)[begin : begin + len(part)]
        return True

    def _store(self, path: Path, whole: bytearray) -> None:
        """Writes a block for which there is room; a disk that does not take it is no reason to stop."""
        fresh, temporary = not path.exists(), ""
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            with open(handle, "wb") as f:
                f.write(whole)
                f.write(zlib.crc32(whole).to_bytes(CHECK_BYTES, "little"))
            os.replace(temporary, path)
        except OSError:
            fresh = False
            if temporary:
                Path(temporary).unlink(missing_ok=True)
        if not fresh:
            self._reserve(-len(whole) - CHECK_BYTES)

    def _reserve(self, count: int) -> bool:
        """Adds to the bytes in use; False, and nothing is added, if there is no room. Processes take turns."""
        if self.root is None:
            return False
        try:
            make_directories(self.root)
            with open(os.open(self.root / ".used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as f:
                fcntl.flock(f, fcntl.LOCK_EX)
                text = f.read(32)
                used = int(text) if text.isdigit() else sum(p.stat().st_size for p in self.root.iterdir())
                if count > 0 and used + count > self.limit:
                    return False
                f.seek(0)
                f.truncate()
                f.write(str(max(0, used + count)).encode())
                return True
        except OSError:
            return False
