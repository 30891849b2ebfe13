"""Files and functions stay short enough to be read at a sitting."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES, FUNCTIONS = 400, 80  # lines
LONGER = {  # straight through by nature: GPU kernels, whose functions are inlined by hand
    "exl2ray/cuda/kernels.py": {"grid_errors"},
    "exl2ray/cuda/settle.py": {"settle"},
}


def test_files_and_functions_are_short() -> None:
    long_files: dict[str, int] = {}
    long_functions: dict[str, set[str]] = {}
    for path in sorted(p for folder in ("exl2ray", "scripts") for p in (ROOT / folder).rglob("*.py")):
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > FILES:
            long_files[name] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= FUNCTIONS:
                long_functions.setdefault(name, set()).add(node.name)
    assert long_files == {}
    assert long_functions == LONGER
