"""Paths as they are given, before anything is looked at: what cannot be one, or was meant to be another one.

Who may write where is in `exl2ray.output.targets`.
"""

from __future__ import annotations

import os
import re
import shlex

from exl2ray.errors import UsageError
from exl2ray.wording import shown

NAME_BYTES, PATH_BYTES = 255, 4095  # of Linux; other systems have less room for paths, none has more for names
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def refuse_address(flag: str, path: str) -> None:
    """Raises UsageError for an address of a store in the place of what is written on this machine: it would become a folder
    called ``s3:``, which is gone with the machine."""
    if "://" in path:
        hint = "give a path; a work directory may be an address, and `exl2ray publish` uploads models to the Hub"
        raise UsageError(f"{flag} {path}: an address, where a path is needed", hint)


def refuse_unfit(flag: str, path: str) -> None:
    """Raises UsageError for a path that no file system takes."""
    try:
        why = "" if "://" in path else too_long(path)
    except UnicodeEncodeError:
        raise UsageError(f"{flag} {shown(path)}: holds half a character, as no path does", "type it anew") from None
    if "\0" in path:
        raise UsageError(f"{flag} {shown(path)}: holds a zero byte, as no path does", "give it without")
    if why:
        raise UsageError(f"{flag} {path[:60]}...: {why}", "give a shorter one")


def refuse_unexpanded(flag: str, path: str) -> None:
    """Raises UsageError for a path that a shell would have made another one of: it would be a folder called ``~``, ``$HOME``
    or ``C:\\x``. What is there under such a name is taken as it is."""
    if "://" in path or os.path.lexists(path.partition("/")[0] or path):
        return
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded != path:
        hint = f"the shell leaves ~ and variables as they are within quotes and after '=': give {shlex.quote(expanded)}"
        raise UsageError(f"{flag} {path}: does not exist as it stands, with a ~ or a variable in it", hint)
    if os.sep == "/" and _WINDOWS.match(path):
        inside = path[2:].replace("\\", "/")
        raise UsageError(f"{flag} {path}: a path of Windows", f"in WSL give {shlex.quote(f'/mnt/{path[0].lower()}{inside}')}")


def refuse_unknown_fields(flag: str, path: str) -> None:
    """Raises UsageError for a ``{name}`` that a bitrate has nothing for: it would stand in the folder's name as it is. What
    is there under such a name is taken."""
    unknown = [name for name in re.findall(r"\{([^{}/]*)\}", path) if name not in ("bpw", "head")]
    if unknown and not os.path.lexists(path):
        raise UsageError(f"{flag} {path}: {{{unknown[0]}}} stands for nothing", "as in -cf out/{bpw}-h{head}")


def too_long(path: str) -> str:
    """Why no file system takes this path, in words; empty if one may."""
    raw = os.fsencode(path)
    longest = max(map(len, raw.split(b"/")))
    if longest > NAME_BYTES:
        return f"a name in it has {longest} bytes; file systems take {NAME_BYTES}"
    return f"has {len(raw)} bytes; paths have at most {PATH_BYTES}" if len(raw) > PATH_BYTES else ""
