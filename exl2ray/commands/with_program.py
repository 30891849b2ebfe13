"""``exl2ray with``: runs a program in whose Python processes transformers loads EXL2 models."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from exl2ray.errors import UsageError, reading_hint

PACKAGE = Path(__file__).resolve().parents[1]


def command_line(program: Sequence[str]) -> list[str]:
    """What is run: options and .py files by this Python, "python" being this one too; anything else as it is.

    Raises UsageError if there is no such program.
    """
    first = program[0]
    if first in ("python", "python3"):
        return [sys.executable, *program[1:]]
    if first.startswith("-") or (first.endswith(".py") and os.path.isfile(first)):
        return [sys.executable, *program]
    found = shutil.which(first, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if found is None:
        raise UsageError(f"{first}: no such program", "exl2ray with python SCRIPT, or exl2ray with -m MODULE")
    return [found, *program[1:]]


def run(program: Sequence[str]) -> NoReturn:
    """Becomes the program: its exit status, signals and streams are those of this process."""
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise UsageError("transformers is not installed", "pip install 'exl2ray[transformers]'")
    args = command_line(program)
    paths = [str(PACKAGE / "run" / "site"), str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    sys.stdout.flush()
    try:
        os.execvpe(args[0], args, {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)})
    except OSError as e:  # a script without a first line that says by what, a program for another machine
        hint = "a script begins with the program that runs it, as in #!/bin/sh"
        raise UsageError(f"{args[0]}: cannot be run: {e.strerror or e}", reading_hint(e, hint)) from e
