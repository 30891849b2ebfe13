"""May the job of a work directory be taken at its word?

A resume with -o alone reads from the directory which model to convert, and where to write. Whoever can write there decides
about both, and about every result that is found finished. On one's own disk that is oneself.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat

from exl2ray import beneath
from exl2ray.errors import StoreError
from exl2ray.store.faults import translated
from exl2ray.store.file_names import FOLDERS
from exl2ray.store.job_file import JOB_FILE

FLAG = "--trust-work-dir"


def others_who_write(root: str, groups: bool = True) -> str | None:
    """Why somebody else may have written the job in a work directory, in words; None if nobody can have, if there is none
    yet, or where it is in an object store, which has other means.

    ``groups``: whether a group that may write there counts. Looked at are the directory, job.json and the folders of
    records. Root's are everybody's: root can write anywhere. StoreError for what cannot be looked at.
    """
    if "://" in root and not root.startswith("file://"):
        return None
    root = root.removeprefix("file://")
    if not os.path.isdir(root):  # what is something else is refused by whoever opens it
        return None
    with translated("read", root):
        real = beneath.resolved(root)
        names = ["", JOB_FILE, *FOLDERS]
        with beneath.folder(real) as handle:
            for name in names:
                try:
                    found = beneath.status(handle, name or ".", os.path.join(root, name))
                except (FileNotFoundError, beneath.IrregularFileError):
                    continue  # links are refused, or removed, by whoever opens the directory
                why = _others(found, groups)
                if why:
                    return f"{os.path.join(root, name) if name else root} {why}"
    return None


def refuse_others(root: str) -> None:
    """StoreError unless the job in the work directory ``root`` can only be this user's."""
    why = others_who_write(root)
    if why is not None:
        raise StoreError(
            f"{why}; its job.json says which model to convert and where to write, so with -o alone it is not followed",
            f"give -i, -cf and the other flags again; or {FLAG}, if you trust everybody who can write there",
        )


def _others(found: os.stat_result, groups: bool) -> str | None:
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to {_user(found.st_uid)}"
    if found.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if groups and found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        return f"can be written by the group {_group(found.st_gid)}"
    return None


def _is_private(gid: int) -> bool:
    """Whether a group is this user's alone, as many systems give one to every user; for root, root's own."""
    if gid == 0:
        return _has_only(gid, {"root", _name_of(os.geteuid())})
    if gid != os.getegid() and gid != _primary_group(os.geteuid()):
        return False
    return _has_only(gid, {_name_of(os.geteuid())})


def _has_only(gid: int, users: set[str]) -> bool:
    try:
        group = grp.getgrgid(gid)
    except KeyError:  # a container's: nobody has a name there
        return gid == os.geteuid()
    if gid and group.gr_name not in users:
        return False  # "users", "staff": the primary group of many
    return set(group.gr_mem) <= users


def _primary_group(uid: int) -> int | None:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return None


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _user(uid: int) -> str:
    return f"user {_name_of(uid)}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
