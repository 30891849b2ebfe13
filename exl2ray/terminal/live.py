"""The display on a terminal: a bar per running stage at the bottom, everything else scrolls above it.

Wide terminals have the last item and its figures in the row of the bar, narrow ones below it. Where several workers are at
work, each has a line with what it has finished and how fast. Names come from files, so nothing is ever read as markup, and
control characters are escaped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from exl2ray.events import Reporter
from exl2ray.store.pace import Pace
from exl2ray.terminal.console import (
    Clock,
    Plain,
    clean,
    done_text,
    is_numeric,
    is_terminal,
    job_lines,
    outputs_table,
    repeated_warnings,
    stage_text,
)
from exl2ray.wording import duration, plural

ONE_LINE_WIDTH = 120  # columns from which the last item stands in the row of the bar
QUEUE_WIDTH = 76  # columns from which the number of items left is shown
RATE_WIDTH = 64  # columns from which the rate is shown
LAST_COLUMN_WIDTH = 10  # with the gap beside it: a table whose other columns leave less is too wide
WORKER_LINES = 8  # of a stage; the rest is counted
REFRESH_PER_SECOND = 4


@dataclass
class Stage:
    """A running stage: its pace, and what is said of the last item that was finished."""

    name: str
    pace: Pace
    key: str = ""
    detail: str = ""
    bar: ProgressBar = field(default_factory=ProgressBar)


class Live:
    """Reporter for a terminal. ``animated=False``: only what scrolls."""

    def __init__(self, console: Console | None = None, animated: bool = True, clock: Clock = time.monotonic) -> None:
        self._console = console or Console(highlight=False, markup=False)
        self._clock = clock
        self._workers = 1
        self._stages: dict[str, Stage] = {}
        self._live: RichLive | None = None
        self._animated = animated

    def event(self, name: str, **f: Any) -> None:
        if name == "start":
            self._workers = f.get("workers") or 1
            for line in job_lines(f):
                self._print(line, "bold")
        elif name == "stage":
            self._begin(f)
        elif name == "item":
            self._item(f)
        elif name == "end":
            self._end(f)
        elif name == "note":
            self._print(f["message"], "dim")
        elif name == "warning":
            self._print(f"warning: {f['message']}", "yellow")
        elif name == "table":
            self._table(f["title"], f["columns"], f["rows"])
        elif name == "done":
            self.close()
            self._table("", *outputs_table(f["outputs"]))
            for line in repeated_warnings(f):
                self._print(line, "bold yellow")
            self._print(done_text(f), "bold yellow" if f.get("warnings") else "bold green")
        if self._live is not None:
            self._live.refresh()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _begin(self, f: Mapping[str, Any]) -> None:
        pace = Pace(f["items"], f["done"], self._workers, self._clock())
        self._stages[f["stage"]] = Stage(clean(f["stage"]), pace)
        if f["done"]:
            self._print(f"{f['stage']}: {stage_text(f['items'], f['done'])}", "dim")
        if self._live is None and self._animated:
            self._live = RichLive(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=REFRESH_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def _item(self, f: Mapping[str, Any]) -> None:
        stage = self._stages.get(f["stage"])
        if stage is not None:
            worker, workers = f.get("worker", ""), f.get("workers", 0)
            stage.pace.finished(f["done"], self._clock(), worker, f["seconds"], workers)
            stage.key, stage.detail = clean(f["key"]), clean(f.get("detail") or "")

    def _end(self, f: Mapping[str, Any]) -> None:
        stage = self._stages.pop(f["stage"], None)
        if not self._stages:
            self.close()
        count = "" if stage is None or stage.pace.items == 1 else f" {plural(stage.pace.finished_here, 'item')} in"
        self._print(f"{f['stage']}:{count} {duration(f['seconds'])}", "green")

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(clean(text), style=style))

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Where it is too wide it is turned on its side, else cells are broken between words, else each has a line."""
        if title:
            self._print(title, "bold")
        if not rows:
            return
        cells = [[clean(str(c)) for c in row] for row in rows]
        headings = [clean(column) for column in columns]
        of_column = list(zip(*cells, strict=True))
        # Headings and cells break between words only, except in the last column, which may hold a path.
        words = [max(map(len, " ".join((h, *c)).split()), default=0) for h, c in zip(headings, of_column, strict=True)]
        words[-1] = min(words[-1], max(LAST_COLUMN_WIDTH - 2, max(map(len, headings[-1].split()), default=0)))
        whole = [max(word, *map(len, c)) for word, c in zip(words, of_column, strict=True)]
        turned = [max(map(len, texts)) + 2 for texts in (headings, *cells)]
        gaps, width = 2 * (len(words) - 1), self._console.width
        too_wide = sum(whole[:-1]) + words[-1] + gaps > width
        if too_wide and sum(turned) <= width:
            self._turned(headings, cells, turned)
        elif too_wide and sum(words) + gaps > width:
            self._listed(headings, cells)
        else:
            widths = [max(map(len, (h, *c))) for h, c in zip(headings, of_column, strict=True)]
            self._upright(headings, cells, _narrowed(widths, words, width - gaps))

    def _turned(self, headings: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
        for texts in zip(headings, *cells, strict=True):
            self._line("".join(c.ljust(w) for c, w in zip(texts, widths, strict=True)))
        self._line()

    def _listed(self, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        for row in cells:
            for name, cell in zip(headings, row, strict=True):
                if cell:
                    self._line(f"{name}: {cell}" if name else cell)
            self._line()

    def _upright(self, headings: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for heading, texts, width in zip(headings, zip(*cells, strict=True), widths, strict=True):
            justify: Literal["left", "right"] = "right" if is_numeric(texts) else "left"
            table.add_column(Text(heading), justify=justify, overflow="fold", width=width)
        for row in cells:
            table.add_row(*[Text(c) for c in row])
        self._console.print(table)

    def _line(self, text: str = "") -> None:
        self._console.print(Text(text.rstrip()))

    def _render(self) -> RenderableType:
        now, width = self._clock(), self._console.width
        one_line = width >= ONE_LINE_WIDTH
        lines: list[RenderableType] = []
        for stage in self._stages.values():
            lines.append(_row(stage, now, width, one_line))
            if not one_line and stage.key:
                lines.append(_last_item(stage))
            lines += _worker_lines(stage.pace)
        return Group(*lines)


def _narrowed(widths: Sequence[int], least: Sequence[int], total: int) -> list[int]:
    """Widths of columns that come to at most ``total``, as ``least`` does: the widest that may be narrower gives way."""
    out = list(widths)
    while sum(out) > total:
        out[max((i for i, w in enumerate(out) if w > least[i]), key=out.__getitem__)] -= 1
    return out


def _row(stage: Stage, now: float, width: int, one_line: bool) -> RenderableType:
    """Name, bar, count, rate, time and, if there is room, the last item: one line."""
    pace = stage.pace
    stage.bar.total, stage.bar.completed = max(1, pace.items), pace.done
    stage.bar.pulse = pace.items <= 1
    rate, eta = pace.seconds_per_item(), pace.eta_seconds(now)
    table = Table.grid(padding=(0, 1), expand=True)
    cells: list[RenderableType] = []

    def add(cell: RenderableType, **column: Any) -> None:
        table.add_column(no_wrap=True, **column)
        cells.append(cell)

    add(Text(stage.name, style="bold"), overflow="ellipsis")
    add(stage.bar, ratio=1, min_width=8)
    if pace.items > 1:
        add(Text(f"{pace.done}/{pace.items}", style="cyan"), justify="right")
        if width >= QUEUE_WIDTH and pace.left:
            add(Text(f"{pace.left} to go"), justify="right", min_width=9)
        if width >= RATE_WIDTH and rate is not None:
            add(Text(f"{duration(rate)}/item"), justify="right", min_width=11)
    time_text = f"{duration(pace.elapsed(now))} so far" if eta is None else f"ETA {duration(eta)}"
    add(Text(time_text), justify="right", min_width=12)
    if one_line:
        add(_last_item(stage), ratio=2, overflow="ellipsis")
    table.add_row(*cells)
    return table


def _last_item(stage: Stage) -> Text:
    text = Text(f"  {stage.key}  ", style="dim", no_wrap=True, overflow="ellipsis")
    text.append(stage.detail, style="not dim")
    return text


def _worker_lines(pace: Pace) -> list[RenderableType]:
    """A line per worker or group; none for a worker that is alone."""
    workers = pace.workers()
    if len(workers) < 2 and not any(" + " in w.name for w in workers):
        return []
    lines: list[RenderableType] = []
    for w in workers[:WORKER_LINES]:
        text = f"    {clean(w.name)}  {plural(w.items, 'item')}, {duration(w.seconds_per_item)} each"
        lines.append(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
    if len(workers) > WORKER_LINES:
        lines.append(Text(f"    and {len(workers) - WORKER_LINES} more workers", style="dim", no_wrap=True))
    return lines


def human_reporter(animated: bool = True) -> Reporter:
    """The live display on a terminal, plain lines elsewhere; on standard output."""
    return Live(animated=animated) if is_terminal(sys.stdout) else Plain(sys.stdout)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table on standard output, drawn on a terminal, aligned text elsewhere; an empty line before one whose title
    begins with a line end.
    """
    if title.startswith("\n"):
        print()
    human_reporter(animated=False).event("table", title=title.removeprefix("\n"), columns=columns, rows=rows)
