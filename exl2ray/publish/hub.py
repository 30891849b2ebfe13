"""The Hugging Face Hub, through huggingface_hub; every failure is a typed error with a hint and without the token.

The endpoint is $HF_ENDPOINT, as for all tools of the Hub. Files above some MB go through its large file storage, which
takes every content once: what had arrived before a broken connection is not sent again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from exl2ray.errors import Exl2RayError, FormatError, HubError, UsageError
from exl2ray.remote.address import redacted
from exl2ray.remote.hub_errors import SAYS, Failure, explained
from exl2ray.remote.hub_library import endpoint
from exl2ray.remote.token import Token, checked

TIMEOUT = 60.0  # seconds, for answers without data
AGAIN = "run the same command again: what has arrived is not sent again"
MOVED, FULL = f"somebody else changed the repository meanwhile; {AGAIN}", "the storage of this account may be used up"
HINTS = {
    401: "the token ({token}) is not valid: make one with write access and log in again",
    403: "the token ({token}) may not write to {repo}: it needs write access there",
    404: "is --repo right? a private repository is not found by a token that may not see it",
    409: MOVED, 412: MOVED, 402: FULL, 413: FULL, 507: FULL, 429: f"too many requests: wait some minutes, then {AGAIN}",
}  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """A branch as it is: its last commit and the names of its files."""

    name: str
    commit: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Commit:
    """The commit that a branch has now, whether it was made or found."""

    url: str
    oid: str
    changed: bool  # False: everything was there already


def stored_token() -> Token:
    """From $HF_TOKEN or the login of the Hub's own tools. Raises UsageError if there is none."""
    found = get_token()
    if not found:
        raise UsageError("there is no access token for the Hub", "hf auth login, or set HF_TOKEN, or give --token-file FILE")
    return checked(found, "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the stored login of the Hub")


class Hub:
    """One repository on the Hub. All methods raise HubError, or another Exl2RayError, and nothing else."""

    def __init__(self, repo: str, token: Token) -> None:
        self.repo, self.token = repo, token
        self.endpoint = endpoint()
        self._api = HfApi(endpoint=self.endpoint, token=token.value)

    def is_private(self) -> bool | None:
        """Whether the repository is private; None if there is none, or none that the token may see."""
        with self._typed("looking for the repository"):
            try:
                return bool(self._api.repo_info(self.repo, timeout=TIMEOUT).private)
            except RepositoryNotFoundError as e:
                if e.response.status_code == 401 and e.response.headers.get("X-Error-Code") != "RepoNotFound":
                    raise  # 401 is the answer for missing repositories as well as for tokens that the Hub does not know
                return None

    def create(self, private: bool) -> None:
        with self._typed("creating the repository"):
            self._api.create_repo(self.repo, private=private)

    def branch(self, name: str) -> Branch | None:
        """The branch; None if there is none."""
        with self._typed(f"reading branch {name}"):
            try:
                info = self._api.model_info(self.repo, revision=name, timeout=TIMEOUT)
            except RevisionNotFoundError:
                return None
            return Branch(name, info.sha or "", tuple(s.rfilename for s in info.siblings or ()))

    def create_branch(self, name: str) -> None:
        """A branch that begins where main is."""
        with self._typed(f"creating branch {name}"):
            self._api.create_branch(self.repo, branch=name, exist_ok=True)

    def commit(
        self, branch: Branch, files: Mapping[str, Path | bytes], stale: Sequence[str], message: str,
        check: Callable[[], None] = lambda: None,
    ) -> Commit:  # fmt: skip
        """Uploads ``files`` (name -> where it is, or its content) and removes ``stale`` ones, in a single commit.

        ``check`` is called once all files are hashed: the Hub takes nothing with another hash.
        """
        with self._typed("reading what is to be uploaded"):
            adds = [CommitOperationAdd(name, source) for name, source in files.items()]
        check()
        deletes = [CommitOperationDelete(name) for name in stale]
        with self._typed(f"uploading to branch {branch.name}"):
            done = self._api.create_commit(
                self.repo, [*adds, *deletes], commit_message=message, revision=branch.name,
                parent_commit=branch.commit or None,
            )  # fmt: skip
            return Commit(done.commit_url, done.oid, done.oid != branch.commit)

    def read_text(self, branch: Branch, name: str) -> str | None:
        """A text file; None if the branch has none of that name. A file that is there and does not come is an error."""
        if name not in branch.files:
            return None
        with self._typed(f"reading {name} of branch {branch.name}"), tempfile.TemporaryDirectory() as folder:
            path = hf_hub_download(
                self.repo, name, revision=branch.commit or branch.name, local_dir=folder, token=self.token.value,
                endpoint=self.endpoint,
            )  # fmt: skip
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def _typed(self, doing: str) -> AbstractContextManager[None]:
        return explained(lambda failed: self._error(failed, f"{self.repo}: {doing}"), self.token)

    def _error(self, f: Failure, where: str) -> Exl2RayError:
        if isinstance(f.cause, ValueError) and not isinstance(f.cause, HfHubHTTPError) and "README.md" in str(f.cause):
            text = " ".join(self.token.redact(str(f.cause)).split())[:SAYS]  # the server's words are in it, among others
            return FormatError(f"{where}: the Hub does not take the card: {text}", "correct README.md")
        if f.kind == "offline":
            return HubError(f"{where}: the Hub's tools are switched to offline", "unset HF_HUB_OFFLINE")
        if f.kind == "address":
            return UsageError(f"{where}: {f.says}", "--repo is OWNER/NAME as the Hub takes it")
        if f.status:
            hint = HINTS.get(f.status, AGAIN if f.status >= 500 else "").format(token=self.token.source, repo=self.repo)
            return HubError(f"{where}: the Hub answers {f.status}" + (f": {f.says}" if f.says else ""), hint)
        if f.kind == "network":
            what = f"{redacted(self.endpoint)} cannot be reached, or broke off"
            return HubError(f"{where}: {what}: {f.says}", f"is there a network? {AGAIN}")
        return HubError(f"{where}: {f.says}" if isinstance(f.cause, OSError) else f"{where}: {f.name}: {f.says}", AGAIN)
