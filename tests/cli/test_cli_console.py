"""Reporters: what they print for each event, and how fast they believe things to go."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from exl2ray.terminal.console import (
    JsonLines,
    Pace,
    Plain,
    clean,
    clean_lines,
    is_numeric,
    json_line,
    outputs_table,
    show_text,
    text_table,
)
from exl2ray.terminal.live import Live

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
OUTPUT = {
    "bits": 4.0,
    "achieved_bpw": 3.9987,
    "head_bpw": 6.0312,
    "directory": None,
    "files": ("/jobs/w/output.safetensors",),
    "file_bytes": 4_703_000,
    "calibration_perplexity": 12.28,
    "reference_perplexity": None,
}


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def feed(reporter, clock, items=8, done=2, workers=1):
    """A short job with everything that may happen; two seconds per item."""
    reporter.event("start", model="/m\x1b[31m", architecture="LlamaForCausalLM", modules=15, bits=[4.0, 3.5],
                   device="cuda", workers=workers, resumed=True)  # fmt: skip
    reporter.event("note", message="text with [bold]markup[/bold] and \x07 a bell")
    reporter.event("stage", stage="measure", items=items, done=done)
    for i in range(done, items):
        clock.now += 2
        reporter.event("item", stage="measure", key=f"model.layers.{i}.mlp\x1b[2J", done=i + 1, items=items,
                       seconds=1.9, detail=f"accuracy 0.{80 + i}")  # fmt: skip
    reporter.event("end", stage="measure", seconds=2.0 * (items - done))
    reporter.event("warning", message="above 30 is suspicious")
    reporter.event("table", title="summary", columns=["name", "value"], rows=[["a", 1.5], ["long name", 10]])
    reporter.event("table", title="empty", columns=["name"], rows=[])
    reporter.event("stage", stage="compile 4.0", items=1, done=0)
    reporter.event("end", stage="compile 4.0", seconds=0.3)
    reporter.event("done", outputs=[OUTPUT], seconds=75.4)
    reporter.event("error", message="shown elsewhere", hint="", code=1)
    reporter.close()


def test_plain_lines():
    stream, clock = io.StringIO(), Clock()
    feed(Plain(stream, clock), clock)
    text = stream.getvalue()
    assert not CONTROL.search(text)
    lines = text.splitlines()
    assert lines[0] == r"LlamaForCausalLM in /m\x1b[31m, 15 modules, 4, 3.5 bits per weight, cuda, resumed"
    assert lines[2] == "[measure] 8 items, 2 already done"
    assert lines[3] == r"[measure] 3/8  model.layers.2.mlp\x1b[2J  1.9 s  accuracy 0.82"
    assert lines[4].endswith("accuracy 0.83  ETA 8.0 s")
    assert "ETA" not in lines[8]  # the last one
    assert lines[9] == "[measure] finished in 12 s"
    assert "warning: above 30 is suspicious" in lines
    assert lines[lines.index("summary") + 1 :][:3] == ["name       value", "a            1.5", "long name     10"]
    assert lines[-2] == " 4       3.9987      6.03  4.7 MB       12.28  not finite         /jobs/w"
    assert lines[-1] == "done in 1 min 15 s"
    assert "shown elsewhere" not in text


def test_json_lines():
    stream, clock = io.StringIO(), Clock()
    feed(JsonLines(stream), clock)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events][:4] == ["start", "note", "stage", "item"]
    item = next(e for e in events if e["event"] == "item")
    assert (item["stage"], item["done"], item["items"], item["seconds"]) == ("measure", 3, 8, 1.9)
    assert item["key"] == "model.layers.2.mlp\x1b[2J"
    done = next(e for e in events if e["event"] == "done")
    assert done["outputs"][0]["files"] == ["/jobs/w/output.safetensors"]


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_value_is_one_line_of_strict_json(value):
    line = json_line({"value": value, "path": Path("x")})
    assert "\n" not in line

    def refuse(name: str) -> None:
        raise ValueError(name)

    again = json.loads(line, parse_constant=refuse)
    assert again["path"] == "x"
    if not isinstance(value, (float, list, dict)):
        assert again["value"] == value


@pytest.mark.parametrize("width", [20, 40, 63, 80, 120, 200])
def test_live_display_fits_the_terminal_and_shows_what_matters(width):
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)
    live = Live(console, animated=False, clock=clock)
    live.event("stage", stage="quantize 4.0", items=60, done=0)
    live.event("stage", stage="quantize 3.0", items=60, done=30)
    for i in range(4):
        clock.now += 90
        live.event("item", stage="quantize 4.0", key="model.layers.1.self_attn", done=i + 1, items=60, seconds=80.0,
                   detail="error 0.0123")  # fmt: skip
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    shown.print(live._render())
    lines = shown.file.getvalue().splitlines()
    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= width for line in lines)
    assert len(lines) == (2 if width >= 120 else 3)
    if width >= 63:
        assert "4/60" in lines[0]
        assert "ETA 1 h 24 min" in lines[0]
        assert "error 0.0123" in lines[0 if width >= 120 else 1]
        assert "30/60" in lines[-1]
        assert "6 min 00 s so far" in lines[-1]


def test_live_prints_around_the_bar_and_reads_no_markup():
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False, markup=False)
    feed(Live(console, clock=clock), clock)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "[bold]markup[/bold]" in text
    assert r"\x07 a bell" in text
    assert r"/m\x1b[31m" in text
    assert "measure: 6 items in 12 s" in text
    assert "warning: above 30 is suspicious" in text
    assert "not finite" in text
    assert "done in 1 min 15 s" in text
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back


def test_live_without_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    Live(console, animated=False).event("warning", message="careful")
    assert "careful" in console.file.getvalue()
    assert "\x1b[33m" not in console.file.getvalue()


def test_a_table_too_wide_for_the_terminal_becomes_a_list():
    console = Console(file=io.StringIO(), width=24, highlight=False)
    rows = [["model.layers.0.mlp", "", "4.125", "gate 4 up 4 down 4.2"]]
    Live(console, animated=False).event("table", title="", columns=["module", "bias", "bpw", "widths"], rows=rows)
    words = console.file.getvalue().split()
    assert words[:4] == ["module:", "model.layers.0.mlp", "bpw:", "4.125"]
    console = Console(file=io.StringIO(), width=60, highlight=False)
    columns = ["model", "perplexity", "KL (nats)", "flipped top-1", "time"]
    rows = [["out/3.0", "46.8003 +- 6.0606", "0.00718 +- 0.00029", "8.22%", "0.3 s"],
            ["out/4.5", "46.4934 +- 5.9819", "0.00126 +- 0.00005", "2.89%", "0.3 s"]]  # fmt: skip
    Live(console, animated=False).event("table", title="", columns=columns, rows=rows)
    lines = console.file.getvalue().splitlines()
    assert [tuple(re.split(r"\s{2,}", line)) for line in lines if line] == list(zip(columns, *rows, strict=True))
    assert len({line.rindex(cell) for line, cell in zip(lines, rows[1], strict=False)}) == 1, "aligned"


def test_headings_break_between_words_only():
    columns = ["-b", "source perplexity", "held-out perplexity", "where"]
    for width, together in ((50, 2), (30, 1)):
        console = Console(file=io.StringIO(), width=width, highlight=False)
        Live(console, animated=False).event("table", title="", columns=columns, rows=[["3", "76.91", "45.57", "out/3.0"]])
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert {line.count("perplexity") for line in lines} == {0, together}, "turned on its side where it is too wide"


def test_cells_break_between_words_where_nothing_else_fits():
    console = Console(file=io.StringIO(), width=50, highlight=False)
    rows = [[f"out/{n}", "letters, law, news", "43.736 +- 6.008", "0.0070 +- 0.0004"] for n in range(4)]
    Live(console, animated=False).event("table", title="", columns=["model", "text", "perplexity", "KL"], rows=rows)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 50
    words = " ".join(lines).split()
    assert all(words.count(word) == 4 for word in ("letters,", "43.736", "6.008", "0.0070", "0.0004"))


def test_a_table_loses_nothing_on_any_terminal():
    models = [{"bits": 4.0, "achieved_bpw": 4.4234, "head_bpw": 6.14, "file_bytes": 1_404_870,
               "calibration_perplexity": 76.76, "reference_perplexity": 76.67, "directory": "/home/out/4.0bpw"}]  # fmt: skip
    of_job = ["setting", "value"], [["quantize seed (--seed)", "0"], ["identity fingerprint (-i)", "f" * 64]]
    for columns, rows in (outputs_table(models), of_job):
        for width in range(16, 140):
            console = Console(file=io.StringIO(), width=width, highlight=False)
            Live(console, animated=False).event("table", title="", columns=columns, rows=rows)
            shown = console.file.getvalue()
            assert max(map(len, shown.splitlines())) <= width
            lost = Counter("".join(sum(rows, columns))) - Counter(shown)
            assert not lost.keys() - {" "}, (width, shown)


def test_running_text_is_wrapped_between_words(monkeypatch, capsys):
    text = "Hardly to be told from the source model: KL divergence 0.0072 nats per token."
    show_text(text, "- ")
    assert capsys.readouterr().out == f"- {text}\n"
    monkeypatch.setattr("exl2ray.terminal.console.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "31")
    show_text(text, "- ")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("- Hardly")
    assert all(line.startswith("  ") and len(line) <= 30 for line in lines[1:])
    assert " ".join(line[2:] for line in lines) == text


class TestPace:
    def test_nothing_is_claimed_before_the_second_item(self):
        pace = Pace(10, 0, 1, 100.0)
        assert pace.eta_seconds(105.0) is None
        pace.finished(1, 110.0)
        assert pace.eta_seconds(110.0) is None
        pace.finished(2, 120.0)
        assert pace.seconds_per_item() == 10
        assert pace.eta_seconds(120.0) == 80
        assert pace.eta_seconds(125.0) == 75

    def test_items_of_an_earlier_run_do_not_count(self):
        pace = Pace(10, 8, 1, 0.0)
        pace.finished(9, 5.0)
        assert pace.eta_seconds(5.0) is None
        pace.finished(10, 10.0)
        assert pace.eta_seconds(10.0) == 0
        assert pace.finished_here == 2

    def test_the_slow_first_item_is_forgotten(self):
        pace = Pace(100, 0, 1, 0.0)
        for i in range(8):
            pace.finished(i + 1, 60.0 + i)
        assert pace.seconds_per_item() == 1.0

    def test_workers_that_finish_together(self):
        pace = Pace(80, 0, 8, 0.0)
        for i in range(7):
            pace.finished(i + 1, 40.0)
            assert pace.eta_seconds(40.0) is None
        pace.finished(8, 40.0)
        assert pace.eta_seconds(40.0) == pytest.approx(360)
        for round_ in range(2, 6):
            for _ in range(8):
                pace.finished(pace.done + 1, 40.0 * round_)
        assert pace.eta_seconds(200.0) == pytest.approx(200)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0, 1000), min_size=1, max_size=40), st.integers(1, 9), st.floats(0, 1e4))
    def test_never_negative_never_infinite(self, gaps, workers, later):
        now, pace = 0.0, Pace(50, 0, workers, 0.0)
        for i, gap in enumerate(gaps):
            now += gap
            pace.finished(i + 1, now)
        eta = pace.eta_seconds(now + later)
        assert eta is None or (eta >= 0 and math.isfinite(eta))


def test_tables_of_text():
    assert text_table(["a"], []) == []
    assert text_table(["name", "n"], [["x", 10], ["yy", 5]]) == ["name   n", "x     10", "yy     5"]
    assert is_numeric(["1 s", "-3", "", "0.5"])
    assert not is_numeric(["1", "all"])


def test_clean():
    assert clean("a\tb\x1b[2J\x9b\nc\u202e") == "a\\tb\\x1b[2J\\x9b\\nc\\u202e"
    assert clean_lines("a\tb\nc") == "a\\tb\nc"


def test_reserved_stdout_keeps_everything_else_out():
    program = """
import os, subprocess, sys
from exl2ray.terminal.console import reserved_stdout
print("before")
with reserved_stdout() as out:
    print("python noise")
    os.write(1, b"C noise\\n")
    subprocess.run([sys.executable, "-c", "print('child noise')"])
    print("result", file=out)
print("after")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["before", "result", "after"]
    assert sorted(ran.stderr.splitlines()) == ["C noise", "child noise", "python noise"]
