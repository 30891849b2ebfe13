"""The command line of ExLlamaV2's convert.py (0.3.2), as its ``--help`` lists it, and what its flags come to here.

Its flags are the short ones of the recipe, and four that have no meaning here. Command lines that people keep in scripts work
as they are, spelled in every way that argparse takes: ``--in_dir``, ``--bits=4``, ``-b=4``, ``-b4``,
``--bit 4``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from exl2ray.recipe import SETTINGS

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class ReferenceFlag:
    """``field``: of ``Recipe``; None for a flag that has no meaning here, and says ``note`` when it is given."""

    short: str
    long: str
    field: str | None
    note: str = ""
    type: click.ParamType[Any] | None = None  # of the value of one without a field; None: it takes none

    @property
    def name(self) -> str:
        """The name of the parameter in click."""
        return self.long.removeprefix("--")


REFERENCE_FLAGS = (
    *(ReferenceFlag(s.flag, f"--{name}", name) for name, s in SETTINGS.items() if not s.flag.startswith("--")),
    ReferenceFlag("-res", "--resume", None, "-res: a job is resumed without it where there is one; -nr starts over"),
    ReferenceFlag("-so", "--status_output", None, "-so: there are no such lines here; --json has the progress for programs"),
    ReferenceFlag(
        "-hsol", "--hidden_state_offload_layers", None,
        "-hsol: not needed; hidden states stay on the GPU as far as its memory goes", click.IntRange(min=0),
    ),
    ReferenceFlag("-fst", "--fast_safetensors", None, "-fst: does nothing, as in convert.py 0.3.2"),
)  # fmt: skip


def dashes(name: str) -> str:
    """``token_normalize_func`` of the commands: ``--in_dir``, as the reference spells it, means ``--in-dir``."""
    return name.replace("_", "-")


def reference_flags(function: F) -> F:
    """Decorator: the flags of convert.py that have no meaning here, not shown by ``--help``."""
    for flag in REFERENCE_FLAGS:
        if flag.field is None:
            long = dashes(flag.long)
            kind: dict[str, Any] = {"is_flag": True} if flag.type is None else {"type": flag.type}
            function = click.option(flag.name, flag.short, long, hidden=True, expose_value=False, **kind)(function)
    return function


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether the command line itself has this parameter; a default does not count."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def reference_notes(ctx: click.Context) -> list[str]:
    """What is to be said of flags without a meaning that this command line has."""
    return [flag.note for flag in REFERENCE_FLAGS if flag.note and is_given(ctx, flag.name)]


def flag_of(params: Iterable[click.Parameter], name: str) -> str:
    """The first spelling of a parameter."""
    return next(p.opts[0] for p in params if p.name == name)


def spelled_out(args: Sequence[str], params: Iterable[click.Parameter]) -> list[str]:
    """A command line as click reads it, from one that argparse would read.

    A beginning of a long name stands for that name if convert.py has one such name, whatever else this command has; ``-b=4``
    is ``-b 4``. Values, and what follows ``--``, are left alone.
    """
    options = {spelling: p for p in params if isinstance(p, click.Option) for spelling in (*p.opts, *p.secondary_opts)}
    out: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*out, word, *rest]
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = dashes(name)
            name = name if name in options else _completed(name, options)
        short = name if name in options else word[:2]
        option = options.get(short)
        if word.startswith("-") and option is not None and not option.is_flag and not option.count:
            if equals and name == short and not name.startswith("--"):
                out += [name, value]
                continue
            if word == short or (name == short and not equals):  # its value is the next word, whatever it looks like
                out += [name, *rest[:1]]
                rest = rest[1:]
                continue
        out.append(name + equals + value if word.startswith("--") else word)
    return out


def _completed(name: str, options: Iterable[str]) -> str:
    known = {dashes(flag.long) for flag in REFERENCE_FLAGS}
    longer = {o for o in options if o.startswith(name) and o in known} if len(name) > 2 else set()
    return longer.pop() if len(longer) == 1 else name
