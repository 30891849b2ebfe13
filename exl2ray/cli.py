"""The command line. Imports nothing heavy: each command imports what it needs when it runs.

Here are the commands that make models, and those about jobs and machines; ``cli_models.py`` has those that look at models.
Help texts of flags that are fields of a recipe stand in ``recipe.py``. With ``--json``, standard output carries JSON lines
and nothing else. ``terminal/program.py`` turns errors into exit codes.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from exl2ray import __version__, cli_models, stopping
from exl2ray.errors import Interrupted, UsageError
from exl2ray.recipe import Recipe
from exl2ray.terminal.flags import (
    CONVERT_ONLY,
    MEASURE_FIELDS,
    notes_from,
    read_overrides,
    recipe_flags,
    recipe_from,
    trust_flag,
)
from exl2ray.terminal.program import Invocation, cli, command, present
from exl2ray.terminal.reference_flags import is_given
from exl2ray.terminal.streams import end, leave_threads, open_missing

__all__ = ["cli", "cli_models", "main", "program"]
argument, flag = click.argument, click.option
dry_run_flag = flag("--dry-run", is_flag=True, help="check everything that can be checked before work starts, and stop")


def program() -> NoReturn:
    """The ``exl2ray`` program: `main`, and the end of the process (`exl2ray.terminal.streams.end`)."""
    try:
        main()
    except SystemExit as e:
        if not isinstance(e.code, (int, type(None))):
            raise
        end(e.code or 0)
    end(0)


def main() -> None:
    """Runs the command line; raises SystemExit with the exit code."""
    open_missing()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names may hold what the terminal cannot show
    try:
        stopping.ends_the_program()
        cli.main()
    except SystemExit as e:
        if e.code == Interrupted.exit_code:
            stopping.ignore()  # it has been asked for, and has had its last word
        leave_threads(e.code)
        raise


# ---- conversion -----------------------------------------------------------------------------------------------------


def _places_of(ctx: click.Context, _: click.Parameter, repo: str | None) -> str | None:
    """--publish names the folders, where -o and -cf do not."""
    if repo is not None:
        from exl2ray.commands.hub_to_hub import default_places

        ctx.default_map = {**(ctx.default_map or {}), **default_places(repo)}
    return repo


@command(
    recipe_flags(),
    dry_run_flag,
    flag("--publish", metavar="OWNER/NAME", is_eager=True, callback=_places_of,
         help="then upload to this repository on the Hub, a branch each; -o and -cf may be left out"),
    flag("--private", is_flag=True, help="with --publish: a private repository"),
    flag("--clean", is_flag=True, help="with --publish: leave no model here once everything has arrived"),
    converts=True,
)  # fmt: skip
def convert(
    run: Invocation, /, dry_run: bool, publish: str | None, private: bool, clean: bool, **_: Any
) -> None:
    """Convert a model to EXL2: the whole pipeline.

    Calibrates, measures, allocates, quantises and writes. After a stop for whatever reason the same command, or -o
    alone, goes on where it was.
    """
    from exl2ray.commands import converting

    ctx = click.get_current_context()
    if publish is None and (private or clean):
        raise UsageError("--private and --clean are for --publish", "name the repository with --publish OWNER/NAME")
    converting.convert(run, "convert", recipe_from(ctx), dry_run, notes_from(ctx), publish, private, clean)


@command(recipe_flags(MEASURE_FIELDS), recipe_flags(CONVERT_ONLY, required=(), ignored=True), dry_run_flag, converts=True)
def measure(run: Invocation, /, out_dir: str, dry_run: bool, **_: Any) -> None:
    """Convert up to measurement.json, and stop.

    It is written to -om, or into the work directory. Takes the flags of convert; what concerns only later steps is left out.
    """
    from exl2ray.commands import converting

    ctx = click.get_current_context()
    if is_given(ctx, "measurement"):
        raise UsageError("-m reuses a measurement, and this command makes one", "give -m to convert, or drop it")
    recipe = recipe_from(ctx, output_measurement=None if "://" in out_dir else os.path.join(out_dir, "measurement.json"))
    if recipe.output_measurement is None:
        raise UsageError("-om is missing", "with a work directory in an object store, name a local file with -om")
    converting.convert(run, "measure", recipe, dry_run, notes_from(ctx))


@command(
    recipe_flags(required=()),
    flag("--fit", metavar="SIZE", help="largest bitrate for a card of this memory: 24GB (10^9 bytes) or 24GiB (2^30)"),
    flag("--context", type=int, metavar="TOKENS", help="with --fit: tokens in the cache; else the model's, or 32768"),
    flag("--cache", type=click.Choice(("fp16", "q8", "q6", "q4")), default="fp16", help="with --fit: type of the cache"),
    flag("--gpu-memory", metavar="SIZE", multiple=True, help="plan for GPUs of this size, not this machine; repeatable"),
    flag("--probe", is_flag=True, help="time the largest layer and the head on this machine, with the model's weights"),
    flag("--dry-run", is_flag=True, hidden=True, expose_value=False),  # so that convert's command line can be planned
    flag("--publish", hidden=True, expose_value=False, is_eager=True, callback=_places_of),
    flag("--private", is_flag=True, hidden=True, expose_value=False),
    flag("--clean", is_flag=True, hidden=True, expose_value=False),
    converts=True,
)
def plan(run: Invocation, /, **flags: Any) -> int:
    """What a conversion makes and needs, and what stops it.

    Takes the flags of convert and reads config and tensor headers: output size at each bitrate, memory of each pass, disk,
    time, problems. With problems, the exit status is that of the first one, as convert would end.
    """
    from exl2ray.commands import plan as command
    from exl2ray.plan.compose import Wishes

    ctx = click.get_current_context()
    flags.pop("trust_work_dir")  # recipe_from reads it
    wishes = Wishes(**{name: flags.pop(name) for name in ("fit", "context", "cache", "gpu_memory", "probe")})
    if flags["in_dir"] is None and flags["out_dir"] is None:
        raise UsageError("-i is missing", "name the model with -i, or a work directory that knows it with -o")
    recipe = recipe_from(ctx) if flags["in_dir"] is None else Recipe(**{**flags, "out_dir": flags["out_dir"] or ""})
    given, notes = is_given(ctx, "bits") or flags["in_dir"] is None, notes_from(ctx)
    report = present(run, lambda: command.plan(recipe, wishes, given, notes), command.show, command.plan_json)
    return report.problems[0][1].exit_code if report.problems else 0


@command(
    flag("-i", "--in-dir", metavar="MODEL", required=True, help="the source model; only headers and samples are read"),
    flag("-m", "--measurement", metavar="FILE", required=True, help="its measurement.json"),
    recipe_flags(("bits", "head_bits", "allocation", "objective", "objective_power"), required=()),
)
def solve(run: Invocation, /, **settings: Any) -> None:
    """Allocation only: what every linear gets at a bitrate.

    Says what is achieved, and how close to the optimum that is.
    """
    from exl2ray.commands import allocations as command

    present(run, lambda: command.solve(**settings), command.show, lambda solutions: {"solutions": solutions})


@command(
    flag("-o", "--out-dir", metavar="DIR", required=True, help="work directory of a finished conversion"),
    flag("--set", "overrides", metavar="PATTERN=BITS", multiple=True, callback=read_overrides,
         help="as of convert; repeatable; added to what earlier patches set"),
    flag("--undo", is_flag=True, help="drop what earlier patches set; alone: back to what was converted"),
    flag("-b", "--bits", type=float, multiple=True, help="only these of its bitrates"),
    flag("-cf", "--compile-full", metavar="DIR", help="write here; over the conversion's own output if absent"),
    recipe_flags(("device", "gpus", "ray_address", "executor"), required=()),
    trust_flag,
)
def patch(run: Invocation, /, **settings: Any) -> None:
    """Change single linears of a finished conversion.

    Quantises again only what --set changes, on what the model produces as it is, and writes the model anew. Patches of a
    model add up, and convert leaves a patched model as it is.
    """
    from exl2ray.commands import converting

    converting.patch(run, **settings)


@command(
    argument("directory", metavar="DIR"),
    flag("--reference", metavar="MODEL", required=True, help="the model that DIR was converted from"),
    flag("-o", "--output", metavar="OUT", required=True, help="where the tuned model goes; run again, it goes on"),
    flag("--tokens", metavar="COUNT", default="1M", show_default=True, help="to tune on, as in 500k or 4M"),
    flag("--passes", type=click.IntRange(1),
         help="over these tokens; if absent 2; 1 from 1 billion weights on, and if there is less text"),
    flag("--text", metavar="PLACE", multiple=True, help="as -c of convert; builtin (if absent); self:COUNT; repeatable"),
    flag("--length", type=int, help="tokens of a row; if absent 256 up to 3.25 bits a weight, else 512"),
    flag("--step-tokens", type=int, help="tokens of a step; if absent 4096, of 1 billion weights or more 8192"),
    flag("--rate", type=float,
         help="of Adam, in steps between two integers; if absent 0.002, less for steps of fewer than 8192 tokens"),
    flag("--gain-rate", type=float,
         help="of norms and biases, relative to their size; if absent as --rate's default, half for each bit beyond 4"),
    flag("--seed", type=click.IntRange(0, (1 << 63) - 1), default=0, show_default=True, help="of the order of rows"),
    flag("--report", is_flag=True, help="KL before and after by kind of held-out text"),
    recipe_flags(("device", "gpus", "ray_address", "executor"), required=()),
)
def tune(run: Invocation, /, report: bool, **settings: Any) -> None:
    """Tune a finished EXL2 model on what its source says.

    DIR is an EXL2 directory, of exl2ray or ExLlamaV2. Integers, norms and biases move to where the divergence from the
    source is smallest; the size stays. What does not gain on held-out text is left as it was.
    """
    from exl2ray.commands import tune as command

    present(run, lambda: command.run(**settings, quiet=run.json), lambda found: command.show(found, report))


# ---- jobs and machines ----------------------------------------------------------------------------------------------


@command(argument("work_dir", metavar="WORKDIR"))
def status(run: Invocation, work_dir: str) -> None:
    """How far the job of a work directory is.

    May be asked while it runs, from any machine.
    """
    from exl2ray.commands.job_status import show
    from exl2ray.store.status import read_status

    present(run, lambda: read_status(work_dir), show)


@command(
    argument("work_dir", metavar="WORKDIR"),
    flag("-o", "--output", metavar="FILE", help="the page; report.html in the work directory if absent"),
    flag("--eval", "evaluations", metavar="FILE", multiple=True, help="what eval --json printed; repeatable"),
    flag("--paths", "show_paths", is_flag=True, help="whole paths of folders; their names alone if absent"),
)
def report(run: Invocation, /, **settings: Any) -> None:
    """A work directory as one HTML page with plots.

    First whether the models are good, how large they are and what they took; then perplexity and KL, chosen bits, errors,
    expert coverage, time, notes and settings. The page needs nothing else, and may be written while the job runs.
    """
    from exl2ray.commands import report as command

    present(run, lambda: command.report(**settings), command.show)


@command(flag("-o", "--out-dir", metavar="DIR", default=".", help="look at the disk of this work directory"))
def doctor(run: Invocation, out_dir: str) -> int:
    """What this machine offers, what is wrong, and the remedy.

    Looks at GPUs, CUDA, Ray, disk, shared memory and versions. Exit status 1 if something would stop a conversion.
    """
    from exl2ray.doctor import examination as command

    findings = present(run, lambda: command.examine(out_dir), command.show, lambda found: {"findings": found})
    return 1 if any(f.level == "problem" for f in findings) else 0


@command(
    flag("--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="the head node's dashboard: http://HEAD:8265"),
    flag("--working-dir", metavar="DIR", help="ship the package in this checkout; else the cluster's own exl2ray runs"),
    flag("--no-wait", is_flag=True, help="return at once; with --logs: what was printed so far"),
    flag("--no-check", is_flag=True, help="do not look at paths and versions on the cluster first"),
    flag("--status", metavar="ID", help="the state of a job"),
    flag("--logs", metavar="ID", help="follow the output of a job"),
    flag("--stop", metavar="ID", help="end a job; the same command resumes it"),
    argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- convert ..."),
)
def submit(run: Invocation, /, command: tuple[str, ...], **options: Any) -> int:
    """Run a conversion as a job on a Ray cluster.

    What follows -- is the command as it would be typed on the cluster, with paths that all its nodes share. Ctrl-C ends
    this program, not the job.
    """
    from exl2ray.commands import submit as jobs

    ctx = click.get_current_context()
    inner = cli.get_command(ctx, command[0]) if command else None
    settings = inner.make_context(command[0], list(command[1:]), parent=ctx.parent).params if inner else {}
    return jobs.submit(command, settings, as_json=run.json, **options)


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(f"exl2ray {__version__}")


if __name__ == "__main__":
    program()
