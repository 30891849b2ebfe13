"""What is known of a field of a recipe beside its default: how it is spelled, explained, checked and stored.

`exl2ray.recipe` says so for each field, with `setting`. Values are checked against the types that the fields are declared
with, since a job.json may hold anything, and so may what a program gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from exl2ray.errors import UsageError
from exl2ray.wording import shown

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
Rule = tuple[Callable[[Any], bool], str]  # whether a value will do; what is said of one that will not


@dataclass(frozen=True)
class Setting:
    """One field of ``Recipe``, as the command line and job.json know it."""

    flag: str  # the shortest spelling: "-b", "--seed", "--chat-rows"
    help: str
    section: str
    metavar: str | None
    rule: Rule | None
    job: tuple[str, ...]  # entries of job.json, as "section.name", that hold the value; a resume reads the first
    decides: tuple[str, ...]  # entries that follow from the value, with others perhaps
    measured: bool  # whether something that is measured depends on it
    negative: str  # the flag that turns it off, "" for none
    kept: bool = False  # nothing that is made depends on it, and a resume takes it from the job all the same
    name: str = ""
    hint: Any = None  # its type
    default: Any = None  # dataclasses.MISSING if it has to be given

    @property
    def long(self) -> str:
        """The long spelling of the flag."""
        return self.flag if self.flag.startswith("--") else f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal, or of a Literal or None; empty for other types."""
        return next((get_args(part) for part in (self.hint, *get_args(self.hint)) if get_origin(part) is Literal), ())

    @property
    def types(self) -> tuple[Any, ...]:
        """The types that a value may have, None left out."""
        parts = (self.hint,) if get_origin(self.hint) in (tuple, Literal) else get_args(self.hint) or (self.hint,)
        return tuple(part for part in parts if part is not NoneType)

    def check(self, value: Any) -> None:
        """UsageError that names the flag for a value of another type, or one that breaks the rule."""
        if not fits(value, self.hint):
            beyond = " of at most 64 bits" if isinstance(value, int) and self.hint is int else ""
            raise UsageError(f"{self.flag}: {self.name} is {shown(value)}; {wanted(self.hint)}{beyond} is needed")
        if self.choices and value not in (*self.choices, self.default):
            raise UsageError(f"{self.flag} {value}: one of {', '.join(self.choices)} is needed")
        for one in value if isinstance(value, tuple) else (value,):
            if self.rule is not None and one is not None and not self.rule[0](one):
                what, _, hint = self.rule[1].partition("; ")
                raise UsageError(f"{self.flag} {one:g}: {what}", hint)


def setting(
    flag: str, help: str, section: str, metavar: str | None = None, rule: Rule | None = None, job: str = "",
    decides: str = "", measured: bool = True, kept: bool = False,
) -> Mapping[str, Setting]:  # fmt: skip
    """Metadata of a field of ``Recipe``; see `Setting`. ``job`` and ``decides`` are lists with spaces between."""
    flag, _, negative = flag.partition("/")
    about = Setting(flag, help, section, metavar, rule, tuple(job.split()), tuple(decides.split()), measured, negative, kept)
    return {"setting": about}


def settings_of(recipe: type) -> dict[str, Setting]:
    """The settings of a dataclass of which every field has one, by name and in order."""
    hints = get_type_hints(recipe)
    about = {f.name: {**vars(f.metadata["setting"]), "default": f.default} for f in fields(recipe)}
    return {name: Setting(**{**given, "name": name, "hint": hints[name]}) for name, given in about.items()}


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
    """A type in words, as in "a whole number or null" and "a list of which every entry is a text"."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(wanted(part) for part in arguments)
    if kind is tuple:
        return f"a list of which every entry is {wanted(arguments[0])}"
    return "a text" if kind is Literal else _WORDS[hint]
