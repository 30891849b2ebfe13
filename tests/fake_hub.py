"""As much of the Hub's HTTP interface as an upload needs, on loopback: repositories, branches, commits, large files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

import yaml
from loopback import Server, running

TOKEN = "hf_OnLoopbackOnly0123456789abcdef"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Branch:
    sha: str
    files: dict[str, bytes]
    messages: list[str] = field(default_factory=list)


@dataclass
class Repo:
    private: bool
    branches: dict[str, Branch]


@dataclass
class FakeHub:
    """State, and what was asked. ``fail``: path pattern -> (status, message, how often); status 0 drops the connection."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, Authorization)
    received: list[str] = field(default_factory=list)  # SHA-256 of large files as they came in
    fail: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    url: str = ""

    def add_repo(self, name: str, private: bool = False, **files: bytes) -> Repo:
        contents = {".gitattributes": b"*.safetensors filter=lfs\n", **files}
        self.repos[name] = Repo(private, {"main": Branch(_sha(f"{name} main"), contents)})
        return self.repos[name]

    def failure(self, path: str) -> tuple[int, str] | None:
        for pattern, (status, message, times) in self.fail.items():
            if times > 0 and re.search(pattern, path):
                self.fail[pattern] = (status, message, times - 1)
                return status, message
        return None


def _sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(hub: FakeHub, handler: type[Handler] | None = None) -> Iterator[FakeHub]:
    with running(Server(type("Bound", (handler or Handler,), {"hub": hub}))) as hub.url:
        yield hub


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, given = unquote(self.path.partition("?")[0]), self.headers.get("Authorization", "")
        self.hub.requests.append((self.command, path, given))
        failure = self.hub.failure(path)
        if failure is not None:
            if failure[0] == 0:
                self.close_connection = True
                return
            return self._answer({"error": failure[1]}, failure[0], {"X-Error-Message": failure[1]})
        if path.startswith("/storage/"):  # elsewhere in reality: reached by signed addresses
            return self._store(path.rpartition("/")[2], body)
        if given != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self._answer({"error": message}, 401, {"X-Error-Message": message})
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return action(self, body, **found.groupdict())
        self._answer({"error": f"no such route: {self.command} {path}"}, 404)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, {"X-Error-Code": code})

    def _branch(self, repo: str, branch: str) -> Branch | None:
        if repo not in self.hub.repos:
            self._missing("RepoNotFound")
            return None
        found = self.hub.repos[repo].branches.get(branch)
        if found is None:
            self._missing("RevisionNotFound")
        return found

    # ---- repositories ----------------------------------------------------------------------------------------------

    def info(self, body: bytes, repo: str, branch: str | None = None) -> None:
        found = self._branch(repo, branch or "main")
        if found is not None:
            files = [{"rfilename": name} for name in sorted(found.files)]
            private = self.hub.repos[repo].private
            self._answer({"id": repo, "sha": found.sha, "private": private, "siblings": files, "tags": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self.hub.add_repo(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self._answer({"url": f"{self.hub.url}/{name}", "id": name})

    def create_branch(self, body: bytes, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo].branches
        branches[branch] = Branch(branches["main"].sha, dict(branches["main"].files))
        self._answer({})

    def resolve(self, body: bytes, repo: str, branch: str, name: str) -> None:
        known = {b.sha: b for b in self.hub.repos[repo].branches.values()}
        found = known.get(branch) or self._branch(repo, branch)
        if found is None:
            return
        if name not in found.files:
            return self._missing("EntryNotFound")
        data = found.files[name]
        self._answer(data, headers={"ETag": f'"{_blob_oid(data)}"', "X-Repo-Commit": found.sha})

    # ---- uploads ---------------------------------------------------------------------------------------------------

    def validate(self, body: bytes) -> None:
        card = json.loads(body)["content"]
        block = card.split("---\n")[1] if card.startswith("---\n") else ""
        fields = yaml.safe_load(block) or {}
        if not isinstance(fields.get("base_model", ""), str) or fields.get("license") == "forbidden":
            return self._answer({"errors": [{"message": '"license" must be one of the known'}], "warnings": []}, 400)
        self._answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, branch: str) -> None:
        found = self._branch(repo, branch)
        if found is None:
            return
        out = []
        for f in json.loads(body)["files"]:
            large = f["path"].endswith(".safetensors")
            have = found.files.get(f["path"])
            oid = None if have is None else hashlib.sha256(have).hexdigest() if large else _blob_oid(have)
            mode = "lfs" if large else "regular"
            out.append({"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": out})

    def batch(self, body: bytes, repo: str) -> None:
        out = []
        for o in json.loads(body)["objects"]:
            answer: dict[str, Any] = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/storage/{o['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}.git/verify"}}
            out.append(answer)
        self._answer({"transfer": "basic", "objects": out})

    def _store(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.received.append(oid)
        self._answer({})

    def verify(self, body: bytes, repo: str) -> None:
        wanted = json.loads(body)
        known = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
        self._answer({}, 200 if known else 422)

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        found = self._branch(repo, branch)
        if found is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", found.sha) != found.sha:
            return self._answer({"error": "the branch moved"}, 412, {"X-Error-Message": "the branch moved"})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del found.files[value["path"]]
        found.messages.append(header["summary"])
        found.sha = _sha(f"{repo} {branch} {len(found.messages)}")
        url = f"{self.hub.url}/{repo}/commit/{found.sha}"
        self._answer({"success": True, "commitUrl": url, "commitOid": found.sha, "hookOutput": ""})


ROUTES: list[tuple[str, str, Any]] = [
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/(?P<branch>.+)", Handler.info),
    ("GET", rf"/api/datasets/{REPO}", Handler.info),
    ("GET", rf"/api/datasets/{REPO}/revision/(?P<branch>.+)", Handler.info),
    ("GETHEAD", rf"/datasets/{REPO}/resolve/(?P<branch>[^/]+)/(?P<name>.+)", Handler.resolve),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.create_branch),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<branch>.+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{REPO}\.git/verify", Handler.verify),
    ("POST", rf"/api/models/{REPO}/commit/(?P<branch>.+)", Handler.commit),
    ("GETHEAD", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<name>.+)", Handler.resolve),
]
