"""What a ``-c`` names: files, and perhaps a column: ``FILE``, ``FILE:COLUMN``, a folder, a pattern like ``data/*.parquet``.

A folder is one data set in pieces: its files, sorted by name, one after the other. Of several kinds of files the first of
``KINDS`` counts, and files of the split "train" where others lie beside them.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from exl2ray.calibration.data.problem import HOW_TO_MAKE_ONE
from exl2ray.errors import CalibrationError, UsageError, unreadable
from exl2ray.formats.hub_names import is_repository

KINDS = {  # file name endings
    "Parquet": (".parquet", ".pq", ".parq"),
    "Arrow": (".arrow", ".feather"),
    "JSON lines": (".jsonl", ".ndjson", ".jsonlines"),
    "JSON": (".json",),
    "text": (".txt", ".text", ".raw", ".tokens"),  # the last two: WikiText
    "CSV": (".csv", ".tsv", ".psv"),
    "Markdown": (".md", ".markdown", ".rst"),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
HUB = "hf://"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)/?(?:(?:tree|viewer)/.*)?")
BUILTIN, WRITTEN = "builtin", "self"  # names of sources that are no files: of what is tuned on
MAX_FILES = 100_000  # looked at in a folder
NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"})
CACHED = ("cache-", "tmp")  # what `datasets` keeps beside its data, for itself
_ENDINGS = (*(end for ends in KINDS.values() for end in ends), *COMPRESSED)
_TRAIN, _OTHER = (re.compile(rf"(^|[^a-z])({names})([^a-z]|$)") for names in ("train", "test|valid|validation|val|dev|eval"))


def from_anywhere(place: str) -> str:
    """A place of text, FILE or FILE:COLUMN, builtin, self:COUNT or an address, as it is called from every folder."""
    return place if "://" in place or place.partition(":")[0] in (BUILTIN, WRITTEN) else os.path.abspath(place)


@dataclass(frozen=True)
class DataFile:
    """One file of a source. ``fetch`` gives its path; what lies on the Hub is downloaded then."""

    name: str  # below the source, for people
    fetch: Callable[[], Path]


@dataclass(frozen=True)
class Source:
    """``given``: as it stands in job.json: absolute. ``notes``: what was left out of a folder, for people."""

    given: str
    name: str
    files: tuple[DataFile, ...]
    column: str | None
    notes: tuple[str, ...] = ()


def kind_by_name(name: str) -> str | None:
    """One of ``KINDS`` as the ending says; "x.json.gz" is JSON."""
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED:
        ending = os.path.splitext(stem)[1]
    return next((kind for kind, endings in KINDS.items() if ending in endings), None)


def split_column(text: str) -> tuple[str, str | None]:
    """(place, column) of a local ``-c``. Paths may hold colons: what exists is a path, else the longest part that does."""
    if is_there(text):
        return text, None
    for i in range(len(text) - 1, 0, -1):
        if text[i] == ":" and is_there(text[:i]):
            if not text[i + 1 :]:
                raise UsageError(f"-c {text}: names no column behind the colon", "leave out the colon, or name a column")
            return text[:i], text[i + 1 :]
    return text, None


def is_there(place: str) -> bool:
    """Whether something stands there, or a pattern matches."""
    try:
        return os.path.lexists(place) or (_is_pattern(place) and any(True for _ in glob.iglob(place, recursive=True)))
    except ValueError:  # a NUL in the name
        return False


def check_place(text: str) -> None:
    """UsageError for a ``-c`` that names nothing, without looking into files."""
    if text.startswith(HUB):
        return
    place, _ = split_column(text)
    if not place or not is_there(place):
        if ADDRESS.match(place):
            page = HUB_PAGE.fullmatch(text)
            hint = f"give {HUB}datasets/{page[1]}" if page else "fetch it and give the file"
            raise UsageError(f"-c {text}: an address; of those {HUB}datasets/... alone is read", hint)
        _check_permission(text, place)
        where = f" (in {os.getcwd()})" if place and not os.path.isabs(place) else ""
        several = [part for part in re.split(r"[,;\s]+", text) if part]
        hint = "give a Parquet, .jsonl, .json, .csv or .txt file, or a folder"
        if len(several) > 1 and all(map(os.path.exists, several)):
            hint = "a place with each -c: " + " ".join(f"-c {part}" for part in several)
        name = place.removeprefix("datasets/")
        if is_repository(name) and not name.lower().endswith(_ENDINGS) and not os.path.isdir(os.path.dirname(place)):
            hint += f"; a data set on the Hub is {HUB}datasets/{name}"
        raise UsageError(f"-c {text}: does not exist{where}", hint)


def _check_permission(text: str, place: str) -> None:
    """UsageError for what may be there, as far as this user may see; so with a column behind it."""
    for i in (len(place), *(i for i, c in enumerate(place) if c == ":")):
        try:
            os.lstat(place[:i])
        except PermissionError as e:
            raise unreadable(UsageError, f"-c {text}", e) from e
        except (OSError, ValueError):
            continue


def local_source(text: str) -> Source:
    """The files of a ``-c`` on this machine. Raises UsageError for a place that does not exist, CalibrationError for one
    without data.
    """
    check_place(text)
    place, column = split_column(text)
    notes: tuple[str, ...] = ()
    given = os.path.abspath(place) + (f":{column}" if column is not None else "")
    if not os.path.lexists(place):
        found = sorted(p for p in glob.glob(place, recursive=True) if not os.path.isdir(p))
        if not found:
            raise CalibrationError(f"-c {text}: only folders match", "name files, as in data/*.parquet")
        root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in found]))
        chosen = [Path(os.path.abspath(p)) for p in found]
    elif os.path.isdir(place):
        root = Path(os.path.abspath(place))
        names, notes = choose_files(_files_below(root), f"-c {text}")
        chosen = [root / name for name in names]
    else:
        chosen = [Path(os.path.abspath(place))]
        root = chosen[0].parent
    files = tuple(DataFile(os.path.relpath(p, root), lambda p=p: p) for p in map(_regular, chosen))  # type: ignore[misc]
    return Source(given, os.path.basename(os.path.abspath(place)) or place, files, column, notes)


def choose_files(names: Iterable[str], what: str) -> tuple[list[str], tuple[str, ...]]:
    """Of the files of a folder those that are its data, sorted, and notes. Raises CalibrationError if there are none."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        kind = kind_by_name(name)
        base = os.path.basename(name).lower()
        if kind is not None and base not in NOT_DATA and not (kind == "Arrow" and base.startswith(CACHED)):
            by_kind.setdefault(kind, []).append(name)
    kind = next((k for k in KINDS if k in by_kind), None)
    if kind is None:
        endings = ", ".join(e for endings in KINDS.values() for e in endings)
        raise CalibrationError(f"{what}: holds no file of calibration text ({endings})", HOW_TO_MAKE_ONE)
    found = sorted(by_kind[kind])
    train = [n for n in found if _TRAIN.search(n.lower())]
    others = [n for n in found if n not in set(train) and _OTHER.search(n.lower())] if train else []
    kept = [n for n in found if n not in set(others)]
    notes = (f"{what}: {len(others)} files of other splits than train are left out",) if others else ()
    return kept, notes


def _files_below(root: Path) -> Iterator[str]:
    """Names relative to ``root`` of files below it, hidden ones left out. Links to folders are not followed."""
    count = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            count += 1
            if count > MAX_FILES:
                raise CalibrationError(f"-c {root}: more than {MAX_FILES} files", "name those to take, as in data/*.parquet")
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def _regular(path: Path) -> Path:
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        raise unreadable(CalibrationError, f"-c {path}", e, "give a file that can be read") from e
    if not stat.S_ISREG(mode):
        what = "a FIFO" if stat.S_ISFIFO(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or socket"
        raise CalibrationError(f"-c {path}: {what}, not a regular file", "write the data to a file first")
    return path


def _is_pattern(place: str) -> bool:
    return any(c in place for c in "*?[")
