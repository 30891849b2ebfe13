"""The directory that a conversion writes its model into (``-cf``): what may lie there, who may write, in which order.

* Only an empty directory is taken, or one whose files exl2ray wrote for the same source (``claim.py``).
* One conversion at a time: a lock of the kernel on a file, held from the start of the conversion to its end. Where the file
  system has none (some network mounts), the claim alone decides: it names the work directory before the first file is
  written, and is looked at again before the model is complete.
* config.json goes first and comes last. Without it nothing takes a directory for a model, so at any moment there is the old
  model, the new one, or none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from exl2ray import beneath
from exl2ray.errors import StoreError, UsageError
from exl2ray.formats.claim import CLAIM, LOCK, Claim, existing_shards, present, read_claim, write_claim
from exl2ray.formats.files import write_error
from exl2ray.formats.shards import LEFTOVER_NAME, OUTPUT_NAME
from exl2ray.formats.side_files import side_files

CONFIG, CARD = "config.json", "README.md"
INDEX_NAME = re.compile(r".*\.(safetensors|bin)\.index\.json", re.IGNORECASE)
# What version control, file managers and file systems leave in a directory: no part of any model.
HARMLESS = re.compile(
    r"\.gitattributes|\.gitignore|\.git|\.cache|\.DS_Store|\._.*|\.nfs.*|Thumbs\.db|desktop\.ini|lost\+found"
)
_ATTEMPTS = 20


@dataclass(frozen=True)
class Owner:
    """Who wants to write. source: fingerprint of the model. in_dir: where it is. job, work: identity and place of the work
    directory; "" for one that is yet to be made. own: files and folders of this conversion that may lie in the target.
    files: names that it writes beside those of the source. flag: that names the target, for messages.
    """

    source: str
    in_dir: str
    job: str = ""
    work: str = ""
    own: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    flag: str = "-cf"

    def written(self) -> set[str]:
        """Names that a conversion writes besides shards."""
        try:
            copied = side_files(self.in_dir)
            return {CONFIG, CARD, *copied, *(n.partition("/")[0] for n in copied), *self.files}
        except OSError as e:
            raise StoreError(f"{self.in_dir}: cannot be read: {e.strerror or e}", "is the disk still mounted?") from e


# ---- what may lie there ---------------------------------------------------------------------------------------------


def check_target(directory: Path, owner: Owner) -> None:
    """UsageError unless ``directory`` is missing, empty, or what it holds was written by exl2ray for this conversion or for
    an earlier one of the same source that is complete. StoreError for a link in the place of a file, or of the directory.
    """
    try:
        root = beneath.resolved(directory)
        with beneath.folder(root, listed=True) as handle:
            found = beneath.listed(handle, "")
    except FileNotFoundError:
        return
    except OSError as e:
        raise StoreError(f"{owner.flag} {directory}: cannot be read: {e.strerror or e}", "choose another directory") from e
    names = [n for n in (*found.files, *found.folders, *found.others) if not _is_ours_or_harmless(n)]
    names = sorted(set(names) - _own_names(root, owner), key=lambda n: (OUTPUT_NAME.fullmatch(n) is None, n))
    writes = owner.written()
    for name in found.others:
        if name in writes or name in (CLAIM, LOCK) or OUTPUT_NAME.fullmatch(name):
            with suppress(FileNotFoundError):
                raise beneath.refused(directory / name, os.lstat(directory / name).st_mode)
    claim = read_claim(directory)
    if not names or (claim is not None and _is_allowed(claim, owner)):
        names = [] if claim is None else [n for n in names if _is_foreign(n, claim, writes)]
    if names:
        raise _foreign(directory, names, claim, owner)


def _is_ours_or_harmless(name: str) -> bool:
    return name in (CLAIM, LOCK) or bool(LEFTOVER_NAME.fullmatch(name) or HARMLESS.fullmatch(name))


def _own_names(root: str, owner: Owner) -> set[str]:
    """Names in ``root`` on the way to the work directory, or to a file that the command line names."""
    out = set()
    for path in filter(None, (owner.work, *owner.own)):
        if "://" not in path:
            real = Path(os.path.realpath(path))
            if real != Path(root) and real.is_relative_to(root):
                out.add(real.relative_to(root).parts[0])
    return out


def _is_allowed(claim: Claim, owner: Owner) -> bool:
    return claim.source == owner.source and claim.job in ("", owner.job)


def _is_foreign(name: str, claim: Claim, writes: Collection[str]) -> bool:
    """Whether a file of a claimed directory would be read as part of the model, or replaced, and is not ours."""
    if OUTPUT_NAME.fullmatch(name):
        return name not in claim.shards
    return name in writes and claim.files is not None and name not in claim.files


def _foreign(directory: Path, names: list[str], claim: Claim | None, owner: Owner) -> UsageError:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    why, hint = "not written there by exl2ray", "choose another directory, or delete those files if they may go"
    if claim is not None and claim.source != owner.source:
        why = "made from another model, or before this one was changed"
    elif claim is not None and claim.job and claim.job != owner.job:
        why = f"of a model that another work directory has not finished: {claim.work}"
        hint = "choose another directory; or finish that conversion; or delete those files if they may go"
    return UsageError(f"{owner.flag} {directory}: holds {names[0]}, {why}{more}", hint)


# ---- who may write --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetLock:
    """A lock that is held. handle: of the lock file. flag: that names the directory."""

    directory: Path
    handle: int
    flag: str = "-cf"

    def check(self) -> None:
        """StoreError if the directory, or the lock in it, was deleted or replaced since."""
        if not self._is_there():
            raise StoreError(
                f"{self.flag} {self.directory}: was deleted, or is another directory now",
                "run the same command again: nothing has to be computed anew",
            )

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.handle), os.lstat(self.directory / LOCK))
        except OSError:
            return False

    def release(self) -> None:
        if self._is_there():  # unlinked while it is locked: whoever opened it meanwhile sees that it is gone
            with suppress(OSError):
                os.unlink(self.directory / LOCK)
        os.close(self.handle)


@contextmanager
def locked(directory: Path, owner: Owner) -> Iterator[TargetLock]:
    """Keeps other conversions out of ``directory``, which is made if it is missing. Raises StoreError if one is at it, and
    what ``check_target`` raises.
    """
    check_target(directory, owner)
    new = not directory.exists()
    try:
        beneath.make_directories(directory)
        lock = _lock(directory, owner.flag)
    except OSError as e:
        raise write_error(directory, e) from e
    try:
        check_target(directory, owner)  # another one may have finished in between
        _sweep(directory)
        yield lock
    finally:
        lock.release()
        if new:
            with suppress(OSError):  # unless something was written
                os.rmdir(directory)


def _sweep(directory: Path) -> None:
    """Removes the temporary files of runs that were killed."""
    try:
        for name in filter(LEFTOVER_NAME.fullmatch, os.listdir(directory)):
            (directory / name).unlink(missing_ok=True)
    except OSError as e:
        raise write_error(directory, e) from e


def _lock(directory: Path, flag: str) -> TargetLock:
    path = directory / LOCK
    for _ in range(_ATTEMPTS):
        os.close(beneath.open_file(None, path, path, os.O_RDWR | os.O_CREAT))
        handle, got = beneath.open_locked(lambda flags: beneath.open_file(None, path, path, flags))
        lock = TargetLock(directory, handle, flag)
        if got is not None and lock._is_there():
            return lock
        os.close(handle)
        if got is None:
            break
    raise StoreError(
        f"{flag} {directory}: another conversion is writing there",
        "wait for it, or choose another directory: two models cannot share one",
    )


def claim_target(directory: Path, owner: Owner, shards: Iterable[str]) -> None:
    """Says that ``owner`` writes ``shards`` and the other files of a model there. Raises as ``check_target``."""
    check_target(directory, owner)
    before = read_claim(directory) or Claim(owner.source)
    shards = {*shards, *present(directory, before.shards)}
    files = {*owner.written(), *present(directory, before.files or ())}
    write_claim(directory, Claim(owner.source, tuple(sorted(shards)), tuple(sorted(files)), owner.job, owner.work))


def check_claim(directory: Path, owner: Owner) -> None:
    """StoreError if another work directory has taken the target meanwhile: its lock was of no use, or was deleted."""
    claim = read_claim(directory)
    if claim is None or (claim.source, claim.job) != (owner.source, owner.job):
        raise StoreError(
            f"{owner.flag} {directory}: another conversion has written there meanwhile",
            f"run the same command again with another {owner.flag}; nothing has to be computed anew",
        )


def release_target(directory: Path) -> None:
    """Says that the model is complete: from now on another conversion of the same source may take its place."""
    claim = read_claim(directory)
    if claim is not None and claim.job:
        files = None if claim.files is None else tuple(sorted(present(directory, claim.files)))
        shards = tuple(existing_shards(directory))
        write_claim(directory, replace(claim, shards=shards, files=files, job="", work=""))


# ---- in which order -------------------------------------------------------------------------------------------------


def withdraw(directory: Path) -> None:
    """Removes config.json, and indexes of shards, so that it lasts: what follows makes the directory no model for a while.

    Raises StoreError.
    """
    try:
        indexes = [n for n in os.listdir(directory) if INDEX_NAME.fullmatch(n)]
        removed = present(directory, [CONFIG, *indexes])
        for name in removed:
            os.unlink(directory / name)
        if removed:
            beneath.fsync_directory(directory)
    except OSError as e:
        raise write_error(directory, e) from e
