"""Writes docs/cli.md from the commands themselves: python scripts/make_cli_docs.py"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click

from exl2ray import errors
from exl2ray.cli import cli

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
INTRODUCTION = """\
# Command line

<!-- written by scripts/make_cli_docs.py; do not edit -->

Flags may be spelled with underscores, as the reference converter does: `--in_dir` is `--in-dir`. Results go to standard
output, errors to standard error. With `--json`, standard output carries JSON and nothing else: one event per line
from `convert`, `measure`, `patch` and `submit` ([events.md](events.md)), one line with the result from the other
commands, and a line `{"event": "error", "message": ..., "hint": ..., "code": ...}` if the command fails.

`convert`, `measure`, `patch`, `tune` and `eval` show a live display on a terminal and a line per finished item elsewhere.
`NO_COLOR` is respected.
"""


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION, _exit_codes()]
    for name in sorted(cli.commands):
        parts.append(_command(name, cli.commands[name]))
    return "\n".join(parts)


def _exit_codes() -> str:
    rows = ["| status | meaning |", "|---|---|", "| 0 | success |", "| 1 | an error nobody foresaw |"]
    lines = (inspect.getdoc(errors) or "").splitlines()
    table = [line for line in lines if line.startswith("| ") and line.split("|")[1].strip().isdigit()]
    rows += [f"|{cells[1]}|{cells[3]}|" for cells in (line.split("|") for line in table)]
    return "\n".join(["## Exit status", "", *rows, ""])


def _command(name: str, command: click.Command) -> str:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    usage = " ".join(["exl2ray", name, *(["[OPTIONS]"] if options else []), *[str(a.metavar) for a in arguments]])
    lines = [f"## exl2ray {name}", "", "```", usage, "```", "", inspect.cleandoc(command.help or ""), ""]
    if options:
        lines += ["| flag | default | meaning |", "|---|---|---|", *map(_option, options), ""]
    return "\n".join(lines)


def _option(option: click.Option) -> str:
    names = [*option.opts, *option.secondary_opts]
    value = "" if option.is_flag else f" {_value(option)}"
    flags = ", ".join(f"`{n}`" for n in names[:-1]) + (", " if len(names) > 1 else "") + f"`{names[-1]}{value}`"
    meaning = (option.help or "").replace("|", "\\|")
    if option.required:
        meaning = f"{meaning} Required." if meaning.endswith(".") else f"{meaning}; required"
    return f"| {flags} | {_default(option)} | {meaning} |"


def _value(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "{" + ",".join(option.type.choices) + "}"
    return option.metavar or option.type.name.upper()


def _default(option: click.Option) -> str:
    value: Any = option.default
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    if option.required or isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        return f"`{option.opts[0]}`" if value is True else ""
    return f"{value}"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
    print(f"wrote {TARGET}")
