"""Workers on the live display."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from exl2ray.terminal.live import WORKER_LINES, Live


def shown(width: int, workers: list[str]) -> list[str]:
    """Lines of the display after each worker has finished two items of ten seconds, side by side."""
    now = 0.0
    live = Live(Console(file=io.StringIO(), width=width), animated=False, clock=lambda: now)
    live.event("stage", stage="measure", items=100, done=0)
    for done in range(1, 2 * len(workers) + 1):
        now += 10 / len(workers)
        live.event("item", stage="measure", key="model.layers.0.mlp", done=done, items=100, seconds=10.0, detail="",
                   worker=workers[done % len(workers)], workers=len(workers))  # fmt: skip
    out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    out.print(live._render())
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in out.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [30, 80, 140])
def test_each_worker_has_a_line(width: int) -> None:
    lines = shown(width, ["node-a:11", "node-b:22", "\x1b[2Jx:3"])
    assert all(len(line) <= width for line in lines)
    assert [line.split()[0] for line in lines[-3:]] == [r"\x1b[2Jx:3", "node-a:11", "node-b:22"]
    if width >= 80:
        assert "2 items, 10 s each" in lines[-1]
        assert "94 to go" in lines[0]
        assert "ETA 5 min 13 s" in lines[0]


def test_a_group_has_a_line_and_a_single_worker_has_none() -> None:
    assert "a:1 + a:2  2 items, 10 s each" in shown(80, ["a:1 + a:2"])[-1]
    assert len(shown(140, ["a:1"])) == 1


def test_many_workers_are_counted() -> None:
    lines = shown(100, [f"a:{i:02}" for i in range(WORKER_LINES + 5)])
    assert lines[-1].strip() == "and 5 more workers"
    assert len(lines) == 2 + WORKER_LINES + 1


@pytest.mark.parametrize(
    ("width", "rows", "expected"),
    [
        (60, [["a b", "c d", "some/path"]], ["one", "a b", "some/path"]),
        (14, [["a b c", "d e f", "g h"]], ["one  a b c", "two  d e f", "     g h"]),
        (8, [["a b", "c d", "some/path"]], ["one: a b", "two: c d", "\nsome/pat"]),
    ],
)
def test_a_table_whose_last_column_has_no_name(width: int, rows: list[list[str]], expected: list[str]) -> None:
    file = io.StringIO()
    Live(Console(file=file, width=width), animated=False).event("table", title="", columns=["one", "two", ""], rows=rows)
    assert all(part in file.getvalue() for part in expected), file.getvalue()
