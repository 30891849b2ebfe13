"""Models in object stores, through ``pyarrow.fs``: listed once, then read by range."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from exl2ray.errors import Exl2RayError, SourceError, StoreError
from exl2ray.formats.elsewhere import STAMP, RemoteFile
from exl2ray.formats.file_states import FileState
from exl2ray.formats.side_files import TEMPLATES
from exl2ray.remote.address import Address, redacted
from exl2ray.remote.block_cache import SMALL_BYTES, Blocks
from exl2ray.remote.listing import MAX_NAMES, Listing
from exl2ray.remote.retry import Passing, patiently

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}
REFUSED = (
    r"ACCESS_DENIED|ACCESS DENIED|[Ff]orbidden|FORBIDDEN|InvalidAccessKey|INVALID_ACCESS_KEY|SIGNATURE_DOES|UNAUTHENTICATED"
    r"|PERMISSION_DENIED|HTTP status 40[13]|[Cc]ould not (load|find).*credentials"
)
UNREACHED = r"\bNETWORK_CONNECTION\b|\bUNAVAILABLE\b"  # as the SDKs of S3 and of GCS call it
CHANGED = "give it back the content that it had, or begin anew: another -o, or -nr"


class Bucket:
    """Reads below one prefix. All methods raise typed errors only."""

    def __init__(self, address: Address, blocks: Blocks) -> None:
        self.address, self._blocks = address, blocks
        self._base = f"{address.place}/{address.path}".rstrip("/")
        self._opened: Any = None
        self._lock = threading.Lock()

    @property
    def _fs(self) -> Any:
        from exl2ray.store.object_store import file_system

        with self._lock:
            if self._opened is None:
                with self._typed(""):
                    self._opened = file_system(self.address.scheme, self.address.place)
        return self._opened

    def listing(self) -> Listing:
        names, folders = patiently(self._look, first_look=True)
        entries = tuple(self._entry(name, size, mtime) for name, size, mtime in names)
        return Listing(self.address, entries, folders, self.fetch, self.open)

    def _look(self) -> tuple[list[tuple[str, int, int]], tuple[str, ...]]:
        import pyarrow.fs as pafs

        files, folders = [], set()
        with self._typed(""):
            infos = self._fs.get_file_info(pafs.FileSelector(self._base, recursive=False, allow_not_found=True))
            nested = pafs.FileSelector(f"{self._base}/{TEMPLATES}", recursive=False, allow_not_found=True)
            infos += self._fs.get_file_info(nested)
        if len(infos) > MAX_NAMES:
            raise SourceError(f"{self.address}: more than {MAX_NAMES} objects", "name the folder of the model")
        for info in infos:
            name = info.path[len(self._base) + 1 :]
            if info.type == pafs.FileType.File and name.count("/") <= name.startswith(TEMPLATES + "/"):
                files.append((name, int(info.size), int(info.mtime_ns or 0)))
            elif name:
                folders.add(name.partition("/")[0])
        if not files and not folders:
            hint = "are bucket and prefix right? the prefix is where config.json lies"
            raise SourceError(f"{self.address}: there is nothing", hint)
        return sorted(set(files)), tuple(sorted(folders))

    def _entry(self, name: str, size: int, mtime: int) -> FileState:
        if name.endswith(".safetensors"):
            return patiently(lambda: self._state(name))
        return FileState(name, size, f"{STAMP}{mtime}")

    def _state(self, name: str) -> FileState:
        """As it is now."""
        with self._typed(name), self._fs.open_input_file(f"{self._base}/{name}") as f:
            return self._described(name, f)

    def _described(self, name: str, f: Any) -> FileState:
        found = {_text(k).lower(): _text(v) for k, v in (f.metadata() or {}).items()}
        mark = found.get("etag") or found.get("md5hash") or found.get("md5_hash") or found.get("generation")
        if not mark:
            mark = str(self._fs.get_file_info(f"{self._base}/{name}").mtime_ns)
        return FileState(name, int(f.size()), STAMP + mark.strip('"'))

    def fetch(self, entry: FileState) -> bytes:
        def step() -> bytes:
            with self._typed(entry.name), self._fs.open_input_stream(f"{self._base}/{entry.name}") as f:
                data = bytes(f.read(entry.size + 1))
            if len(data) != entry.size:
                raise self._changed(entry)
            return data

        return patiently(step)

    def open(self, entry: FileState) -> RemoteFile:
        key = f"{self.address}/{entry.name}\0{entry.size}\0{entry.stamp}"

        def now() -> str:
            state = patiently(lambda: self._state(entry.name))
            return state.stamp if state.size == entry.size else f"{state.stamp} {state.size}"

        def fetch(buffer: memoryview, offset: int) -> None:
            patiently(lambda: self._range(entry, buffer, offset))
            if len(buffer) > SMALL_BYTES and now() != entry.stamp:  # while it was read; it may be kept
                raise self._changed(entry)

        def read(buffer: memoryview, offset: int, keep: bool) -> None:
            self._blocks.read(buffer, offset, entry.size, key, fetch, keep)

        return RemoteFile(entry.size, entry.stamp, read, now, entry.sha256)

    def _range(self, entry: FileState, buffer: memoryview, offset: int) -> None:
        with self._typed(entry.name), self._fs.open_input_file(f"{self._base}/{entry.name}") as f:
            if (now := self._described(entry.name, f)).size != entry.size or now.stamp != entry.stamp:
                raise self._changed(entry)
            data = f.read_at(len(buffer), offset)
        if len(data) != len(buffer):
            raise Passing(SourceError(f"{self.address}/{entry.name}: {len(data)} of {len(buffer)} bytes came", "try again"))
        buffer[:] = data

    def _changed(self, entry: FileState) -> StoreError:
        return StoreError(f"{self.address}/{entry.name}: another object than when the conversion began", CHANGED)

    @contextmanager
    def _typed(self, name: str) -> Iterator[None]:
        where = f"{self.address}/{name}" if name else str(self.address)
        try:
            yield
        except Exl2RayError:
            raise
        except FileNotFoundError:
            what = f"cannot read {where}: no such object" if name else f"{where}: there is no such bucket"
            raise SourceError(what, "is the address right?") from None
        except OSError as e:  # of the SDKs: without a number, and with a text that names the request
            text = " ".join(redacted(str(e)).split())[:300]
            names = CREDENTIALS[self.address.scheme]
            if re.search(r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|Bucket .* not found", text):
                raise SourceError(f"{where}: there is no bucket {self.address.place}", "is the address right?") from None
            if re.search(REFUSED, text):
                hint = f"may these credentials read it? ({names})"
                raise SourceError(f"{where}: access is refused: {text}", hint) from None
            hint = f"is there a network, and the endpoint right? ({names})"
            unreached = re.search(UNREACHED, text) is not None
            raise Passing(SourceError(f"{where}: cannot be read: {text}", hint), unreached=unreached) from None


def _text(value: str | bytes) -> str:
    """Metadata come as bytes or text, as the version of pyarrow has it."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
