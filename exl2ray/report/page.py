"""The page: sections of text, tables and figures, rendered by one template that escapes whatever it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any, ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from exl2ray.terminal.console import clean, is_numeric

LONG_WORD = 14  # characters


@dataclass(frozen=True)
class Text:
    """A paragraph; ``code`` is set as a command at its end."""

    text: str
    code: str = ""
    bad: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Items:
    items: tuple[str, ...]
    kind: ClassVar[str] = "list"


@dataclass(frozen=True)
class Picture:
    """``svg``: from ``style.svg_text``; the only text that reaches the page as it is."""

    svg: Markup
    caption: str
    title: str = ""
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Table:
    """``folded``: shown on a click, with its title as the handle."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    kind: ClassVar[str] = "table"

    def style(self, column: int, text: str) -> str:
        """CSS classes of a cell. Long words (paths, hashes) may break anywhere; for others the columns are wide enough."""
        long = any(len(word) > LONG_WORD for word in text.split())
        return " ".join(["right"] * (column in self.right) + ["long"] * long)

    @cached_property
    def right(self) -> set[int]:
        """Columns of numbers: aligned to the right."""
        columns = zip(*self.rows, strict=True) if self.rows else ()
        return {i for i, cells in enumerate(columns) if is_numeric(cells) and any(c not in ("", "-") for c in cells)}


Block = Text | Items | Picture | Table


@dataclass(frozen=True)
class Section:
    name: str  # of the anchor
    title: str
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: tuple[Section, ...] = field(default=())


def render(page: Page) -> str:
    """The HTML. Every text is escaped, and what cannot be printed is spelled out; figures are taken as they are."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True)
    source = files("exl2ray.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page)


def _printable(value: Any) -> Any:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
