"""Object stores: ``s3://bucket/prefix`` and ``gs://bucket/prefix`` through ``pyarrow.fs``.

An object appears, whole, when its upload completes, so one ``put`` is atomic without a temporary name. Small objects
are one PUT request, large ones a multipart upload; what a killed writer had uploaded stays invisible (a bucket
lifecycle rule for incomplete multipart uploads frees it). There is no exclusive creation and no rename here: see
``lock.py`` for what that means.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, BinaryIO, cast

import pyarrow.fs as pafs

from exl2ray.errors import StoreError
from exl2ray.store.faults import MissingFileError, translated
from exl2ray.store.fs import TEMP_NAME, TEMP_PREFIX, Names, Store, check_name

_BATCH_LINES = 200
_BATCH_SECONDS = 5.0
_ATTEMPTS = 6  # with the SDK's exponential backoff: rides out about half a minute of errors


class ObjectStore(Store):
    """A bucket, or a prefix of one."""

    is_local = False

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        scheme, _, path = self.root.partition("://")
        bucket = path.partition("/")[0]
        if not bucket or any(c in path for c in "?#"):
            raise StoreError(f"{root}: not of the form {scheme}://bucket/prefix")
        self._base = path
        with translated("open", self.root):
            self._fs = _s3(bucket, background_writes=True) if scheme == "s3" else _gcs()
        self._buffer: dict[str, list[str]] = {}
        self._buffered_since = 0.0
        self._batches = 0
        self._lock = threading.Lock()

    def _key(self, rel: str) -> str:
        return f"{self._base}/{check_name(rel)}"

    def put(self, rel: str, data: bytes | memoryview) -> None:
        with translated("write", self.full_name(rel)), self._fs.open_output_stream(self._key(rel)) as f:
            f.write(data)

    def get(self, rel: str) -> bytes:
        with translated("read", self.full_name(rel)), self._fs.open_input_stream(self._key(rel)) as f:
            return bytes(f.read())

    def reader(self, rel: str) -> BinaryIO:
        with translated("read", self.full_name(rel)):
            return cast(BinaryIO, self._fs.open_input_stream(self._key(rel)))

    def _info(self, rel: str) -> Any:
        with translated("read", self.full_name(rel)):
            info = self._fs.get_file_info(self._key(rel))
        if info.type != pafs.FileType.File:
            raise MissingFileError(f"cannot read {self.full_name(rel)}: no such object")
        return info

    def exists(self, rel: str) -> bool:
        try:
            self._info(rel)
        except MissingFileError:
            return False
        return True

    def size(self, rel: str) -> int:
        return int(self._info(rel).size)

    def mtime(self, rel: str) -> float:
        return float(self._info(rel).mtime_ns) / 1e9

    def _names(self, prefix: str) -> Names:
        """All objects below ``prefix``; directory marker objects are left out."""
        top = self._key(prefix) if prefix else self._base
        with translated("list", f"{self.root}/{prefix}"):
            found = self._fs.get_file_info(pafs.FileSelector(top, recursive=True, allow_not_found=True))
        return sorted(i.path[len(self._base) + 1 :] for i in found if i.type == pafs.FileType.File)

    def list(self, prefix: str = "") -> Names:
        return [n for n in self._names(prefix) if not n.rpartition("/")[2].startswith(TEMP_PREFIX)]

    def entries(self) -> Names:
        # Listed in full: a non-recursive listing of GCS does not show directories that exist only as prefixes.
        return sorted({n.partition("/")[0] for n in self._names("")})

    def delete(self, rel: str) -> None:
        with translated("delete", self.full_name(rel)):
            with suppress(FileNotFoundError):
                self._fs.delete_file(self._key(rel))

    def append_line(self, rel: str, line: str) -> None:
        with self._lock:
            if not self._buffer:
                self._buffered_since = time.monotonic()
            self._buffer.setdefault(rel, []).append(line)
            lines = sum(map(len, self._buffer.values()))
            due = lines >= _BATCH_LINES or time.monotonic() - self._buffered_since >= _BATCH_SECONDS
        if due:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            for rel, lines in list(self._buffer.items()):
                stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
                name = f"{_batch_folder(rel)}/{stamp}-{socket.gethostname()}-{os.getpid()}-{self._batches}.jsonl"
                self.put(name, "".join(line + "\n" for line in lines).encode())
                self._batches += 1
                del self._buffer[rel]  # only now: lines of a failed write are tried again

    def sweep(self, prefixes: Iterable[str]) -> Names:
        stale = [n for n in self._names("") if TEMP_NAME.fullmatch(n)]  # probes of the clock; uploads have none
        for name in stale:
            self.delete(name)
        return stale

    def prune(self, prefixes: Iterable[str]) -> None:
        """Nothing to do: an object store has no directories."""

    def read_lines(self, rel: str) -> Names:
        texts = (self.get(name).decode(errors="replace") for name in self.list(_batch_folder(rel)))
        return [line for text in texts for line in text.rstrip("\n").split("\n")]


def _batch_folder(rel: str) -> str:
    return rel.removesuffix(".jsonl")


def file_system(scheme: str, bucket: str) -> Any:
    """The ``pyarrow.fs`` of s3:// or gs://, as the environment says, for readers that try again themselves."""
    if scheme == "s3":
        return _s3(bucket, background_writes=False, attempts=2, connect_seconds=4)
    return _gcs(seconds=5)


def _s3(bucket: str, background_writes: bool, attempts: int = _ATTEMPTS, connect_seconds: float = 10) -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        background_writes=background_writes,
        connect_timeout=connect_seconds,
        request_timeout=60,
        allow_delayed_open=True,  # small objects: one PUT instead of a three-request multipart upload
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


def _gcs(seconds: float = 30) -> Any:
    limit = timedelta(seconds=seconds)
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if not emulator:
        return pafs.GcsFileSystem(retry_time_limit=limit)
    scheme, separator, host = emulator.rpartition("://")
    return pafs.GcsFileSystem(
        anonymous=True, scheme=scheme if separator else "http", endpoint_override=host, retry_time_limit=limit
    )
