"""The command line. Imports nothing heavy: each command imports what it needs when it runs.

With ``--json``, standard output carries JSON lines and nothing else. ``program.py`` turns errors into exit codes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from exl2ray import __version__
from exl2ray.errors import FormatError, UsageError
from exl2ray.events import Reporter
from exl2ray.recipe import Recipe
from exl2ray.terminal.console import JsonLines, human_reporter, reserved_stdout
from exl2ray.terminal.flags import (
    CONVERT_ONLY,
    MEASURE_FIELDS,
    SectionedCommand,
    dashes,
    notes_from,
    recipe_flags,
    recipe_from,
    trust_flag,
)
from exl2ray.terminal.program import Cli, Invocation, common, present
from exl2ray.terminal.reference_flags import is_given, reference_flags
from exl2ray.terminal.streams import Watched, leave_threads, open_missing


@click.group(cls=Cli, context_settings={"token_normalize_func": dashes}, invoke_without_command=True)
@click.version_option(__version__, message="exl2ray %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Convert Hugging Face language models to EXL2, on one GPU or on a Ray cluster."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(UsageError.exit_code)


def main() -> None:
    """Entry point of the ``exl2ray`` program."""
    open_missing()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names may hold what the terminal cannot show
    try:
        cli.main()
    except SystemExit as e:
        leave_threads(e.code)
        raise


# ---- conversion -----------------------------------------------------------------------------------------------------


@cli.command(cls=SectionedCommand)
@recipe_flags()
@click.option("--dry-run", is_flag=True, help="check everything that can be checked before work starts, and stop")
@trust_flag
@reference_flags
@common
@click.pass_context
def convert(ctx: click.Context, /, dry_run: bool, **_: Any) -> None:
    """Convert a model to EXL2: the whole pipeline.

    Calibrates, measures, allocates, quantises and writes. After a stop for whatever reason the same command, or -o
    alone, goes on where it was.
    """
    _run_job(ctx, recipe_from(ctx), dry_run)


@cli.command(cls=SectionedCommand)
@recipe_flags(MEASURE_FIELDS)
@recipe_flags(CONVERT_ONLY, required=(), ignored=True)
@click.option("--dry-run", is_flag=True, help="check everything that can be checked before work starts, and stop")
@trust_flag
@reference_flags
@common
@click.pass_context
def measure(ctx: click.Context, /, output_measurement: str | None, out_dir: str, dry_run: bool, **_: Any) -> None:
    """Convert up to measurement.json, and stop.

    It is written to -om, or into the work directory. Takes the flags of convert; what concerns only later steps is left out.
    """
    if is_given(ctx, "measurement"):
        raise UsageError("-m reuses a measurement, and this command makes one", "give -m to convert, or drop it")
    if output_measurement is None:
        if "://" in out_dir:
            raise UsageError("-om is missing", "with a work directory in an object store, name a local file with -om")
        output_measurement = os.path.join(out_dir, "measurement.json")
    _run_job(ctx, recipe_from(ctx, output_measurement=output_measurement), dry_run)


def _run_job(ctx: click.Context, recipe: Recipe, dry_run: bool) -> None:
    run = ctx.find_object(Invocation) or Invocation()
    run.command, run.out_dir = ctx.command.name or "convert", recipe.out_dir
    notes = notes_from(ctx)
    _reported(run, lambda reporter: _convert(recipe, reporter, dry_run, notes))


def _reported(run: Invocation, work: Callable[[Any], None]) -> None:
    """Runs ``work`` with what shows its events: lines of JSON with --json, else for people."""
    if run.json:
        with reserved_stdout() as out:
            _closing(JsonLines(out), work)
    else:
        _closing(human_reporter(), work)


def _closing(reporter: Reporter, work: Callable[[Any], None]) -> None:
    watched = Watched(reporter)
    try:
        work(watched)
    finally:
        watched.close()


def _convert(recipe: Recipe, reporter: Any, dry_run: bool, notes: Sequence[str]) -> None:
    from exl2ray import convert as conversion

    for note in notes:
        reporter.event("note", message=note)
    if dry_run:
        conversion.dry_run(recipe, reporter)
        return
    summary = conversion.convert(recipe, reporter)
    if recipe.output_measurement is not None:
        reporter.event(
            "done", outputs=[], measurement=summary.measurement, warnings=list(summary.warnings), seconds=summary.seconds
        )


@cli.command(cls=SectionedCommand)
@recipe_flags(required=())
@click.option("--fit", metavar="SIZE", help="largest bitrate for a card of this memory: 24GB (10^9 bytes) or 24GiB (2^30)")
@click.option("--context", type=int, metavar="TOKENS", help="with --fit: tokens in the cache; else the model's, or 32768")
@click.option("--cache", type=click.Choice(("fp16", "q8", "q6", "q4")), default="fp16", help="with --fit: type of the cache")
@click.option("--gpu-memory", metavar="SIZE", multiple=True, help="plan for GPUs of this size, not this machine; repeatable")
@click.option("--probe", is_flag=True, help="time the largest layer and the head on this machine, with the model's weights")
@click.option("--dry-run", is_flag=True, hidden=True, expose_value=False)  # so that convert's command line can be planned
@trust_flag
@reference_flags
@common
@click.pass_context
def plan(ctx: click.Context, /, **flags: Any) -> int:
    """What a conversion will make and need, and what would stop it.

    Takes the flags of convert and reads config and tensor headers: output size at each bitrate, memory of each pass, disk,
    time, problems. With problems, the exit status is that of the first one, as convert would end.
    """
    from exl2ray.commands import plan as command
    from exl2ray.plan.compose import Wishes

    flags.pop("trust_work_dir")  # recipe_from reads it
    wishes = Wishes(**{name: flags.pop(name) for name in ("fit", "context", "cache", "gpu_memory", "probe")})
    if flags["in_dir"] is None and flags["out_dir"] is None:
        raise UsageError("-i is missing", "name the model with -i, or a work directory that knows it with -o")
    recipe = recipe_from(ctx) if flags["in_dir"] is None else Recipe(**{**flags, "out_dir": flags["out_dir"] or ""})
    given, notes = is_given(ctx, "bits") or flags["in_dir"] is None, notes_from(ctx)
    run = ctx.find_object(Invocation) or Invocation()
    report = present(run, lambda: command.plan(recipe, wishes, given, notes), command.show, command.plan_json)
    return report.problems[0][1].exit_code if report.problems else 0


@cli.command()
@click.option("-i", "--in-dir", metavar="MODEL", required=True, help="the source model; only headers and samples are read")
@click.option("-m", "--measurement", metavar="FILE", required=True, help="its measurement.json")
@recipe_flags(("bits", "head_bits", "allocation", "objective", "objective_power"), required=())
@common
@click.pass_obj
def solve(
    run: Invocation, in_dir: str, measurement: str, bits: tuple[float, ...], head_bits: int | None, allocation: str | None,
    objective: str, objective_power: float,
) -> None:  # fmt: skip
    """Allocation only: what every linear gets at a bitrate.

    Says what is achieved, and how close to the optimum that is.
    """
    from exl2ray.commands import allocations as command

    def compute() -> list[command.Solution]:
        return command.solve(in_dir, measurement, bits, objective, objective_power, allocation, head_bits)

    present(run, compute, command.show, lambda solutions: {"solutions": solutions})


@cli.command()
@click.option("-o", "--out-dir", metavar="DIR", required=True, help="work directory of a finished conversion")
@click.option("--set", "overrides", metavar="PATTERN=BITS", multiple=True, required=True, help="as of convert; repeatable")
@click.option("-b", "--bits", type=float, multiple=True, help="only these of its bitrates")
@click.option("-cf", "--compile-full", metavar="DIR", help="write here; over the conversion's own output if absent")
@recipe_flags(("device", "gpus", "ray_address", "executor"), required=())
@trust_flag
@common
@click.pass_obj
def patch(
    run: Invocation, /, out_dir: str, overrides: tuple[str, ...], bits: tuple[float, ...], compile_full: str | None,
    trust_work_dir: bool, **place: Any,
) -> None:  # fmt: skip
    """Change single linears of a finished conversion.

    Quantises again only what --set changes, on what the model produces as it is, and writes the model anew.
    """
    from exl2ray import convert as conversion
    from exl2ray.terminal.flags import stored_settings

    settings = {**stored_settings(out_dir, trust=trust_work_dir), **place, "out_dir": out_dir, "evaluate": "never"}
    unknown = [b for b in bits if b not in settings["bits"]]
    if unknown:
        have = ", ".join(f"{b:g}" for b in settings["bits"])
        raise UsageError(f"-b {unknown[0]:g}: the conversion in {out_dir} has {have}")
    stored = Recipe(**settings)

    def work(reporter: Any) -> None:
        conversion.patch(stored, overrides, reporter, bits or stored.bits, compile_full)

    run.command, run.out_dir = "patch", out_dir
    _reported(run, work)


# ---- looking at models ----------------------------------------------------------------------------------------------


@cli.command("eval")
@click.option("--model", "models", metavar="MODEL", multiple=True, required=True, help="EXL2 or fp16 model; repeatable")
@click.option("--reference", metavar="MODEL", help="the model to compare with, for KL divergence and agreement")
@click.option("--tokens", metavar="FILE", help=".npy array of token ids, (n,) or (rows, length)")
@click.option("--text", metavar="FILE", help="text, Parquet or JSON lines file, encoded with the model's tokenizer")
@click.option("--rows", type=int, help="rows of tokens; all there are if absent")
@click.option("--length", type=int, help="tokens of a row; 2048 if absent, 512 of the built-in text, or as the array has it")
@click.option("--stride", type=int, help="rows are overlapping windows that start this many tokens apart")
@click.option("--positions", metavar="FILE", help="write the figures of every single prediction to this .npz file")
@recipe_flags(("device", "rope_scale", "rope_alpha"), required=())
@common
@click.pass_obj
def evaluate(run: Invocation, /, models: tuple[str, ...], **settings: Any) -> None:
    """Perplexity and KL divergence of model directories.

    On a small built-in text unless --tokens or --text is given. With --reference also the agreement of the most probable
    tokens.
    """
    from exl2ray.commands import evaluate as command

    present(
        run, lambda: command.evaluate(models, **settings, quiet=run.json), command.show, command.results_json
    )


@cli.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="a question; may be given several times")
@click.option("--prompts", "prompts_file", metavar="FILE", help="questions: a line each, or a JSON array of strings")
@click.option("--system", metavar="TEXT", help="system message in front of every question")
@click.option("--max-tokens", type=int, default=200, show_default=True, help="longest answer")
@recipe_flags(("device", "rope_scale", "rope_alpha"), required=())
@common
@click.pass_obj
def chat(run: Invocation, /, **settings: Any) -> None:
    """Ask models the same question and see where the answers part.

    MODEL is a source model or an EXL2 directory; the first one, usually the source, is what the others are compared with.
    Answers are greedy: the most probable token each time. Without a question you are asked for them.
    """
    from exl2ray.commands import chat as command

    if not run.json:
        command.chat(**settings, out=None)
        return
    with reserved_stdout() as out:
        command.chat(**settings, out=out)


@cli.command()
@click.argument("directory", metavar="DIR")
@click.option("--linears", is_flag=True, help="a row for every linear instead of every layer")
@common
@click.pass_obj
def inspect(run: Invocation, directory: str, linears: bool) -> None:
    """What is inside an EXL2 directory: bits, sizes, settings."""
    from exl2ray.commands import directory as command

    present(
        run,
        lambda: command.inspect(directory),
        lambda summary: command.show_inspect(summary, linears),
        command.inspect_json,
    )


@cli.command()
@click.argument("directory", metavar="DIR")
@click.option("-i", "--in-dir", metavar="MODEL", help="the source model: compare names and shapes with it, too")
@common
@click.pass_obj
def verify(run: Invocation, directory: str, in_dir: str | None) -> int:
    """Check an EXL2 directory against every rule of the format.

    Prints a problem on each line; exit status 8 if there are any.
    """
    from exl2ray.commands import directory as command

    problems = present(
        run,
        lambda: command.verify(directory, in_dir),
        lambda found: command.show_verify(directory, found),
        lambda found: {"directory": directory, "sound": not found, "problems": found},
    )
    return FormatError.exit_code if problems else 0


@cli.command()
@click.option("--show", is_flag=True, expose_value=False, help="kinds of rows and how they begin (what it does anyway)")
@recipe_flags(
    ("in_dir", "cal_dataset", "measurement_rows", "measurement_length", "dataset_rows", "length", "seed", "chat_rows"),
    required=("in_dir",),
)
@common
@click.pass_obj
def calibration(run: Invocation, /, **settings: Any) -> None:
    """The rows of tokens that a conversion would calibrate on."""
    from exl2ray.commands import calibration as command
    from exl2ray.terminal.flags import check_files

    recipe = Recipe(**settings, out_dir="")
    check_files(recipe)
    present(run, lambda: command.rows_of(recipe), command.show, command.rows_json)


@cli.command()
@common
@click.pass_obj
def architectures(run: Invocation) -> None:
    """The model families that can be converted, and their quirks."""
    from exl2ray.commands import architectures as command

    present(run, command.families, command.show, lambda found: {"architectures": found})


@cli.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
@click.option("--repo", metavar="OWNER/NAME", required=True, help="the repository on the Hub")
@click.option("--branch", metavar="NAME", help="{bpw} stands for the bitrate; absent: main, for several DIR {bpw}bpw")
@click.option("--create", is_flag=True, help="make the repository if there is none")
@click.option("--private", is_flag=True, help="make it private; refuse one that is public")
@click.option("--message", metavar="TEXT", help="of the commit")
@click.option("--base-model", metavar="OWNER/NAME", help="the source model on the Hub, for cards that do not name it")
@click.option("--eval", "evaluations", metavar="FILE", multiple=True, help="output of eval --json, or evaluation.json")
@click.option("--include", metavar="PATTERN", multiple=True, help="other files to take; secrets and links elsewhere stay")
@click.option("--token-file", metavar="FILE", help="holds the access token; HF_TOKEN or the stored login if absent")
@click.option("--dry-run", is_flag=True, help="check the directories and list what would go where; needs no network")
@common
@click.pass_obj
def publish(run: Invocation, /, **settings: Any) -> None:
    """Upload EXL2 directories to the Hugging Face Hub.

    Directories are verified first. Only files that are known as part of a model are taken, the others are named as left
    out. Several directories go into a branch each, and the card on main lists the branches. After a broken connection the
    same command sends what is missing.
    """
    from exl2ray.commands import publish as command

    present(run, lambda: command.publish(**settings), command.show, command.published_json)


# ---- jobs and machines ----------------------------------------------------------------------------------------------


@cli.command()
@click.argument("work_dir", metavar="WORKDIR")
@common
@click.pass_obj
def status(run: Invocation, work_dir: str) -> None:
    """How far the job of a work directory is.

    May be asked while it runs, from any machine.
    """
    from exl2ray.commands import job_status as command

    present(run, lambda: command.status(work_dir), command.show, lambda s: s)


@cli.command()
@click.argument("work_dir", metavar="WORKDIR")
@click.option("-o", "--output", metavar="FILE", help="the page; report.html in the work directory if absent")
@click.option("--eval", "evaluations", metavar="FILE", multiple=True, help="what eval --json printed; repeatable")
@common
@click.pass_obj
def report(run: Invocation, work_dir: str, output: str | None, evaluations: tuple[str, ...]) -> None:
    """A work directory as one HTML page with plots.

    Errors over bits, chosen bits, errors of the quantised modules, perplexity and KL, expert coverage, time per stage and
    worker, settings and notes. The page needs nothing else, and may be written while the job runs.
    """
    from exl2ray.commands import report as command

    present(run, lambda: command.report(work_dir, output, evaluations), command.show, command.report_json)


@cli.command()
@click.option("-o", "--out-dir", metavar="DIR", default=".", help="look at the disk of this work directory")
@common
@click.pass_obj
def doctor(run: Invocation, out_dir: str) -> int:
    """What this machine offers, what is wrong, and the remedy.

    Looks at GPUs, CUDA, Ray, disk, shared memory and versions. Exit status 1 if something would stop a conversion.
    """
    from exl2ray.doctor import examination as command

    findings = present(run, lambda: command.examine(out_dir), command.show, lambda found: {"findings": found})
    return 1 if any(f.level == "problem" for f in findings) else 0


@cli.command()
@click.option("--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="the head node's dashboard: http://HEAD:8265")
@click.option("--working-dir", metavar="DIR", help="ship this checkout; else the exl2ray installed on the cluster runs")
@click.option("--no-wait", is_flag=True, help="return at once; with --logs: what was printed so far")
@click.option("--no-check", is_flag=True, help="do not look at paths and versions on the cluster first")
@click.option("--status", metavar="ID", help="the state of a job")
@click.option("--logs", metavar="ID", help="follow the output of a job")
@click.option("--stop", metavar="ID", help="end a job; the same command resumes it")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- convert ...")
@common
@click.pass_context
def submit(ctx: click.Context, /, command: tuple[str, ...], **options: Any) -> int:
    """Run a conversion as a job on a Ray cluster.

    What follows -- is the command as it would be typed on the cluster, with paths that all its nodes share. Ctrl-C ends
    this program, not the job.
    """
    from exl2ray.commands import submit as jobs

    run = ctx.find_object(Invocation) or Invocation()
    inner = cli.get_command(ctx, command[0]) if command else None
    settings = inner.make_context(command[0], list(command[1:]), parent=ctx.parent).params if inner else {}
    return jobs.submit(command, settings, as_json=run.json, **options)


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(f"exl2ray {__version__}")


if __name__ == "__main__":
    main()
