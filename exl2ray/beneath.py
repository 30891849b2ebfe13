"""Opening files below a directory without ever leaving it.

A work directory, or the target of a conversion, may have been prepared by somebody else. A link in it, to a folder or to a
file, would turn deleting, appending and reading into doing so elsewhere; a named pipe would keep whoever opens it waiting
for ever. So a file is reached step by step: each folder is opened relative to the one before, links are not followed, and
what was opened is looked at before it is used. Somebody who swaps a folder for a link in between gains nothing.

The directory itself may be a link (to a larger disk, say): see ``resolved``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exl2ray.errors import StoreError

FILE_MODE, FOLDER_MODE = 0o664, 0o775  # of what is made, less the umask: never what everybody can write to
MAX_LINKS = 40  # on one path, as the kernel allows
# O_PATH, where there is one: a file server is not asked to open the folder, and a folder that cannot be listed will do.
_THROUGH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class IrregularFileError(StoreError):
    """A link, pipe, socket or device stands where a file or folder of exl2ray belongs."""


def kind_of(mode: int) -> str | None:
    """What stands there instead of a file or folder, in words; None for files and folders."""
    return _KINDS.get(stat.S_IFMT(mode))


def refused(where: str | Path, mode: int) -> IrregularFileError:
    """The error that says what stands at ``where`` in place of a file or folder. ``mode``: as stat has it."""
    return IrregularFileError(
        f"{where} is {kind_of(mode) or 'not a regular file'}: nothing is read, written or deleted through it",
        "look who put it there, then remove it; or give another directory",
    )


@contextmanager
def closing(handle: int) -> Iterator[int]:
    """A descriptor that is closed in the end."""
    try:
        yield handle
    finally:
        os.close(handle)


# ---- the directory itself ---------------------------------------------------------------------------------------------


def resolved(path: str | Path) -> str:
    """Absolute path of a directory that the user names, links resolved once; it need not exist.

    The directory may be a link if this user or root made it in a place where nobody else can put one; links above it are
    the machine's, unless they lie in a folder where everybody may write. Raises StoreError for other links and for one that
    leads nowhere, OSError for what cannot be looked at.
    """
    path = os.path.abspath(path)
    done, todo, links = "/", deque(part for part in path.split("/") if part), 0
    last = path
    while todo:
        part = todo.popleft()
        if part in ("", "."):
            continue
        if part == "..":
            done = os.path.dirname(done)
            continue
        step = os.path.join(done, part)
        try:
            found = os.lstat(step)
        except FileNotFoundError:
            if os.path.islink(path):
                raise StoreError(
                    f"{path} is a link to {os.readlink(path)}, which does not exist",
                    "is the disk mounted that it leads to? else give the directory itself",
                ) from None
            return os.path.normpath(os.path.join(step, *todo))
        if not stat.S_ISLNK(found.st_mode):
            done = step
            continue
        _check_link(step, found, os.stat(done), final=step == last)
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(step)
        if target.startswith("/"):
            done = "/"
        todo.extendleft(reversed(target.split("/")))
    return done


def _check_link(link: str, found: os.stat_result, folder: os.stat_result, final: bool) -> None:
    ours = found.st_uid in (os.geteuid(), 0)
    everybody = bool(folder.st_mode & stat.S_IWOTH)
    kept = bool(folder.st_mode & stat.S_ISVTX) and ours  # nobody else can replace it, as in /tmp
    if everybody and (final or not kept):
        why = "a link in a folder where everybody may write"
    elif final and not ours:
        why = f"a link that user {found.st_uid} made"
    else:
        return
    raise StoreError(f"{link} is {why}", f"if you trust it, give the directory itself: {os.path.realpath(link)}")


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists, as far as this user may see."""
    path = path.absolute()
    while not os.path.exists(path) and path.parent != path:
        path = path.parent
    return path


def make_directories(directory: str | Path) -> None:
    """mkdir -p, with every new directory's entry fsynced in its parent. Raises OSError."""
    directory, missing = Path(directory), []
    while not directory.is_dir():
        missing.append(directory)
        if directory.parent == directory:
            break
        directory = directory.parent
    for new in reversed(missing):
        new.mkdir(FOLDER_MODE, exist_ok=True)
        fsync_directory(new.parent)


# ---- below it -----------------------------------------------------------------------------------------------------------


@contextmanager
def folder(root: str, parts: Sequence[str] = (), create: bool = False, listed: bool = False) -> Iterator[int]:
    """Descriptor of the folder ``parts`` below ``root`` (a result of ``resolved``), to be used as ``dir_fd``.

    ``create``: folders below the root that are missing are made, durably. ``listed``: the descriptor can be listed and
    fsynced.
    Raises IrregularFileError for a link on the way, OSError else.
    """
    handle = _enter(None, root, root, listed and not parts)
    where = root
    try:
        for i, part in enumerate(parts):
            where = f"{where}/{part}"
            if create:
                _make_folder(handle, part)
            below = _enter(handle, part, where, listed and i == len(parts) - 1)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def _enter(above: int | None, name: str, where: str, listed: bool) -> int:
    try:
        return os.open(name, _LISTED if listed else _THROUGH, dir_fd=above)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
            if kind_of(mode):
                raise refused(where, mode) from e
            if not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), where) from e
        raise


def _make_folder(handle: int, name: str) -> None:
    try:
        os.mkdir(name, FOLDER_MODE, dir_fd=handle)
    except FileExistsError:
        return
    with closing(os.open(".", _LISTED, dir_fd=handle)) as listed:
        fsync_handle(listed)


def open_file(handle: int | None, name: str | Path, where: str | Path, flags: int = os.O_RDONLY) -> int:
    """Descriptor of the regular file ``name`` in the folder ``handle``. ``where``: its name for messages.

    Raises IrregularFileError for a link, pipe, socket or device, without opening what is there; OSError else.
    """
    try:
        mode = os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode
        if kind_of(mode):
            raise refused(where, mode)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # for what was put there since
    try:
        opened = os.open(name, flags, FILE_MODE, dir_fd=handle)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENXIO):
            raise refused(where, stat.S_IFLNK if e.errno == errno.ELOOP else stat.S_IFIFO) from e
        raise
    mode = os.fstat(opened).st_mode
    if stat.S_ISREG(mode):
        return opened
    os.close(opened)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(where))
    raise refused(where, mode)


def status(handle: int | None, name: str | Path, where: str | Path) -> os.stat_result:
    """``stat`` of a file or folder; raises IrregularFileError for anything else, OSError if there is nothing."""
    found = os.stat(name, dir_fd=handle, follow_symlinks=False)
    if kind_of(found.st_mode):
        raise refused(where, found.st_mode)
    return found


@dataclass(frozen=True)
class Listing:
    """A folder on the way of ``walk``: its descriptor and its name below the root; names in it by kind, sorted."""

    handle: int
    rel: str
    files: list[str]
    folders: list[str]
    others: list[str]  # links, pipes, sockets, devices

    def path(self, name: str) -> str:
        """The name of an entry relative to the root of the walk."""
        return f"{self.rel}/{name}" if self.rel else name


def walk(root: str, parts: Sequence[str] = ()) -> Iterator[Listing]:
    """All folders at and below ``parts``, deepest first; none if there is nothing. Links are listed, not followed."""
    try:
        with folder(root, parts, listed=True) as handle:
            listing = listed(handle, "/".join(parts))
            for name in listing.folders:
                yield from walk(root, [*parts, name])
            yield listing
    except FileNotFoundError:
        return


def listed(handle: int, rel: str) -> Listing:
    """The names in an open folder, by kind. ``rel``: the folder relative to the root."""
    kinds: dict[str, list[str]] = {"file": [], "folder": [], "other": []}
    with os.scandir(handle) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            kind = "folder" if is_folder else "file" if entry.is_file(follow_symlinks=False) else "other"
            kinds[kind].append(entry.name)
    return Listing(handle, rel, *(sorted(names) for names in kinds.values()))


def reopenable(handle: int, path: Path) -> str:
    """A path that opens just the file of a descriptor, for libraries that take paths; where the system has none, ``path``."""
    link = f"/proc/self/fd/{handle}"
    return link if os.path.exists(link) else str(path)


# ---- room -----------------------------------------------------------------------------------------------------------------


def reserve(handle: int, nbytes: int) -> None:
    """Makes a file ``nbytes`` long with the space for them, as far as the file system can promise it. Raises OSError.

    Not posix_fallocate, which writes every block where a file system has no such call.
    """
    library = ctypes.CDLL(None, use_errno=True)
    allocate = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    code = errno.ENOSYS if allocate is None else errno.EINTR
    while allocate is not None and code == errno.EINTR:
        arguments = (ctypes.c_int(handle), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes))
        code = 0 if allocate(*arguments) == 0 else ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EOPNOTSUPP):
        stats = os.fstatvfs(handle)
        room = stats.f_bavail * stats.f_frsize + 512 * os.fstat(handle).st_blocks
        code = 0 if nbytes <= room else errno.ENOSPC
    if code:
        raise OSError(code, os.strerror(code))
    os.ftruncate(handle, nbytes)


# ---- durability ---------------------------------------------------------------------------------------------------------


def fsync_directory(directory: str | Path) -> None:
    """Makes new, renamed and removed names in a directory durable."""
    with closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as handle:
        fsync_handle(handle)


def fsync_handle(handle: int) -> None:
    """As ``fsync_directory``, for an open directory."""
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE mounts cannot
            raise


def try_flock(handle: int, shared: bool = False) -> bool | None:
    """True: locked now, against all others (``shared``: against who wants that). None: another process has it. False: this
    file system has no flock.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as e:
        if e.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            return False
        raise
    return True


def open_locked(opened: Callable[[int], int]) -> tuple[int, bool | None]:
    """(descriptor, what ``try_flock`` says) of a lock file; ``opened`` opens it with the flags it is given: for reading,
    so that it does not keep a disk from being made read-only; for writing where that is what a lock takes (NFS).
    """
    handle = opened(os.O_RDONLY)
    try:
        return handle, try_flock(handle)
    except OSError as e:
        os.close(handle)
        if e.errno != errno.EBADF:
            raise
    handle = opened(os.O_RDWR)
    return handle, try_flock(handle)
