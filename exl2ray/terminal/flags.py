"""The flags of a conversion: every field of ``Recipe`` is one, and the docstring under the field is its help text.

A docstring begins with the flag as the reference spells it: ``-nr: start over`` makes ``-nr`` and ``--no-resume``.
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from exl2ray.errors import StoreError, UsageError
from exl2ray.field_checks import fits, shown, wanted
from exl2ray.recipe import Recipe, choices
from exl2ray.remote.address import is_remote, parse
from exl2ray.terminal.pasted import missing_folder_hint
from exl2ray.terminal.reference_flags import flag_of, is_given, reference_notes, spelled_out

F = TypeVar("F", bound=Callable[..., Any])

RECIPE_FIELDS = tuple(f.name for f in fields(Recipe))
# Flags that mean nothing to `measure`: nothing measured depends on them. (Nor on -r and -l, but rows to quantise are set
# aside too.) It takes them all the same, so that it can be given the command line of a conversion.
CONVERT_ONLY = (
    "bits",
    "head_bits",
    "compile_full",
    "measurement",
    "shard_size",
    "propagate",
    "objective",
    "objective_power",
    "quality",
    "target_correction",
    "scale_search",
    "sweeps",
    "reuse",
)
MEASURE_FIELDS = tuple(name for name in RECIPE_FIELDS if name not in CONVERT_ONLY)
SECTIONS = {  # of the help text
    "Model and files": (
        "in_dir",
        "out_dir",
        "compile_full",
        "measurement",
        "output_measurement",
        "shard_size",
        "no_resume",
        "reuse",
        "rope_scale",
        "rope_alpha",
        "source_cache",
    ),
    "Quantisation": (
        "bits",
        "head_bits",
        "quality",
        "overrides",
        "propagate",
        "allocation",
        "objective",
        "objective_power",
        "target_correction",
        "scale_search",
        "sweeps",
        "damping",
        "rotate",
    ),
    "Calibration": (
        "cal_dataset",
        "dataset_rows",
        "measurement_rows",
        "length",
        "measurement_length",
        "seed",
        "chat_rows",
        "moe_all_experts",
    ),
    "Afterwards": ("evaluate", "eval_text"),
    "Where it runs": ("device", "gpus", "ray_address", "executor", "checkpoint_seconds"),
}
METAVARS = {
    "in_dir": "MODEL",
    "out_dir": "DIR",
    "compile_full": "DIR",
    "cal_dataset": "PLACE",
    "eval_text": "FILE",
    "overrides": "PATTERN=BITS",
    "measurement": "FILE",
    "output_measurement": "PATH",
    "source_cache": "SIZE",
    "ray_address": "ADDRESS",
}
# Where a work directory's job.json keeps a setting. The others (-om, --device, ...) are not part of a job.
STORED_AT = {
    "in_dir": ("identity", "in_dir"),
    "rope_scale": ("identity", "rope_scale"),
    "rope_alpha": ("identity", "rope_alpha"),
    "rotate": ("identity", "rotate"),
    "measurement_rows": ("measure", "rows"),
    "measurement_length": ("measure", "length"),
    "damping": ("measure", "damping"),
    "measurement": ("measure", "measurement"),
    "seed": ("measure", "seed"),
    "chat_rows": ("measure", "chat_rows"),
    "moe_all_experts": ("measure", "moe_all_experts"),
    "dataset_rows": ("quantize", "rows"),
    "length": ("quantize", "length"),
    "bits": ("quantize", "bits"),
    "head_bits": ("quantize", "head_bits"),
    "propagate": ("quantize", "propagate"),
    "allocation": ("quantize", "allocation"),
    "objective": ("quantize", "objective"),
    "objective_power": ("quantize", "objective_power"),
    "quality": ("quantize", "quality"),
    "target_correction": ("quantize", "target_correction"),
    "scale_search": ("quantize", "scale_search"),
    "sweeps": ("quantize", "sweeps"),
    "overrides": ("quantize", "overrides"),
    "shard_size": ("output", "shard_size"),
    "compile_full": ("output", "compile_full"),
}


def dashes(name: str) -> str:
    """``token_normalize_func`` of the commands: ``--in_dir``, as the reference spells it, means ``--in-dir``."""
    return name.replace("_", "-")


def trust_flag(function: F) -> F:
    """Decorator: --trust-work-dir, of the commands that go on with a job."""
    text = "go on with -o alone although others can write in the work directory, and so in its job"
    return click.option("--trust-work-dir", is_flag=True, help=text)(function)


@cache
def field_docs() -> Mapping[str, tuple[str, str]]:
    """Field of ``Recipe`` -> (its flag as the docstring names it, help text)."""
    body = ast.parse(textwrap.dedent(inspect.getsource(Recipe))).body[0]
    docs = {}
    if isinstance(body, ast.ClassDef):
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                    flag, _, text = str(doc.value.value).partition(": ")
                    docs[field.target.id] = (flag, text)
    return docs


def recipe_flags(
    names: Iterable[str] = RECIPE_FIELDS, required: Iterable[str] = ("out_dir",), ignored: bool = False
) -> Callable[[F], F]:
    """Decorator: the flags of these fields of ``Recipe``, in this order, with its defaults.

    ignored: they are taken, and neither shown by --help nor handed on.
    """
    needed = frozenset(required)
    silent: dict[str, Any] = {"hidden": True, "expose_value": False} if ignored else {}
    options = [click.option(*_names(name), **_attributes(name, name in needed), **silent) for name in names]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _names(name: str) -> tuple[str, ...]:
    flag, _ = field_docs()[name]
    long = f"--{dashes(name)}"
    return (name, flag) if flag.startswith("--") else (name, flag, long)


def _attributes(name: str, required: bool) -> dict[str, Any]:
    field = next(f for f in fields(Recipe) if f.name == name)
    hint = get_type_hints(Recipe)[name]
    out: dict[str, Any] = {"help": field_docs()[name][1], "required": required}
    if field.default is not MISSING:
        out["default"] = field.default
    if hint is bool:
        return {**out, "is_flag": True, "show_default": "/" in field_docs()[name][0]}
    out["show_default"] = out.get("default") is not None
    if choices(hint):
        return {**out, "type": click.Choice(choices(hint))}
    if any(get_origin(part) is tuple and type(None) in get_args(hint) for part in get_args(hint)):  # one, several or none
        return {**out, "default": (), "type": str, "multiple": True, "metavar": METAVARS.get(name)}
    if get_origin(hint) is tuple:
        return {**out, "type": get_args(hint)[0], "multiple": True, "metavar": METAVARS.get(name)}
    kinds = [k for k in get_args(hint) or (hint,) if k is not type(None)]
    return {**out, "type": kinds[0], "metavar": METAVARS.get(name)}


class SectionedCommand(click.Command):
    """A command whose help lists the flags of the recipe by topic, and that reads command lines of convert.py."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spelled_out(args, self.get_params(ctx)))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {p.name: p.get_help_record(ctx) for p in self.get_params(ctx)}
        rest = [name for name in records if name not in RECIPE_FIELDS]
        for title, names in {**SECTIONS, "Other": rest}.items():
            shown = [record for name in names if (record := records.get(name)) is not None]
            if shown:
                with formatter.section(title):
                    formatter.write_dl(shown)


def notes_from(ctx: click.Context) -> list[str]:
    """What is to be said of flags that a command takes and does not use."""
    unused = [flag_of(ctx.command.params, name) for name in CONVERT_ONLY if name not in ctx.params and is_given(ctx, name)]
    said = [f"{', '.join(unused)}: nothing that is measured depends on it; give it to convert"] if unused else []
    return [*reference_notes(ctx), *said]


def recipe_from(ctx: click.Context, **overrides: Any) -> Recipe:
    """The recipe that a command line asks for.

    Without -i this is a resume: what the command line does not give is taken from the job of the work directory.
    ``overrides`` replace fields. Raises UsageError naming the flag, StoreError for an unusable work directory.
    """
    values = {name: ctx.params[name] for name in RECIPE_FIELDS if name in ctx.params}
    if values["in_dir"] is None:
        given = {n for n in values if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
        stored = stored_settings(values["out_dir"], given, trust=bool(ctx.params.get("trust_work_dir")))
        values.update({n: v for n, v in stored.items() if n not in given})
    recipe = Recipe(**{**values, **overrides})
    check_files(recipe)
    return recipe


def stored_settings(root: str, given: Iterable[str] = (), trust: bool = False) -> dict[str, Any]:
    """Fields of ``Recipe`` as the job in ``root`` has them. ``given``: fields that need not be known from it.

    StoreError if somebody else can have written that job, unless ``trust`` is given.
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
    job = stored.job
    out = {}
    hints = get_type_hints(Recipe)
    for name, (section, setting) in STORED_AT.items():
        value = job[section].get(setting)
        if value is not None:
            out[name] = tuple(value) if isinstance(value, list) else value
            if not fits(out[name], hints[name]):
                raise StoreError(
                    f"{root}: the job's {section}.{setting} is {shown(value)}; {wanted(hints[name])} is needed",
                    "job.json is damaged: restore it, or start anew with -nr",
                )
    if "in_dir" not in out:
        raise UsageError(f"-i is missing, and the job in {root} does not say where its model is", "name it with -i")
    own_data = job["measure"].get("cal_dataset") or job["quantize"].get("cal_dataset")
    if own_data and "cal_dataset" not in given:
        if not job["identity"].get("cal_dataset"):
            raise UsageError(f"the job in {root} uses calibration data of its own", "name the file again with -c")
        place = job["identity"]["cal_dataset"]
        out["cal_dataset"] = tuple(place) if isinstance(place, list) else place
    return out


def check_files(recipe: Recipe) -> None:
    """UsageError naming the flag for a path that should exist and does not."""
    if is_remote(recipe.in_dir):
        parse(recipe.in_dir)
    elif not os.path.exists(recipe.in_dir):  # what is there is looked at by the checks of a conversion
        raise UsageError(f"-i {recipe.in_dir}: does not exist", missing_folder_hint(recipe.in_dir))
    for place in recipe.calibration_data:
        from exl2ray.calibration.data.sources import check_place

        check_place(place)
    path = recipe.measurement
    if path is not None and not os.path.isfile(path):
        what = "is a directory" if os.path.isdir(path) else "does not exist"
        raise UsageError(f"-m {path}: {what}", "give a measurement.json")
