"""The commands that look at models, and the one that publishes them. Imports nothing heavy, as `exl2ray.cli`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import click

from exl2ray.errors import FormatError
from exl2ray.recipe import Recipe
from exl2ray.terminal.console import reserved_stdout
from exl2ray.terminal.flags import check_files, recipe_flags
from exl2ray.terminal.program import Invocation, command, present

RUNS_MODEL = ("device", "rope_scale", "rope_alpha")
argument, flag = click.argument, click.option


@command(
    argument("directories", metavar="[MODEL]...", nargs=-1),
    flag("--model", "models", metavar="MODEL", multiple=True, help="EXL2 or fp16 model; the same as MODEL; repeatable"),
    flag("--gguf", metavar="FILE", multiple=True, help="a GGUF file made from the model in --reference; repeatable"),
    flag("--reference", metavar="MODEL", help="the model to compare with, for KL divergence and agreement"),
    flag("--tokens", metavar="FILE", help=".npy array of token ids, (n,) or (rows, length)"),
    flag("--text", metavar="FILE", help="text, Parquet or JSON lines file, encoded with the model's tokenizer"),
    flag("--rows", type=int, help="rows of tokens; all there are if absent"),
    flag("--length", type=int, help="tokens of a row; 2048 if absent, 512 of the built-in text, or as the array has it"),
    flag("--stride", type=int, help="rows are overlapping windows that start this many tokens apart"),
    flag("--ladder", is_flag=True, help="draw KL divergence, perplexity and agreement over the size of the files"),
    flag("--plot", metavar="FILE", help="of --ladder: .png, .svg or .pdf; ladder.png if absent"),
    flag("--positions", metavar="FILE", help="write the figures of every single prediction to this .npz file"),
    recipe_flags(RUNS_MODEL, required=()),
    name="eval",
)
def evaluate(run: Invocation, /, **settings: Any) -> None:
    """Perplexity and KL divergence of model directories.

    On a small built-in text, also by kind of text, unless --tokens or --text is given. With --reference the KL divergence
    with its tail, the share of most probable tokens that are others, and in a sentence whether the model is good.
    """
    from exl2ray.commands import evaluate as command
    from exl2ray.evaluate.forward import RunOptions

    models, text, files = (_taken(kind, settings) for kind in (command.Models, command.Text, command.Files))
    device, options = settings.pop("device"), RunOptions(**settings)
    found = present(
        run, lambda: command.evaluate(models, text, files, device, options, run.json), command.show,
        lambda results: {"results": [r.to_json() for r in results]},
    )  # fmt: skip
    files.write(found)


def _taken(kind: type[Any], settings: dict[str, Any]) -> Any:
    """A dataclass of those of the flags that are its fields, which are gone from ``settings`` then."""
    return kind(**{f.name: settings.pop(f.name) for f in fields(kind)})


@command(
    argument("models", metavar="MODEL...", nargs=-1, required=True),
    flag("--prompt", "prompts", metavar="TEXT", multiple=True, help="a question; may be given several times"),
    flag("--prompts", "prompts_file", metavar="FILE",
         help="questions: a line each, or a JSON array of strings; - reads standard input"),
    flag("--system", metavar="TEXT", help="system message in front of every question"),
    flag("--max-tokens", type=int, default=200, show_default=True, help="longest answer"),
    flag("--engine", type=click.Choice(("exl2ray", "transformers", "exllamav2")), default="exl2ray", show_default=True,
         help="the program that runs the models; the others must be installed"),
    recipe_flags(RUNS_MODEL, required=()),
)
def chat(run: Invocation, /, **settings: Any) -> None:
    """Ask models the same question and see where they part.

    MODEL is a source model or an EXL2 directory; the first one, usually the source, is what the others are compared with.
    Answers are greedy: the most probable token each time. Without a question you are asked for them.
    """
    from exl2ray.commands import side_by_side as command
    from exl2ray.evaluate.forward import RunOptions

    options = RunOptions(rope_scale=settings.pop("rope_scale"), rope_alpha=settings.pop("rope_alpha"))
    with reserved_stdout() if run.json else nullcontext() as out:
        command.chat(**settings, options=options, out=out)


@command(
    argument("directory", metavar="DIR"),
    flag("--linears", is_flag=True, help="a row for every linear instead of every layer"),
)
def inspect(run: Invocation, directory: str, linears: bool) -> None:
    """What is inside an EXL2 directory: bits, sizes, settings."""
    from exl2ray.commands import inspecting as command
    from exl2ray.formats.summary import inspect_directory

    present(
        run,
        lambda: inspect_directory(directory),
        lambda summary: command.show_inspect(summary, linears),
        command.inspect_json,
    )


@command(
    argument("directory", metavar="DIR"),
    flag("-i", "--in-dir", metavar="MODEL", help="the source model: compare names and shapes with it, too"),
)
def verify(run: Invocation, directory: str, in_dir: str | None) -> int:
    """Check an EXL2 directory against every rule of the format.

    Prints a problem on each line; exit status 8 if there are any.
    """
    from exl2ray.commands import inspecting as command

    problems = present(
        run,
        lambda: command.verify(directory, in_dir),
        lambda found: command.show_verify(directory, found),
        lambda found: {"directory": directory, "sound": not found, "problems": found},
    )
    return FormatError.exit_code if problems else 0


@command(
    flag("--show", is_flag=True, expose_value=False, help="kinds of rows and how they begin (what it does anyway)"),
    recipe_flags(
        ("in_dir", "cal_dataset", "measurement_rows", "measurement_length", "dataset_rows", "length", "seed", "chat_rows"),
        required=("in_dir",),
    ),
)
def calibration(run: Invocation, /, **settings: Any) -> None:
    """The rows of tokens that a conversion would calibrate on."""
    from exl2ray.commands import calibration as command

    recipe = Recipe(**settings, out_dir="")
    check_files(recipe)
    present(run, lambda: command.rows_of(recipe), command.show)


@command()
def architectures(run: Invocation) -> None:
    """The model families that can be converted, and their quirks."""
    from exl2ray.commands import architectures as command

    present(run, command.families, command.show, lambda found: {"architectures": found})


@command(
    argument("program", metavar="PROGRAM...", nargs=-1, required=True, type=click.UNPROCESSED),
    name="with",
    passes_on=True,
)
def with_program(run: Invocation, /, program: tuple[str, ...]) -> None:
    """Run a program in which transformers loads EXL2 models.

    PROGRAM: a script, python with its arguments, -m with a module, or any program that is written in Python. Its flags are
    its own: those of exl2ray stand in front of it.
    """
    from exl2ray.commands import with_program as command

    command.run(program)


@command(
    argument("directories", metavar="DIR...", nargs=-1, required=True),
    flag("--repo", metavar="OWNER/NAME", required=True, help="the repository on the Hub"),
    flag("--branch", metavar="NAME", help="{bpw}, {head}: bits; absent: main, for several DIR 4.0bpw or 4.0bpw-h6"),
    flag("--create", is_flag=True, help="make the repository if there is none"),
    flag("--private", is_flag=True, help="make it private; refuse one that is public"),
    flag("--message", metavar="TEXT", help="of the commit"),
    flag("--base-model", metavar="OWNER/NAME", help="the source model on the Hub, for cards that do not name it"),
    flag("--work", metavar="WORKDIR", help="of their conversion: its measurement.json and evaluation.json go along"),
    flag("--eval", "evaluations", metavar="FILE", multiple=True, help="output of eval --json, or evaluation.json"),
    flag("--extras/--no-extras", default=True, help="send measurement.json, evaluation.json and the plot along, as is usual"),
    flag("--include", metavar="PATTERN", multiple=True, help="other files to take; secrets and links elsewhere stay"),
    flag("--token-file", metavar="FILE", help="holds the access token; HF_TOKEN or the stored login if absent"),
    flag("--dry-run", is_flag=True, help="check the directories and list what would go where; needs no network"),
)
def publish(run: Invocation, /, **settings: Any) -> None:
    """Upload EXL2 directories to the Hugging Face Hub.

    Directories are verified first. Only files that are known as part of a model are taken, the others are named as left
    out. Several directories go into a branch each, and the card on main lists the branches. After a broken connection the
    same command sends what is missing.
    """
    from exl2ray.commands import publish as command

    present(run, lambda: command.publish(**settings), command.show, lambda found: {"published": found})
