#!/usr/bin/env python3
"""Which files one weight passes on the default path: those with a function that is called while a conversion runs.

    python scripts/one_weight.py [--model DIR] [--all]

Converts a small model (models/demo, 4 bits, one process, CPU) and notes every function of exl2ray that is called from the
start of measuring to the end of writing: settings, checks before work and what comes after are left out, and so are imports
and class bodies. Prints these files with their lines, comments and blank ones included, and two sums: of the files with a
function that is handed a tensor, or something that holds one (marked *), and of all. ``--all``: from `convert` on.

On a GPU `cuda/gpu.py`, `kernels.py`, `small_batches.py`, `launch.py`, `elementwise.py` and `packing.py` take part, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "exl2ray"
sys.path.insert(0, str(ROOT))


def holds_tensor(value: Any, depth: int = 0) -> bool:
    """Whether a value is a tensor, or holds one directly or in a container of its own."""
    if isinstance(value, torch.Tensor):
        return True
    if depth > 2:
        return False
    if isinstance(value, (list, tuple, dict)):
        values = list(value.values() if isinstance(value, dict) else value)[:2]
    else:
        ours = type(value).__module__.startswith("exl2ray.") and hasattr(value, "__dict__")
        values = list(vars(value).values()) if ours else []
    return any(holds_tensor(v, depth + 1) for v in values)


def called(model: Path, everything: bool) -> tuple[dict[Path, set[str]], set[Path]]:
    """File -> names of its functions that were called, and the files of those that were handed tensors."""
    from exl2ray.convert import convert
    from exl2ray.events import Silent
    from exl2ray.recipe import Recipe

    found: dict[Path, set[str]] = {}
    handed: set[Path] = set()
    watching = everything

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal watching
        if event != "call":
            return
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name in ("<module>", "<lambda>"):
            return
        if not code.co_flags & 0x2:  # a class body: no fast locals
            return
        name = code.co_name
        if name == "lock_targets":
            watching = True
        elif name == "tune_outputs" and not everything:  # written
            watching = False
        if watching:
            path = Path(code.co_filename)
            found.setdefault(path, set()).add(getattr(code, "co_qualname", name))
            if path not in handed:
                arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
                if any(holds_tensor(frame.f_locals.get(a)) for a in arguments):
                    handed.add(path)

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            in_dir=str(model), out_dir=f"{folder}/work", compile_full=f"{folder}/out", bits=(4.0,), length=128,
            measurement_length=128, device="cpu", executor="inline", evaluate="never",
        )  # fmt: skip
        threading.setprofile(profile)  # readers and writers
        sys.setprofile(profile)
        try:
            convert(recipe, Silent())
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    return found, handed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--all", action="store_true", help="also what comes before and after")
    args = parser.parse_args()
    found, handed = called(args.model, args.all)
    total = passed = 0
    for path in sorted(found):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        total, passed = total + lines, passed + lines * (path in handed)
        print(f"{lines:6} {'*' if path in handed else ' '} {path.relative_to(ROOT)}  {len(found[path])} functions")
    print(f"{passed:6} * lines in {len(handed)} files that are handed tensors")
    print(f"{total:6}   lines in {len(found)} files")


if __name__ == "__main__":
    main()
