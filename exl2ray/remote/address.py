"""Addresses of models: ``hf://owner/name[@revision][/folder]``, ``s3://bucket/prefix``, ``gs://bucket/prefix``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote

from exl2ray.errors import UsageError
from exl2ray.formats.hub_names import is_repository

FORMS = "hf://OWNER/NAME[@REVISION][/FOLDER], s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?(?:/(?P<path>[^@]*))?", re.ASCII
)
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#\s]+/[^/?#\s]+)(?:/tree/([^/?#]+))?/?", re.ASCII)
MASK = "<secret>"
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Address:
    """place: owner/name or the bucket. revision: of a repository, None for its main branch. path: "" for all of it."""

    scheme: str
    place: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{self.place}{revision}" + (f"/{self.path}" if self.path else "")

    @property
    def pinned(self) -> bool:
        """Whether it names one commit."""
        return COMMIT.fullmatch(self.revision or "") is not None

    def at(self, commit: str) -> Address:
        return replace(self, revision=commit)


def is_remote(text: str) -> bool:
    return "://" in text and not text.startswith("file://")


def parse(text: str, flag: str = "-i") -> Address:
    """UsageError for what is no address; it never repeats a part that may be secret."""
    scheme, _, rest = text.partition("://")
    page = _PAGE.fullmatch(text)
    if page is not None and is_repository(page[1]):
        revision = f"@{page[2]}" if page[2] else ""
        raise UsageError(f"{flag} {text}: a page of the Hub", f"give {flag} hf://{page[1]}{revision}")
    if scheme not in ("hf", "s3", "gs"):
        raise UsageError(f"{flag} {redacted(text)}: models are not read from {scheme[:20]}://", f"give {FORMS}, or a folder")
    if any(c in rest for c in "?#\\") or not rest.isprintable() or (scheme != "hf" and "@" in rest):
        raise UsageError(f"{flag} {redacted(text)}: not of the form {FORMS}", "keys and signatures do not belong in it")
    if scheme == "hf":
        return _hub(text, rest, flag)
    bucket, _, path = rest.partition("/")
    path = _path(path, text, flag)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,221}", bucket):
        raise UsageError(f"{flag} {redacted(text)}: not of the form {FORMS}", "buckets have names of small letters")
    return Address(scheme, bucket, path)


def _hub(text: str, rest: str, flag: str) -> Address:
    kind = rest.partition("/")[0]
    if kind in ("datasets", "spaces", "buckets") and rest.count("/") > 1:
        raise UsageError(f"{flag} {redacted(text)}: one of the Hub's {kind}, not a model", f"give {flag} hf://OWNER/NAME")
    found = _HUB.fullmatch(rest)
    if found is None or not is_repository(found["repo"]) or ":" in rest.partition("@")[0]:
        raise UsageError(f"{flag} {redacted(text)}: not of the form hf://OWNER/NAME[@REVISION][/FOLDER]", "name both parts")
    revision = unquote(found["revision"]) if found["revision"] else None
    path = _path(found["path"] or "", text, flag)
    if revision == "refs":  # git's long name of a branch or tag is none on the Hub
        short = re.sub("^(heads|tags)/", "", path).replace("/", "%2F")
        raise UsageError(f"{flag} {redacted(text)}: {revision}/{path} is no revision", f"give {flag} hf://{found['repo']}@{short}")
    return Address("hf", found["repo"], path, revision)


def _path(path: str, text: str, flag: str) -> str:
    path = path.strip("/")
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(f"{flag} {redacted(text)}: empty parts, . and .. have no meaning in an address", f"give {FORMS}")
    return path


def redacted(text: str) -> str:
    """``text`` without keys of the environment, passwords and signatures in addresses."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, MASK)
    text = re.sub(r"hf_[A-Za-z0-9]{16,}", MASK, text)
    text = re.sub(r"(://)[^/\s@]*:[^/\s@]*@", rf"\1{MASK}@", text)
    return re.sub(r"(://[^\s?\"'<>]*)\?[^\s\"'<>]+", r"\1?...", text)
