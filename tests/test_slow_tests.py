"""The list of slow tests names tests that there are."""

from __future__ import annotations

import ast
from pathlib import Path

from slow_tests import slow_tests

ROOT = Path(__file__).resolve().parents[1]


def test_slow_tests_exist() -> None:
    defined = {}
    for file in {name.partition("::")[0] for name in slow_tests()}:
        path = ROOT / file
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else ()
        defined[file] = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    gone = [name for name in slow_tests() if name.rpartition("::")[2] not in defined[name.partition("::")[0]]]
    assert gone == [], "take them out of tests/slow.txt, or give them their new names"
