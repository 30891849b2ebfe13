"""Calibration data on the Hugging Face Hub: ``hf://datasets/OWNER/NAME[@REVISION][/PATH][:COLUMN]``.

A file is fetched when its text is needed, through the cache of huggingface_hub, so of a large data set only the first files
come. PATH is a file, a folder or a pattern. Where a data set holds no files that can be read (scripts, CSV), the Hub has
made Parquet files of it, in the revision ``refs/convert/parquet``.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2ray.calibration.data.sources import HUB, DataFile, Source, choose_files, kind_by_name
from exl2ray.errors import CalibrationError, Exl2RayError, HubError, UsageError

ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(/(?P<path>[^:]*))?(:(?P<column>.+))?"
)
FORM = "hf://datasets/OWNER/NAME[@REVISION][/PATH][:COLUMN]"
CONVERTED = "refs/convert/parquet"
TIMEOUT = 30.0  # seconds, for answers without data
MAX_FILE_BYTES = 16 << 30  # of one file, which is fetched whole
SAYS = 200  # characters of a server's message that are passed on


@dataclass(frozen=True)
class Address:
    repo: str
    revision: str | None
    path: str  # "" for all of it
    column: str | None


def parse_address(text: str) -> Address:
    """UsageError for what is none."""
    found = ADDRESS.fullmatch(text)
    if found is None:
        raise UsageError(f"-c {text}: not the address of a data set", f"it has the form {FORM}")
    path = (found["path"] or "").strip("/")
    if ".." in path.split("/"):
        raise UsageError(f"-c {text}: .. leads out of the data set", f"it has the form {FORM}")
    return Address(found["repo"], found["revision"], path, found["column"])


def hub_source(text: str) -> Source:
    """The files of a data set. Raises UsageError for a wrong address or without huggingface_hub, CalibrationError for what
    the Hub does not have or show, HubError where it does not answer.
    """
    address = parse_address(text)
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as e:
        raise UsageError(f"-c {text}: huggingface_hub is not installed", "pip install 'exl2ray[hub]'") from e
    commit, names = _files(address, address.revision)
    chosen, notes = _chosen(address, names, text)
    if not chosen and address.revision is None:
        with _tolerated():
            commit, names = _files(address, CONVERTED)
            chosen, notes = _chosen(address, names, text)
    if not chosen:
        raise CalibrationError(
            f"-c {text}: the data set has no file that is read (Parquet, JSON lines, JSON, text)",
            f"name one of its {len(names)} files: {FORM}" if names else "look at its page on the Hub",
        )
    given = f"{HUB}datasets/{address.repo}@{commit}" + (f"/{address.path}" if address.path else "")
    given += f":{address.column}" if address.column else ""
    files = tuple(DataFile(name, lambda name=name: _fetch(address, commit, name, names[name])) for name in chosen)  # type: ignore[misc]
    return Source(given, address.repo, files, address.column, notes)


def _chosen(address: Address, names: Mapping[str, int], text: str) -> tuple[list[str], tuple[str, ...]]:
    path = address.path
    if path in names:
        return [path], ()
    if any(c in path for c in "*?["):
        below = [n for n in names if fnmatch.fnmatchcase(n, path)]
    else:
        below = [n for n in names if not path or n.startswith(path + "/")]
    if path and not below:
        has = f"it has, for example, {', '.join(sorted(names)[:4])}"
        raise CalibrationError(f"-c {text}: {address.repo} has no {path}", has)
    below = [n for n in below if not n.startswith(".") and "/." not in n and (path or n != "README.md")]
    if not any(kind_by_name(n) for n in below):
        return [], ()
    return choose_files(below, f"-c {text}")


def _files(address: Address, revision: str | None) -> tuple[str, dict[str, int]]:
    """(commit, files and their bytes, 0 where the Hub does not tell) of a revision; of the default one for None."""
    from huggingface_hub import HfApi

    with _typed(address, "listing its files"):
        info = HfApi().dataset_info(address.repo, revision=revision, timeout=TIMEOUT, files_metadata=True)
        sizes = {s.rfilename: int(s.size or 0) for s in info.siblings or ()}
        usable = (n for n in sizes if n and not n.startswith("/") and ".." not in n.split("/"))
        return info.sha or "main", {n: sizes[n] for n in usable}


def _fetch(address: Address, commit: str, name: str, size: int) -> Path:
    from huggingface_hub import hf_hub_download

    if size > MAX_FILE_BYTES:
        hint = f"name another file: {FORM}"
        raise CalibrationError(f"data set {address.repo}: {name} has {size >> 30} GiB, too much for calibration", hint)
    with _typed(address, f"fetching {name}"):
        return Path(hf_hub_download(address.repo, name, repo_type="dataset", revision=commit, etag_timeout=TIMEOUT))


@contextmanager
def _tolerated() -> Iterator[None]:
    try:
        yield
    except CalibrationError:
        pass


@contextmanager
def _typed(address: Address, doing: str) -> Iterator[None]:
    """Turns whatever goes wrong into a typed error without the token. ``from None``: causes may show request headers."""
    from huggingface_hub import get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from exl2ray.remote.token import Token, redacted_logs

    token = Token(get_token() or "\0", "")
    disable_progress_bars()
    try:
        with redacted_logs(token):
            yield
    except Exl2RayError:
        raise
    except Exception as e:  # of several HTTP libraries
        raise _error(e, address, doing, token.redact) from None


def _error(e: Exception, address: Address, doing: str, redact: Callable[[str], str]) -> Exl2RayError:
    from huggingface_hub import errors

    where = f"data set {address.repo}: {doing}"
    says = " ".join(redact(str(getattr(e, "server_message", None) or e)).split())[:SAYS]
    chain: list[BaseException] = [e]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    status: Any = next((s for c in chain if (s := getattr(getattr(c, "response", None), "status_code", None))), None)
    if any(isinstance(c, errors.OfflineModeIsEnabled) for c in chain):
        return HubError(f"{where}: the Hub's tools are offline, and it is not in the cache", "unset HF_HUB_OFFLINE")
    if isinstance(e, errors.GatedRepoError):
        return CalibrationError(f"{where}: its authors have to grant access", "ask for it on its page, then: hf auth login")
    if isinstance(e, errors.RevisionNotFoundError):
        return CalibrationError(f"{where}: there is no revision {address.revision}", "leave out @REVISION for the newest")
    if status in (401, 403, 404) or isinstance(e, (errors.RepositoryNotFoundError, errors.EntryNotFoundError)):
        hint = "is the name right? if it is private: hf auth login"
        return CalibrationError(f"{where}: not found, or not shown to you ({says})", hint)
    if isinstance(e, errors.HFValidationError):
        return UsageError(f"{where}: {says}", f"the address has the form {FORM}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer = f"answers {status}" if status else "cannot be reached"
    return HubError(f"{where}: {endpoint} {answer}: {says}", "is there a network? run the same command again")
