"""Models on the Hub: one commit, listed once; small files through the cache of huggingface_hub, shards by range.

Shards that the cache has are read there. What is downloaded of the others goes into a folder of ours (`blocks`), never into
that cache, which has no bound. A range comes in two steps: the Hub answers with a signed address elsewhere, which serves for
some minutes, so that the Hub itself is asked once and not for every piece.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from exl2ray.errors import HubError, SourceError, StoreError, UsageError
from exl2ray.formats.elsewhere import STAMP, RemoteFile
from exl2ray.formats.file_states import FileState
from exl2ray.formats.json_file import read_json_object
from exl2ray.formats.source.model_shards import INDEX, MAX_INDEX_BYTES
from exl2ray.remote.address import Address, redacted
from exl2ray.remote.block_cache import Blocks
from exl2ray.remote.hub_errors import Failure, Refused, explained
from exl2ray.remote.hub_library import endpoint, need_hub_library
from exl2ray.remote.listing import MAX_NAMES, Listing, folders_of
from exl2ray.remote.retry import Passing, patiently
from exl2ray.wording import some

SECONDS = 30.0  # without an answer, or between two pieces of one
KEPT_SECONDS = 600.0  # that a signed address is used
PIECE_BYTES = 1 << 20
LOGIN = "hf auth login, or set HF_TOKEN"


class Place(NamedTuple):
    """Where the storage of the Hub has a file: a signed address, until when it is used, the ETag there."""

    url: str
    until: float
    tag: str


class Repository:
    """Reads one repository. All methods raise typed errors only, without the token."""

    def __init__(self, address: Address, blocks: Blocks) -> None:
        self.address, self._blocks = address, blocks
        self._places: dict[str, Place] = {}  # by name; several threads that read one file get different signatures
        self._lock = threading.Lock()
        need_hub_library(f"-i {address}")

    def listing(self) -> Listing:
        """Of the commit that the revision is now; offline of what the cache has of it."""
        from huggingface_hub import HfApi, constants

        address = self.address
        if constants.HF_HUB_OFFLINE:
            return self._cached_listing()

        def step() -> Any:
            with self._typed("listing its files"):
                api, revision = HfApi(endpoint=endpoint()), address.revision
                return api.model_info(address.place, revision=revision, files_metadata=True, timeout=SECONDS)

        info = patiently(step, first_look=True)
        commit, siblings = str(info.sha or ""), info.siblings or []
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or len(siblings) > MAX_NAMES:
            raise HubError(f"{address}: the Hub's answer names no commit, or more than {MAX_NAMES} files", "is it the Hub?")
        prefix = f"{address.path}/" if address.path else ""
        entries = []
        for s in siblings:
            if not s.rfilename.startswith(prefix) or not _is_name(s.rfilename):
                continue
            sha = s.lfs.sha256 if s.lfs is not None else None
            size = s.lfs.size if s.lfs is not None and s.lfs.size is not None else s.size
            entries.append(FileState(s.rfilename[len(prefix) :], int(size or 0), f"{STAMP}{sha or s.blob_id or commit}", sha))
        if not entries:
            raise SourceError(f"{address}: the repository has no folder {address.path}" if prefix else f"{address}: is empty",
                              f"its folders: {', '.join(folders_of([s.rfilename for s in siblings])[:5]) or 'none'}")
        self.address = address.at(commit)
        return self.reopened(tuple(entries))

    def reopened(self, entries: tuple[FileState, ...]) -> Listing:
        """The listing of a commit that is known."""
        folders = folders_of([e.name for e in entries])
        return Listing(self.address, entries, folders, self.fetch, self.open)

    def _cached_listing(self) -> Listing:
        address = self.address
        found = self._cached("config.json")
        hint = "unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download"
        if found is None:
            raise HubError(f"{address}: HF_HUB_OFFLINE is set, and the Hub's cache on this machine does not have it", hint)
        folder = found.parent
        commit = folder.parents[address.path.count("/")].name if address.path else folder.name
        if (folder / INDEX).exists():
            index = read_json_object(folder / INDEX, SourceError, "", MAX_INDEX_BYTES).get("weight_map")
            wanted = sorted({str(f) for f in index.values()}) if isinstance(index, dict) else []
            absent = [n for n in wanted if not (folder / n).is_file()]
            if absent:
                raise HubError(f"{address}: HF_HUB_OFFLINE is set, and the Hub's cache lacks {some(absent, 1)}", hint)
        self.address = address.at(commit)
        entries = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            real = path.resolve().name  # blobs have the name of their ETag
            sha = real if re.fullmatch(r"[0-9a-f]{64}", real) else None
            entries.append(FileState(name, path.stat().st_size, f"{STAMP}{real}", sha))
        return self.reopened(tuple(entries))

    # ---- files -----------------------------------------------------------------------------------------------------

    def _name(self, name: str) -> str:
        return f"{self.address.path}/{name}" if self.address.path else name

    def _cached(self, name: str) -> Path | None:
        """The file in the Hub's cache on this machine."""
        from huggingface_hub import try_to_load_from_cache

        with self._typed(name):
            found = try_to_load_from_cache(self.address.place, self._name(name), revision=self.address.revision)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, entry: FileState) -> bytes:
        """A small file, through the Hub's cache."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        def step() -> bytes:
            disable_progress_bars()
            with self._typed(f"fetching {entry.name}"):
                path = Path(hf_hub_download(
                    self.address.place, self._name(entry.name), revision=self.address.revision, etag_timeout=SECONDS,
                    endpoint=endpoint(),
                ))  # fmt: skip
                if path.stat().st_size != entry.size:
                    text = f"{self.address}/{entry.name}: {path.stat().st_size} bytes in place of {entry.size}"
                    raise SourceError(text, f"delete it from the Hub's cache: {path}")
                return path.read_bytes()

        return patiently(step)

    def open(self, entry: FileState) -> RemoteFile:
        key = f"{self.address}/{entry.name}\0{entry.size}\0{entry.stamp}"
        cached = self._cached(entry.name)

        def read(buffer: memoryview, offset: int, keep: bool) -> None:
            if not _read_cached(cached, entry, buffer, offset):
                self._blocks.read(buffer, offset, entry.size, key, fetch, keep)

        def fetch(buffer: memoryview, offset: int) -> None:
            self._range(entry, buffer, offset)

        return RemoteFile(entry.size, entry.stamp, read, lambda: entry.stamp, entry.sha256)

    def _range(self, entry: FileState, buffer: memoryview, offset: int) -> None:
        """Fills the buffer; goes on where a connection broke off."""
        done = 0

        def step() -> None:
            nonlocal done
            with self._typed(f"reading {entry.name}"):
                place = self._place(entry.name)
                url, headers = (place.url, dict[str, str]()) if place else self._at_hub(entry.name)
                headers["Range"] = f"bytes={offset + done}-{offset + len(buffer) - 1}"
                headers["Accept-Encoding"] = "identity"
                with _session().stream("GET", url, headers=headers, follow_redirects=True, timeout=SECONDS) as answer:
                    self._check(answer, entry, offset + done, place)
                    for piece in answer.iter_bytes(PIECE_BYTES):
                        part = piece[: len(buffer) - done]
                        buffer[done : done + len(part)] = part
                        done += len(part)
            if done < len(buffer):
                text = f"{self.address}/{entry.name}: the answer ended {len(buffer) - done} bytes early"
                raise Passing(HubError(text, "run the same command again: it goes on from what is there"))

        patiently(step)

    def _place(self, name: str) -> Place | None:
        """Where the Hub has sent us; no token is sent there."""
        with self._lock:
            known = self._places.get(name)
        return known if known is not None and time.monotonic() < known.until else None

    def _at_hub(self, name: str) -> tuple[str, dict[str, str]]:
        """(where to ask the Hub, headers)"""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.address.place, self._name(name), revision=self.address.revision, endpoint=endpoint())
        return url, build_hf_headers()

    def _check(self, answer: Any, entry: FileState, offset: int, asked: Place | None) -> None:
        """Whether an answer is the range of the file that was listed. asked: None for the Hub itself."""
        status = answer.status_code
        if status >= 400 and asked:
            with self._lock:
                if self._places.get(entry.name) is asked:
                    del self._places[entry.name]  # the signature is too old
            raise Passing(HubError(f"{self.address}/{entry.name}: the storage of the Hub answers {status}"), 0.0)
        if status >= 400:
            raise Refused(answer)
        first, here = answer.history[0] if answer.history else answer, answer.headers.get("ETag", "")
        if asked:
            tag, listed = here, asked.tag
        else:
            tag, listed = first.headers.get("X-Linked-ETag", ""), entry.stamp.removeprefix(STAMP)
            tag = tag or ("" if answer.history else here)
        total = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if (tag and _plain(tag) != _plain(listed)) or (total and int(total[2]) != entry.size):
            raise StoreError(f"{self.address}/{entry.name}: another file than when the conversion began",
                             "begin anew: another -o, or -nr")  # fmt: skip
        if status != 206 or total is None or int(total[1]) != offset:
            raise HubError(f"{self.address}/{entry.name}: the server does not send parts of files (status {status})",
                           "fetch the model: hf download, and give its folder")  # fmt: skip
        if answer.history:
            with self._lock:
                self._places[entry.name] = Place(str(answer.url), time.monotonic() + KEPT_SECONDS, here)

    # ---- errors ----------------------------------------------------------------------------------------------------

    def _typed(self, doing: str) -> AbstractContextManager[None]:
        return explained(lambda failed: self._error(failed, f"{self.address}: {doing}"))

    def _error(self, f: Failure, where: str) -> Exception:
        again = "run the same command again"
        if f.kind == "offline":
            return HubError(f"{where}: HF_HUB_OFFLINE is set, and the Hub's cache does not have it", "unset HF_HUB_OFFLINE")
        if f.kind == "gated":
            accept = f"accept its licence at {redacted(endpoint())}/{self.address.place}, then {LOGIN}"
            return HubError(f"{where}: the model is gated ({f.status}): {f.says}", accept)
        if f.kind == "revision":
            revision = self.address.revision or "main"
            return SourceError(f"{where}: there is no revision {revision}", "leave out @REVISION for the main branch")
        if f.kind == "address":
            return UsageError(f"{where}: {f.says}", "the address has the form hf://OWNER/NAME[@REVISION][/FOLDER]")
        if f.kind == "busy":
            hint = "too many requests: wait some minutes" if f.status == 429 else f"{again} later"
            return Passing(HubError(f"{where}: the Hub answers {f.status}: {f.says}", hint), _after(f.headers))
        if f.kind == "file":
            return SourceError(f"{where}: there is no such file in this commit", "was the repository changed?")
        if f.kind == "missing":
            hint = f"is the name right? if the model is private: {LOGIN}"
            return SourceError(f"{where}: not found, or not shown to you ({f.status}): {f.says}", hint)
        if f.kind == "refused":
            return HubError(f"{where}: the Hub refuses ({f.status}): {f.says}", f"is the token right? {LOGIN}")
        if f.kind == "answer":
            return HubError(f"{where}: the Hub answers {f.status}: {f.says}")
        if f.kind == "network":
            what = f"{redacted(endpoint())} cannot be reached, or broke off: {f.says}"
            return Passing(HubError(f"{where}: {what}", f"is there a network? {again}"), unreached=True)
        return HubError(f"{where}: {f.name}: {f.says}")


def _read_cached(path: Path | None, entry: FileState, buffer: memoryview, offset: int) -> bool:
    """From a file of the Hub's cache; False if it is not there, or no longer."""
    if path is None:
        return False
    try:
        with path.open("rb", buffering=0) as f:
            if os.fstat(f.fileno()).st_size != entry.size:
                return False
            f.seek(offset)
            done = 0
            while done < len(buffer) and (count := f.readinto(buffer[done : done + (1 << 30)])):
                done += count
            return done == len(buffer)
    except OSError:
        return False


def _plain(tag: str) -> str:
    return tag.removeprefix("W/").strip('"')


def _after(headers: Any) -> float | None:
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() and len(text) < 6 else None


def _is_name(name: str) -> bool:
    return name.isprintable() and not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name


def _session() -> Any:
    from huggingface_hub import get_session

    return get_session()
