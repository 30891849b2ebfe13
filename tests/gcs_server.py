"""A Google Cloud Storage server in memory: as much of the JSON API as pyarrow's GcsFileSystem uses.

Strict about what clients get wrong: an upload is visible only when its last part has come, parts must follow each other.
Lists come in pages of three objects, so that clients have to ask for the next.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import Server

_PAGE = 3
_OBJECTS = re.compile(r"(/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?")


class GcsServer:
    """Buckets appear when something is written to them. ``objects``: (bucket, name) -> (content, metadata)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], tuple[bytes, dict[str, Any]]] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._http = Server(type("Handler", (_Handler,), {"gcs": self}))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.address = self._http.address

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def store(self, bucket: str, name: str, content: bytes) -> dict[str, Any]:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        meta = {
            "kind": "storage#object", "id": f"{bucket}/{name}", "bucket": bucket, "name": name, "size": str(len(content)),
            "generation": str(next(self._numbers)), "metageneration": "1", "updated": now, "timeCreated": now,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "storageClass": "STANDARD",
        }  # fmt: skip
        self.objects[bucket, name] = (content, meta)
        return meta

    def begin(self, bucket: str, name: str) -> str:
        key = f"upload-{next(self._numbers)}"
        self.uploads[key] = (bucket, name, bytearray())
        return key


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body together: in two packets the second waits for an acknowledgement
    gcs: GcsServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, text: str) -> None:
        self._answer(status, {"error": {"code": status, "message": text}})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _target(self) -> tuple[str, str, dict[str, str]] | None:
        """(bucket, object name or "", query) of a request; answers those that are none."""
        url = urlsplit(self.path)
        found = _OBJECTS.fullmatch(url.path)
        if found is None:
            self._refuse(501, f"not of this server: {url.path}")
            return None
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        return found[2], unquote(found[3] or ""), query

    def do_GET(self) -> None:
        target = self._target()
        if target is None:
            return
        bucket, name, query = target
        with self.gcs.lock:
            if not name:
                return self._list(bucket, query)
            found = self.gcs.objects.get((bucket, name))
        if found is None:
            return self._refuse(404, f"No such object: {bucket}/{name}")
        content, meta = found
        if query.get("alt") != "media":
            return self._answer(200, meta)
        headers = {"x-goog-generation": meta["generation"], "x-goog-hash": f"md5={meta['md5Hash']}"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, content, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._answer(206, content[first : last + 1], headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        names = sorted(n for b, n in self.gcs.objects if b == bucket and n.startswith(query.get("prefix", "")))
        start = int(query.get("pageToken") or 0)
        page: dict[str, Any] = {"kind": "storage#objects"}
        page["items"] = [self.gcs.objects[bucket, n][1] for n in names[start : start + _PAGE]]
        if start + _PAGE < len(names):
            page["nextPageToken"] = str(start + _PAGE)
        self._answer(200, page)

    def do_POST(self) -> None:
        target = self._target()
        body = self._body()
        if target is None:
            return
        bucket, _, query = target
        if query.get("uploadType") != "resumable":
            return self._refuse(501, f"uploads of the type {query.get('uploadType')}")
        name = query.get("name") or json.loads(body or b"{}").get("name", "")
        with self.gcs.lock:
            key = self.gcs.begin(bucket, name)
        place = f"{self.gcs.address}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
        self._answer(200, None, {"Location": place})

    def do_PUT(self) -> None:
        """A part of an upload, or the question how far it is."""
        target = self._target()
        body = self._body()
        if target is None:
            return
        key = target[2].get("upload_id", "")
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        with self.gcs.lock:
            if key not in self.gcs.uploads or span is None:
                return self._refuse(404 if span else 400, "no such upload, or no range")
            bucket, name, content = self.gcs.uploads[key]
            if span[1] is not None and int(span[1]) != len(content):
                return self._refuse(400, f"a part that begins at {span[1]} after {len(content)} bytes")
            content += body
            if span[3] == "*" or int(span[3]) != len(content):
                headers = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
                return self._answer(308, None, headers)
            del self.gcs.uploads[key]
            self._answer(200, self.gcs.store(bucket, name, bytes(content)))

    def do_DELETE(self) -> None:
        target = self._target()
        if target is None:
            return
        bucket, name, query = target
        with self.gcs.lock:
            if "upload_id" in query:
                self.gcs.uploads.pop(query["upload_id"], None)
                return self._answer(499)
            gone = self.gcs.objects.pop((bucket, name), None)
        self._answer(204) if gone else self._refuse(404, f"No such object: {bucket}/{name}")


__all__ = ["GcsServer"]
