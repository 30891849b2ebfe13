"""Calibration data on the Hugging Face Hub: ``hf://datasets/OWNER/NAME[@REVISION][/PATH][:COLUMN]``.

A file is fetched when its text is needed, through the cache of huggingface_hub, so of a large data set only the first files
come. PATH is a file, a folder or a pattern. Where a data set holds no files that can be read (scripts, archives), the Hub has
made Parquet files of it, in the revision ``refs/convert/parquet``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from exl2ray.calibration.data.sources import HUB, DataFile, Source, choose_files, kind_by_name
from exl2ray.errors import CalibrationError, Exl2RayError, HubError, UsageError
from exl2ray.formats.hub_names import is_repository
from exl2ray.remote.address import redacted
from exl2ray.remote.hub_errors import Failure, explained
from exl2ray.remote.hub_library import endpoint, need_hub_library

ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(/(?P<path>[^:]*))?(:(?P<column>.+))?"
)
FORM = "hf://datasets/OWNER/NAME[@REVISION][/PATH][:COLUMN]"
CONVERTED = "refs/convert/parquet"
TIMEOUT = 30.0  # seconds, for answers without data
MAX_FILE_BYTES = 16 << 30  # of one file, which is fetched whole


@dataclass(frozen=True)
class Address:
    repo: str
    revision: str | None
    path: str  # "" for all of it
    column: str | None


def parse_address(text: str) -> Address:
    """UsageError for what is none."""
    found = ADDRESS.fullmatch(text)
    if found is None or not is_repository(found["repo"]):
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
    need_hub_library(f"-c {text}")
    commit, names = _files(address, address.revision)
    chosen, notes = _chosen(address, names, text)
    if not chosen and address.revision is None:
        with suppress(CalibrationError):
            commit, names = _files(address, CONVERTED)
            chosen, notes = _chosen(address, names, text)
    if not chosen:
        raise CalibrationError(
            f"-c {text}: the data set has no file that is read (Parquet, Arrow, JSON lines, JSON, text, CSV)",
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
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if size > MAX_FILE_BYTES:
        hint = f"name another file: {FORM}"
        raise CalibrationError(f"data set {address.repo}: {name} has {size >> 30} GiB, too much for calibration", hint)
    disable_progress_bars()
    with _typed(address, f"fetching {name}"):
        return Path(hf_hub_download(address.repo, name, repo_type="dataset", revision=commit, etag_timeout=TIMEOUT))


def _typed(address: Address, doing: str) -> AbstractContextManager[None]:
    return explained(lambda failed: _error(failed, address, f"data set {address.repo}: {doing}"))


def _error(f: Failure, address: Address, where: str) -> Exl2RayError:
    if f.kind == "offline":
        return HubError(f"{where}: the Hub's tools are offline, and it is not in the cache", "unset HF_HUB_OFFLINE")
    if f.kind == "gated":
        return CalibrationError(f"{where}: its authors have to grant access", "ask for it on its page, then: hf auth login")
    if f.kind == "revision":
        return CalibrationError(f"{where}: there is no revision {address.revision}", "leave out @REVISION for the newest")
    if f.kind == "address":
        return UsageError(f"{where}: {f.says}", f"the address has the form {FORM}")
    if f.kind in ("file", "missing", "refused"):
        hint = "is the name right? if it is private: hf auth login"
        return CalibrationError(f"{where}: not found, or not shown to you ({f.says or f.status})", hint)
    answer = f"answers {f.status}" if f.status else "cannot be reached"
    return HubError(f"{where}: {redacted(endpoint())} {answer}: {f.says}", "is there a network? run the same command again")
