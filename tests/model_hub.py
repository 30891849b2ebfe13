"""A Hub that can only be read, on loopback: commits, gates, ranges, signed addresses of large files; and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote

from loopback import Server, running

TOKEN = "hf_OnLoopbackOnly0123456789abcdef"
SIGNATURE = "Signature0123456789"
LARGE = (".safetensors", ".bin", ".gguf")


@dataclass
class Commit:
    """files: content by name. private: only with the token; gated: not even so."""

    sha: str
    files: dict[str, bytes]


@dataclass
class ModelHub:
    """``fail``: pattern of "METHOD path" -> (status, how often); status 0 ends the connection, 1 after half of the body."""

    repos: dict[str, dict[str, Commit]] = field(default_factory=dict)  # name -> revision -> commit
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    fail: dict[str, tuple[int, int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # "METHOD path range"
    leaked: list[str] = field(default_factory=list)  # requests to the storage that had a token
    ranges: bool = True
    url: str = ""
    lock: Any = field(default_factory=Lock)
    before: Callable[[str], None] = lambda line: None  # called with each of them, before it is answered

    def add(self, name: str, files: Mapping[str, bytes] | Path, revision: str = "main") -> str:
        """Makes a commit of files, or of those in a folder; its hash."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        sha = hashlib.sha1(repr((name, revision, sorted(files.items()))).encode()).hexdigest()
        self.repos.setdefault(name, {})[revision] = Commit(sha, dict(files))
        self.repos[name][sha] = self.repos[name][revision]
        return sha

    def sent(self, pattern: str) -> list[str]:
        return [line for line in self.asked if re.search(pattern, line)]


@contextmanager
def serving(hub: ModelHub) -> Iterator[ModelHub]:
    with running(_Server(type("Bound", (_Handler,), {"hub": hub}))) as hub.url:
        yield hub


class _Server(Server):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up when they have what they want."""


class _Handler(BaseHTTPRequestHandler):
    hub: ModelHub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body together: in two packets the second waits for an acknowledgement

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        line = f"{self.command} {path} {self.headers.get('Range', '')}".strip()
        self.half = False
        hub.before(line)
        with hub.lock:
            hub.asked.append(line)
            for pattern, (status, times) in hub.fail.items():
                if times > 0 and re.search(pattern, line):
                    hub.fail[pattern] = (status, times - 1)
                    if status == 0:
                        self.close_connection = True
                        return
                    self.half = status == 1
                    if not self.half:
                        return self._error(status, f"made to fail, with {TOKEN}")
        if path.startswith("/storage/"):
            return self._storage(path)
        for pattern, action in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            found = re.fullmatch(pattern, path)
            if found:
                return action(*found.groups())
        self._error(404, "no such route")

    do_HEAD = do_GET

    def _commit(self, repo: str, revision: str | None) -> Commit | None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.hub.repos or (repo in self.hub.private and not known):
            self._error(401 if not known else 404, "Repository not found", "RepoNotFound")
            return None
        found = self.hub.repos[repo].get(revision or "main")
        if found is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _info(self, repo: str, revision: str | None) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        siblings = []
        for name, data in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        self._answer(200, json.dumps({"id": repo, "sha": commit.sha, "siblings": siblings, "tags": []}).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if repo in self.hub.gated:
            return self._error(403, f"Access to model {repo} is restricted.", "GatedRepo")
        if name not in commit.files:
            return self._error(404, "Entry not found", "EntryNotFound")
        data = commit.files[name]
        headers = {"X-Repo-Commit": commit.sha}
        if not name.endswith(LARGE):
            return self._content(data, {**headers, "ETag": f'"{blob_id(data)}"'})
        sha = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
        # Another host than the Hub's, as far as HTTP libraries can tell.
        other = self.hub.url.replace("127.0.0.1", "localhost")
        headers["Location"] = f"{other}/storage/{repo}/{commit.sha}/{name}?X-Amz-Signature={SIGNATURE}{len(self.hub.asked)}"
        self._answer(302, b"", headers)

    def _storage(self, path: str) -> None:
        if "Authorization" in self.headers:
            self.hub.leaked.append(path)
        found = re.fullmatch(r"/storage/([^/]+/[^/]+)/([^/]+)/(.+)", path)
        assert found is not None
        if SIGNATURE not in self.path:
            return self._error(403, "no signature")
        data = self.hub.repos[found[1]][found[2]].files[found[3]]
        self._content(data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not self.hub.ranges:
            return self._answer(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        self._answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _error(self, status: int, text: str, code: str = "") -> None:
        headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {})}
        self._answer(status, json.dumps({"error": text}).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.half else body)
        if self.half:
            self.close_connection = True


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
