"""Work directories and what lies in them: what people have written for themselves stays apart from what is a job's own."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from exl2ray.errors import StoreError, UsageError
from exl2ray.formats.regular import open_regular
from exl2ray.store.file_names import is_within_ours
from exl2ray.store.job_file import ID_BYTES, JOB_FILE, is_marked


def refuse_within(flag: str, path: str | Path, work: str = "", allowed: str = "") -> None:
    """UsageError for an output where a work directory keeps what is its own: one would take the other's place, or go with it.

    work: of this job, which need not be there; a folder above that holds a job.json of ours is one, too. allowed: a name in
    ``work`` that is meant.
    """
    real = Path(os.path.realpath(path))
    own = Path(os.path.realpath(work)) if work and "://" not in work else None
    for place in real.parents:
        rel = str(real.relative_to(place))
        if not is_within_ours(rel) or not (place == own or _is_work(place)) or (place == own and rel == allowed):
            continue
        shown = work if place == own else place
        where = f"lies where the work directory {shown} keeps its own {rel.partition(os.sep)[0]}"
        raise UsageError(f"{flag} {path}: {where}", f"a conversion with -nr deletes what lies there: choose another {flag}")


def is_missing(root: str) -> bool:
    """Whether nothing is there; False in an object store, and where this user may not look."""
    try:
        os.lstat(root)
    except OSError as e:
        return isinstance(e, FileNotFoundError) and "://" not in root
    return False


def no_work_directory(root: str, hint: str) -> StoreError:
    """The error for a place without a job, with the work directory that it lies in, if it is a part of one."""
    above = () if "://" in root else Path(os.path.realpath(root)).parents
    work = next(filter(_is_work, above), None)
    why = "does not exist" if is_missing(root) else f"has no {JOB_FILE}"
    what = "a file, not a work directory" if os.path.isfile(root) else f"is not a work directory: it {why}"
    return StoreError(f"{root}: {what}", hint if work is None else f"it is a part of {shlex.quote(str(work))}: give that")


def _is_work(folder: Path) -> bool:
    try:
        with open_regular(folder / JOB_FILE) as f:
            return is_marked(f.read(ID_BYTES))
    except OSError:
        return False
