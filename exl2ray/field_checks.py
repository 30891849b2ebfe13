"""Values of settings against the types that the fields of `exl2ray.recipe.Recipe` are declared with: a job.json may hold
anything, and so may what a program gives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from exl2ray.errors import UsageError

NAME_BYTES, PATH_BYTES = 255, 4095  # of Linux; other systems have less room for paths, none has more for names
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def check_fields(settings: Any, hints: Mapping[str, Any]) -> None:
    """UsageError for a field of a recipe that has another type than its hint, or a path that no system takes."""
    for name, hint in hints.items():
        value = getattr(settings, name)
        if not fits(value, hint):
            raise UsageError(f"{name} is {shown(value)}; {wanted(hint)} is needed")
    for flag, path in (("-i", settings.in_dir), ("-o", settings.out_dir), ("-cf", settings.compile_full)):
        why = too_long(path) if path and "://" not in path else ""
        if why:
            raise UsageError(f"{flag} {path[:60]}...: {why}", "give a shorter one")


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type ``hint``; whole numbers are numbers, true and false are not."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in arguments)
    if kind is Literal:
        return isinstance(value, str)  # which of them, is checked where they are listed
    if kind is tuple:
        return isinstance(value, tuple) and all(fits(v, arguments[0]) for v in value)
    if isinstance(value, bool):
        return bool(hint is bool)
    if hint is int:  # flags of the reference are written as 8.0, too
        return isinstance(value, (int, float)) and -(1 << 63) < value < 1 << 63 and value == int(value)
    return isinstance(value, (int, float) if hint is float else hint)


def wanted(hint: Any) -> str:
    """The type in words."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(wanted(part) for part in arguments)
    if kind is tuple:
        return f"a list of which every entry is {wanted(arguments[0])}"
    return "a text" if kind is Literal else _WORDS[hint]


def too_long(path: str) -> str:
    """Why no file system takes this path, in words; empty if one may."""
    raw = os.fsencode(path)
    longest = max(map(len, raw.split(b"/")))
    if longest > NAME_BYTES:
        return f"a name in it has {longest} bytes; file systems take {NAME_BYTES}"
    return f"has {len(raw)} bytes; paths have at most {PATH_BYTES}" if len(raw) > PATH_BYTES else ""


def shown(value: Any) -> str:
    """A value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
