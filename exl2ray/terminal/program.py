"""The program around the commands: what they share, and how errors become messages and exit codes.

Exit codes are those of ``exl2ray.errors``; 1 is an error nobody foresaw.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import click

from exl2ray import __version__, stopping
from exl2ray.errors import Exl2RayError, Interrupted, UsageError, is_out_of_host_memory
from exl2ray.terminal import streams
from exl2ray.terminal.console import clean, json_line, reserved_stdout
from exl2ray.terminal.flags import CheckedCommand, SectionedCommand, trust_flag
from exl2ray.terminal.pasted import usage_hint
from exl2ray.terminal.reference_flags import dashes, reference_flags
from exl2ray.terminal.streams import last_words

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")


@dataclass
class Invocation:
    """What the end of the program must know of its beginning. ``command``, ``out_dir``: of a job that can be resumed."""

    json: bool = False
    debug: bool = False
    argv: tuple[str, ...] = ()
    command: str = ""
    out_dir: str = ""

    def resume_hint(self, begun: bool) -> str:
        """How the job of this invocation is resumed; empty for a command without a job. begun: False where it was stopped
        before it was known to be in the work directory."""
        if self.command == "patch":  # needs what it was told
            return "resume with the same command again"
        if self.out_dir and not begun:
            return "run the same command again"
        return f"resume with: exl2ray {self.command} -o {shlex.quote(self.out_dir)}" if self.out_dir else ""


class Cli(click.Group):
    """The group of all commands; turns exceptions into messages and exit codes."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Runs a command and ends the process, with the exit code of `exl2ray.errors`."""
        argv = [_at_home(a) for a in (sys.argv[1:] if args is None else args)]
        own = argv[: argv.index("--")] if "--" in argv else argv
        run = Invocation(json="--json" in own, debug="--debug" in own, argv=tuple(argv))
        extra.pop("standalone_mode", None)
        os.umask(os.umask(0o077) | stat.S_IWOTH)  # caches of libraries, too, are never what everybody can write to
        try:
            with stopping.interruptible():
                code = super().main(argv, prog_name or "exl2ray", standalone_mode=False, obj=run, **extra)
                with streams.watched():
                    sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as e:
            with stopping.ignored():
                status = _report(e if isinstance(e, Exception) else click.Abort(), run)
                streams.leave(status)
        sys.exit(code if isinstance(code, int) else 0)

    # Here, since click ends the program without a word when a pipe breaks.

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with streams.watched():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            os.getcwd()
        except OSError as e:  # importing torch would end the process, with a word on a library and the status of wrong flags
            raise UsageError(f"the current directory cannot be read: {e.strerror}", "go to one that is there: cd ~") from e
        with streams.watched():
            return super().invoke(ctx)


def _at_home(argument: str) -> str:
    """``--flag=~/x`` with the home directory: shells put it in at the beginning of a word alone, and a folder named ~ is one
    that somebody removes with a command that removes much more."""
    name, equals, value = argument.partition("=")
    if equals and name.startswith("-") and (value == "~" or value.startswith("~/")):
        return f"{name}={os.path.expanduser(value)}"
    return argument


def _report(error: Exception, run: Invocation) -> int:
    """Shows an error on standard error, as JSON too if asked for; returns the exit code."""
    if run.debug and not isinstance(error, (click.ClickException, click.Abort)):
        last_words("".join(traceback.format_exception(error)).rstrip())
    lines, hint, code = _explain(error, run)
    red = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = "" if code == Interrupted.exit_code else "error: "
    last_words((f"\033[31m{label}\033[0m" if red and label else label) + "\n".join(map(clean, lines)))
    if hint:
        last_words(clean(f"  hint: {hint}"))
    if run.json:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(json_line({"event": "error", "message": "\n".join(lines), "hint": hint, "code": code}), flush=True)
    return code


def _explain(error: Exception, run: Invocation) -> tuple[Sequence[str], str, int]:
    """(lines of the message, hint, exit code)"""
    if isinstance(error, (click.Abort, Interrupted)):
        told = error if isinstance(error, Interrupted) else Interrupted("interrupted")
        begun = told is error and told.begun
        message, hint = told.message, run.resume_hint(begun) or told.hint
        return [message], hint, Interrupted.exit_code
    if isinstance(error, Exl2RayError):
        return error.lines, error.hint, error.exit_code
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx is not None else "exl2ray"
        return [error.format_message()], usage_hint(run.argv, path), UsageError.exit_code
    if isinstance(error, click.ClickException):
        return [error.format_message()], "", error.exit_code
    if limit := _limit(error):
        return [f"{limit[0]} ({_place(error)})"], limit[1], 1
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    log = _write_log(error, run)
    hint = "this is not an error that exl2ray foresaw: please report it"
    hint += f"; the traceback is in {log}" if log else "; --debug shows the traceback"
    return [f"{message} ({_place(error)})"], hint, 1


def _limit(error: Exception) -> tuple[str, str] | None:
    """(message, hint) for what the system did not grant this process, wherever it was asked for."""
    again = "; then the same command again goes on where it was"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system grants no more threads", f"raise ulimit -u or -v, or the container's limit of processes{again}"
    if is_out_of_host_memory(error):
        return "the system grants no more memory", f"raise ulimit -v or the container's memory, or free some{again}"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "the system grants no more open files", f"raise ulimit -n{again}"
    return None


def _place(error: BaseException) -> str:
    """File and line that raised, the innermost of exl2ray's own if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "exl2ray" in f.filename.split(os.sep)] or list(frames)
    return f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "unknown place"


def _write_log(error: BaseException, run: Invocation) -> str:
    """Keeps the traceback in the logs of the work directory; its path, or "" where that is not possible."""
    if not run.out_dir or "://" in run.out_dir:
        return ""
    from exl2ray.store.file_names import LOGS
    from exl2ray.store.job_file import JOB_FILE
    from exl2ray.store.open import open_store

    name = f"{LOGS}/error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        store = open_store(run.out_dir)
        if not store.exists(JOB_FILE):
            return ""
        store.put(name, "".join(traceback.format_exception(error)).encode(errors="backslashreplace"))
    except Exl2RayError:
        return ""
    return store.full_name(name)


def common(function: F) -> F:
    """Decorator: the flags of every command; ``Cli.main`` looks for them before anything is parsed."""
    function = click.option("--debug", is_flag=True, expose_value=False, help="show tracebacks of errors")(function)
    text = "machine-readable: JSON lines on standard output, nothing else there"
    return click.option("--json", is_flag=True, expose_value=False, help=text)(function)


def present(
    run: Invocation, compute: Callable[[], R], show: Callable[[R], None], to_json: Callable[[R], Any] = lambda result: result
) -> R:
    """Computes a result, prints it, by ``show`` or as one line of JSON, and returns it."""
    if not run.json:
        result = compute()
        show(result)
        return result
    with reserved_stdout() as out:
        result = compute()
        print(json_line(to_json(result)), file=out)
    return result


# ---- the group and its commands --------------------------------------------------------------------------------------


@click.group(cls=Cli, context_settings={"token_normalize_func": dashes}, invoke_without_command=True)
@click.version_option(__version__, message="exl2ray %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Convert Hugging Face language models to EXL2, on one GPU or on a Ray cluster."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(UsageError.exit_code)


def command(
    *params: Callable[[Any], Any], name: str | None = None, converts: bool = False, passes_on: bool = False
) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a command with these flags and those that all have; the function gets the `Invocation` first.

    One that ``converts`` takes the command lines of convert.py, and lists its flags by topic. One that ``passes_on`` leaves
    everything from its first argument on, and flags that it does not have, to its last parameter.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        decorated = common(click.make_pass_decorator(Invocation, ensure=True)(function))
        for param in reversed((*params, trust_flag, reference_flags) if converts else params):
            decorated = param(decorated)
        context = {"ignore_unknown_options": True, "allow_interspersed_args": False} if passes_on else {}
        return cli.command(name, cls=SectionedCommand if converts else CheckedCommand, context_settings=context)(decorated)

    return decorate
