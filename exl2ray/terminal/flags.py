"""The flags of a conversion: every field of ``Recipe`` is one, with what `exl2ray.recipe` says of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Container, Iterable
from dataclasses import MISSING
from typing import Any, TypeVar, get_origin

import click
from click.core import ParameterSource

from exl2ray.errors import StoreError, UsageError, not_permitted, unreadable
from exl2ray.given_paths import refuse_address, refuse_unexpanded, refuse_unfit
from exl2ray.recipe import RUN, SECTIONS, SETTINGS, Recipe
from exl2ray.recipe_fields import fits, wanted
from exl2ray.remote.address import is_remote, parse
from exl2ray.terminal.pasted import missing_folder, refuse_read_address
from exl2ray.terminal.reference_flags import flag_of, is_given, reference_notes, spelled_out
from exl2ray.wording import shown

F = TypeVar("F", bound=Callable[..., Any])

# `measure` takes all flags, so that it can be given the command line of a conversion; these mean nothing to it. (Nor do -r
# and -l, but rows to quantise are set aside too.)
CONVERT_ONLY = tuple(name for name, s in SETTINGS.items() if not s.measured)
MEASURE_FIELDS = tuple(name for name, s in SETTINGS.items() if s.measured)
REMEMBERED = f"{__name__}.remembered"  # in the context: the flags that a resume takes from its job, and nothing made shows
PLACES = frozenset({"DIR", "FILE", "MODEL", "OUT", "PATH", "PLACE", "WORKDIR"})  # metavars of paths
WRITTEN_HERE = frozenset({"compile_full", "output_measurement", "output", "positions", "plot"})  # parameters, of all commands


def trust_flag(function: F) -> F:
    """Decorator: --trust-work-dir, of the commands that go on with a job."""
    text = "go on with -o alone although others can write in the work directory, and so in its job"
    return click.option("--trust-work-dir", is_flag=True, help=text)(function)


def recipe_flags(
    names: Iterable[str] = tuple(SETTINGS), required: Iterable[str] = ("out_dir",), ignored: bool = False
) -> Callable[[F], F]:
    """Decorator: the flags of these fields of ``Recipe``, in this order, with its defaults.

    Flags that are ``ignored`` are taken, and neither shown by --help nor handed on.
    """
    needed = frozenset(required)
    silent: dict[str, Any] = {"hidden": True, "expose_value": False} if ignored else {}
    options = [click.option(*_names(name), required=name in needed, **_attributes(name), **silent) for name in names]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def read_overrides(ctx: click.Context, _: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """--set, as it was given. Raises UsageError for what no model could have; whether a pattern matches, its model says."""
    from exl2ray.allocation.overrides import parse_override

    for text in texts:
        parse_override(text)
    return texts


def _names(name: str) -> tuple[str, ...]:
    s = SETTINGS[name]
    return (name, *dict.fromkeys([s.flag, s.long])) if not s.negative else (name, f"{s.flag}/{s.negative}")


def _attributes(name: str) -> dict[str, Any]:
    s = SETTINGS[name]
    out: dict[str, Any] = {"help": s.help} if s.default is MISSING else {"help": s.help, "default": s.default}
    if s.hint is bool:
        return {**out, "is_flag": True, "show_default": bool(s.negative)}
    out["show_default"] = out.get("default") is not None
    if s.choices:
        return {**out, "type": click.Choice(s.choices)}
    kinds = s.types
    several = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    if several is None:
        return {**out, "type": kinds[0], "metavar": s.metavar}
    if len(kinds) > 1:  # one, several or none
        out["default"] = ()
    if name == "overrides":
        out["callback"] = read_overrides
    return {**out, "type": several.__args__[0], "multiple": True, "metavar": s.metavar}


class CheckedCommand(click.Command):
    """A command that takes no path that cannot be one: empty text would be the current directory, and an address a folder
    called s3: in it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        flags = {flag for param in self.get_params(ctx) for flag in (*param.opts, *param.secondary_opts) if flag[0] == "-"}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option):
                _refuse_flag(param.opts[0], ctx.params.get(param.name or ""), flags)
            if (param.metavar or "").strip("[.]") in PLACES:
                name = param.opts[0] if isinstance(param, click.Option) else param.metavar
                value = ctx.params.get(param.name or "")
                for path in value if isinstance(value, tuple) else (value,):
                    _check_path(str(name), path)
            if param.name in WRITTEN_HERE and (path := ctx.params.get(param.name)):
                refuse_address(param.opts[0], path)
            elif _is_read_here(param):
                values = ctx.params.get(param.name or "") or ()
                for path in values if isinstance(values, tuple) else (values,):
                    refuse_read_address(param.opts[0] if isinstance(param, click.Option) else "", path)
        return rest


def _refuse_flag(name: str, value: object, flags: Container[str]) -> None:
    """Raises UsageError for a flag in the place of another one's value: ``-cf --dry-run`` would convert, into a folder of
    that name."""
    for given in value if isinstance(value, tuple) else (value,):
        if isinstance(given, str) and given in flags:
            hint = f"is a variable of the shell not set? A file or folder of this name is ./{given}"
            raise UsageError(f"{name} {given}: a flag, where the value of {name} is needed", hint)


def _is_read_here(param: click.Parameter) -> bool:
    """Whether a parameter names what lies on this machine: a file, or a folder other than of a job."""
    metavar = (param.metavar or "").strip("[.]")
    return metavar == "FILE" or (metavar == "DIR" and isinstance(param, click.Argument))


def _check_path(name: str, path: str | None) -> None:
    if path == "":
        raise UsageError(f"{name} is empty", "is a variable of the shell not set?")
    if path == "-" and name != "--prompts":
        raise UsageError(f"{name} -: neither standard input nor output can be given here", "a file called - is ./-")
    if path:
        refuse_unfit(name, path)
        refuse_unexpanded(name, path)


class SectionedCommand(CheckedCommand):
    """A command whose help lists the flags of the recipe by topic, and that reads command lines of convert.py."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spelled_out(args, self.get_params(ctx)))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {p.name or "": p.get_help_record(ctx) for p in self.get_params(ctx)}
        by_section = {title: [n for n, s in SETTINGS.items() if s.section == title] for title in SECTIONS}
        for title, names in {**by_section, "Other": [n for n in records if n not in SETTINGS]}.items():
            listed = [record for name in names if (record := records.get(name)) is not None]
            if listed:
                with formatter.section(title):
                    formatter.write_dl(listed)


def notes_from(ctx: click.Context) -> list[str]:
    """What is to be said of flags that a command takes and does not use, and of those that a resume takes from its job; after
    `recipe_from`.
    """
    unused = [flag_of(ctx.command.params, name) for name in CONVERT_ONLY if name not in ctx.params and is_given(ctx, name)]
    said = [f"{', '.join(unused)}: nothing that is measured depends on it; give it to convert"] if unused else []
    remembered = ctx.meta.get(REMEMBERED)
    said += [f"from the job, as it was run before: {' '.join(remembered)}"] if remembered else []
    return [*reference_notes(ctx), *said]


def _spelled(name: str, value: Any) -> str:
    """A field as a command line has it."""
    about = SETTINGS[name]
    shown_value = f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))
    return about.flag if value is True else f"{about.flag} {shown_value}"


def recipe_from(ctx: click.Context, **otherwise: Any) -> Recipe:
    """The recipe that a command line asks for; ``otherwise``: fields of it that would be None.

    Without -i this is a resume: what the command line does not give is taken from the job of the work directory. Raises
    UsageError naming the flag, StoreError for an unusable work directory.
    """
    values = {name: ctx.params[name] for name in SETTINGS if name in ctx.params}
    if values["in_dir"] is None:
        given = {n for n in values if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
        stored = stored_settings(values["out_dir"], given, trust=bool(ctx.params.get("trust_work_dir")))
        values.update({n: v for n, v in stored.items() if n not in given})
        if "score_rows" not in given and {"allocation", "quality"} & given:  # of the choice that was another one
            values["score_rows"] = None
        kept = [n for n, s in SETTINGS.items() if s.kept and n in stored and n not in given and values[n] is not None]
        ctx.meta[REMEMBERED] = [_spelled(n, values[n]) for n in kept]
    values.update({n: v for n, v in otherwise.items() if values.get(n) is None})
    recipe = Recipe(**values)
    check_files(recipe)
    return recipe


def stored_settings(root: str, given: Iterable[str] = (), trust: bool = False) -> dict[str, Any]:
    """Fields of ``Recipe`` as the job in ``root`` has them; those in ``given`` need not be known from it.

    Raises UsageError if there is no such job, StoreError for a damaged one, or, unless ``trust`` is given, for one that
    somebody else can have written.
    """
    from exl2ray.store.trust import refuse_others
    from exl2ray.store.workdir import WorkDir

    stored = WorkDir.read_job(root)
    if stored is None:
        raise UsageError(
            f"-i is missing, and {root} holds no job to resume",
            "-i MODEL -o WORKDIR starts a conversion; a resume needs only -o",
        )
    if not trust:
        refuse_others(root)
    job, out = stored.job, {}
    for name, s in SETTINGS.items():
        for entry in s.job[:1]:
            section, _, key = entry.partition(".")
            value = job[section].get(key)
            if value is None:
                continue
            out[name] = _sound(root, entry, value, s.hint)
    out.update(_kept(root, job["output"].get(RUN, {}), given))
    if "in_dir" not in out:
        raise UsageError(f"-i is missing, and the job in {root} does not say where its model is", "name it with -i")
    own_data = job["measure"].get("cal_dataset") or job["quantize"].get("cal_dataset")
    if own_data and "cal_dataset" not in given:
        place = job["identity"].get("cal_dataset")
        if not place:
            raise UsageError(f"the job in {root} uses calibration data of its own", "name the file again with -c")
        out["cal_dataset"] = tuple(place) if isinstance(place, list) else place
    return out


def _kept(root: str, run: Any, given: Iterable[str]) -> dict[str, Any]:
    """What a job remembers of how it was begun, although nothing that it makes depends on that."""
    entries = _sound(root, f"output.{RUN}", run, dict).items()
    names = {name for name, s in SETTINGS.items() if s.kept}
    out = {n: _sound(root, f"output.{RUN}.{n}", value, SETTINGS[n].hint) for n, value in entries if n in names}
    if set(CONVERT_ONLY) & set(given):  # the measurement is done, and somebody goes on with it
        out.pop("output_measurement", None)
    if os.environ.get("RAY_ADDRESS"):  # says where Ray is now
        out.pop("ray_address", None)
    return out


def _sound(root: str, entry: str, value: Any, hint: Any) -> Any:
    """A value of a job, lists as tuples. Raises StoreError for one of another type."""
    value = tuple(value) if isinstance(value, list) else value
    if not fits(value, hint):
        raise StoreError(
            f"{root}: the job's {entry} is {shown(value)}; {'a mapping' if hint is dict else wanted(hint)} is needed",
            "job.json is damaged: restore it, or start anew with -nr",
        )
    return value


def check_files(recipe: Recipe) -> None:
    """UsageError naming the flag for a path that should exist and does not."""
    if is_remote(recipe.in_dir):
        parse(recipe.in_dir)
    elif not os.path.exists(recipe.in_dir):  # what is there is looked at by the checks of a conversion
        raise missing_folder(recipe.in_dir)
    for place in recipe.calibration_data:
        from exl2ray.calibration.data.sources import check_place

        check_place(place)
    path = recipe.measurement
    if path is not None and not os.path.isfile(path):
        denied = not_permitted(path)
        if denied is not None:
            raise unreadable(UsageError, f"-m {path}", denied) from denied
        what = "is a directory" if os.path.isdir(path) else "is no file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"-m {path}: {what}", "give a measurement.json")
