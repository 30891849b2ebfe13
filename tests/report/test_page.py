"""The page itself: complete, well formed, and closed to whatever names and texts it is given."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_helpers import Model, evaluation, html_of, write_events, write_job, write_measurement

from exl2ray.report.figures import frontier
from exl2ray.report.page import Page, Section, Table, Text, render
from exl2ray.store.fs import Store
from exl2ray.store.layout import quant_kind
from exl2ray.store.records import Record, Records, hash_inputs

VOID = {"meta", "img", "br"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "--></svg></style><script src=//evil.example></script>",
    "{{ 7 * 7 }}{% raw %}",
    r"$\frac{1}{$ \begin",
    "\x1b[31m\x00\u202e\ud800",
    "x" * 5000,
]


class Reader(HTMLParser):
    """Collects tags, attributes and the text of a page; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def assert_closed(page: Reader) -> None:
    """Nothing is loaded, nothing runs, every reference inside the page leads somewhere."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        assert "http" not in value
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.startswith("#")
            assert target[1:] in ids
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("data:image/png;base64,") if tag == "image" else value[1:] in ids


def test_all_sections_of_a_mixture_of_experts(moe_html: str) -> None:
    page = Reader(moe_html)
    assert_closed(page)
    sections = [v for tag, name, v in page.attributes if (tag, name) == ("section", "id")]
    assert sections == ["summary", "notes", "quality", "allocation", "curves", "chain", "experts", "time", "settings"]
    assert page.tags["svg"] == page.tags["figure"] == 2 + 2 + 1 + 1 + 2 + 1
    assert moe_html.startswith("<!doctype html>")
    text = " ".join("".join(page.texts).split())
    for expected in ("Conversion of imitation to EXL2", "2.9987", "/out/imitation-4.5bpw", "top-5", "took over from a driver",
                     "--moe-all-experts", "2.13.0", "98"):  # fmt: skip
        assert expected in text


def test_colours_come_from_the_page(moe_html: str) -> None:
    """Text and axes must be readable on a light and on a dark page."""
    assert "#0a0b0" not in moe_html
    assert moe_html.count("currentColor") > 50
    assert "var(--grid)" in moe_html.partition("</style>")[2]
    assert "prefers-color-scheme: dark" in moe_html


def test_without_an_evaluation_the_page_says_how_to_get_one(small_html: str, moe_html: str) -> None:
    command = "<code>exl2ray eval --model OUT --reference MODEL"
    assert command in small_html
    assert command not in moe_html


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_is_escaped(text: str) -> None:
    html = render(Page(text, text, (Section("a", text, (Text(text, text), Table([text], [[text]], text))),)))
    page = Reader(html)
    assert_closed(page)
    assert set(page.tags) <= {"html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p",
                              "nav", "a", "section", "code", "div", "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip
    html.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", html)
    if text.isprintable():
        assert text in "".join(page.texts)


def test_names_from_a_hostile_directory(tmp_path: Path) -> None:
    store, model = Store.open(str(tmp_path)), Model(2)
    names = [h for h in HOSTILE if "\ud800" not in h]  # the store writes no lone surrogates
    write_job(store, model, (3.0,), in_dir="/models/" + names[0], architecture=names[1])
    write_measurement(store, model)
    write_events(store, model, (3.0,), 2)
    records = Records(store)
    for layer in range(2):
        options = {f"model.layers.{layer}.mlp.{name}_proj": "1:4b_128g s4" for name in names}
        payload = {"error": 0.01, "notes": names, "options": options}
        records.commit(Record(quant_kind(3.0), f"model.layers.{layer}.{names[layer]}", hash_inputs(a=layer), payload))
    stamp = {"time": "2025-03-01T12:30:00Z", "host": "h", "pid": 1}
    with (tmp_path / "events.jsonl").open("a") as f:
        for name in HOSTILE:
            for event, fields in (("started", {"method": "chain", "key": name, "worker": name, "bits": None}),
                                  ("stage", {"stage": name, "items": 3}), ("item", {"stage": name, "key": name}),
                                  ("written", {"bits": 3.0, "directory": name}), ("note", {"message": name})):  # fmt: skip
                print(json.dumps({**stamp, "name": event, "fields": fields}), file=f)
    result = evaluation((3.0,))
    result["results"][0] |= {"model": names[0], "reference": names[1], "warnings": names}
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    html = html_of(tmp_path)
    page = Reader(html)
    assert_closed(page)
    assert names[0] in "".join(page.texts)
    assert "49{" not in html


@pytest.mark.parametrize("what", ["job", "measurement", "events"])
def test_a_directory_that_has_hardly_anything(tmp_path: Path, what: str) -> None:
    store, model = Store.open(str(tmp_path)), Model(1)
    write_job(store, model, (3.0,))
    if what == "measurement":
        write_measurement(store, model, complete=False)
    if what == "events":
        write_events(store, model, (3.0,), 1)
    page = Reader(html_of(tmp_path))
    sections = [v for tag, name, v in page.attributes if (tag, name) == ("section", "id")]
    assert sections == {
        "job": ["summary", "notes", "settings"],
        "measurement": ["summary", "notes", "curves", "settings"],
        "events": ["summary", "notes", "quality", "time", "settings"],
    }[what]


def test_frontier() -> None:
    points = [(2.0, 0.5), (3.0, 0.6), (3.0, 0.4), (4.0, 0.4), (5.0, 0.1)]
    assert frontier(*zip(*points, strict=True)) == [(2.0, 0.5), (3.0, 0.4), (5.0, 0.1)]
