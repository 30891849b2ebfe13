"""The page itself: complete, well formed, and closed to whatever names and texts it is given."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_helpers import Model, evaluation, html_of, write_chain, write_events, write_job, write_measurement

from exl2ray.report.allocation import Allocation
from exl2ray.report.facts import read_facts
from exl2ray.report.figures import frontier
from exl2ray.report.page import render
from exl2ray.report.style import THEMES, WIDTH
from exl2ray.store.file_names import quant_kind
from exl2ray.store.open import open_store
from exl2ray.store.records import Record, Records, hash_inputs

NOTHING = Allocation((), (), {}, False)
VOID = {"meta", "img", "br", "source"}
SVG = "data:image/svg+xml;base64,"
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
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "svg"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset"):
            assert value.startswith(SVG)
        elif name == "href":
            assert value[1:] in ids
        else:
            assert "http:" not in value or name in ("data-label", "alt")


def pictures(page: Reader) -> list[tuple[str, ElementTree.Element]]:
    """(attribute, picture) of all that the page holds; each has to be an SVG that loads and runs nothing."""
    out = []
    for _, name, value in page.attributes:
        if name in ("src", "srcset"):
            text = base64.b64decode(value.removeprefix(SVG), validate=True)
            root = ElementTree.fromstring(text)
            assert not [e for e in root.iter() if e.tag.rpartition("}")[2] in ("script", "a", "foreignObject", "animate")]
            links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(v.startswith(("#", "data:image/png;base64,")) for v in links)
            out.append((name, root))
    return out


def words(html: str) -> str:
    """The text of a page, or of its first part."""
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)).split())


def test_all_sections_of_a_mixture_of_experts(moe_html: str) -> None:
    page = Reader(moe_html)
    assert_closed(page)
    sections = [v for tag, name, v in page.attributes if (tag, name) == ("section", "id")]
    assert sections == ["summary", "quality", "allocation", "curves", "chain", "experts", "time", "notes", "settings"]
    assert page.tags["figure"] == page.tags["img"] == 3 + 2 + 2 + 2 + 2 + 1
    assert moe_html.startswith("<!doctype html>")
    for expected in ("imitation in EXL2", "imitation-4.5bpw", "top-5", "took over from a driver", "--moe-all-experts",
                     "2.13.0", "99.9 %", "letters and law"):  # fmt: skip
        assert expected in words(moe_html)


# ---- the first screen -------------------------------------------------------------------------------------------------


def test_the_first_screen_says_whether_the_models_are_good(moe_html: str) -> None:
    """In words and with figures, before any table; with the size, what it took, and whose bits are whose."""
    first = words(moe_html.partition("<table")[0])
    assert "3 bits per weight: fair Noticeably" in first
    assert "4.5 bits per weight: good Close" in first
    assert ("Close to the source model: KL divergence 0.022 nats per token, perplexity 5.398 against 5.2 of the source "
            "(+3.8%), the most probable token is another one in 6.7% of places.") in first  # fmt: skip
    assert "4.5 GB" in first
    assert "KL as planned 0.02 nats per token" in first
    assert "decoder 4.50, head 6.33, whole file 4.90" in first
    assert re.search(r"made in 1 min \d\d s of running on 1 worker, in 2 runs", first)
    assert "target" not in first
    assert "achieved" not in words(moe_html)


def test_bits_that_the_head_left_to_the_decoder_are_explained(small_work: Path) -> None:
    facts = read_facts(str(small_work))
    low, high = facts.bitrates
    facts = replace(facts, bitrates=(replace(low, decoder_bpw=3.6457, head_bpw=3.13), high))
    first = words(render(facts)[0].partition("<table")[0])
    assert "decoder 3.65, head 3.13 (the head needs less than usual, the decoder got the rest: the size is as" in first
    assert first.count("the decoder got the rest") == 1


def test_without_an_evaluation_calibration_rows_stand_in(small_html: str, moe_html: str) -> None:
    command = "<code>exl2ray eval --model OUT --reference MODEL"
    assert command in small_html
    assert command not in moe_html
    first = words(small_html.partition("<table")[0])
    assert "4.5 bits per weight: good Close to the source model: perplexity 5.398 against 5.2" in first
    assert "Judged by calibration rows alone" in first


def test_unfinished_models_are_not_judged(tmp_path: Path) -> None:
    store, model = open_store(str(tmp_path)), Model(6)
    write_job(store, model, (3.0,))
    write_events(store, model, (3.0,), 2)
    write_chain(store, model, write_measurement(store, model), 3.0, modules=5)
    assert "3 bits per weight Not finished: 5 of 13 modules are quantised." in words(html_of(tmp_path))


# ---- paths, themes, widths --------------------------------------------------------------------------------------------


def test_no_path_of_the_machine_unless_asked_for(moe_work: Path) -> None:
    facts = read_facts(str(moe_work))
    facts = replace(facts, curves=(), timeline=None, bitrates=tuple(replace(b, allocation=NOTHING) for b in facts.bitrates))
    hidden, shown = (words(render(facts, show_paths)[0]) for show_paths in (False, True))
    for path in ("/out/imitation-3bpw", "/models/imitation", "/models/source", str(moe_work)):
        assert path in shown
        assert path not in hidden
    assert not re.search(r"(?<![\w.:])/\w+/", hidden)
    for name in ("imitation-3bpw", "source", moe_work.name):
        assert name in hidden


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_light_and_dark_paper(small_html: str) -> None:
    blocks = re.findall(r":root \{([^}]*)\}", small_html)[:2]
    for theme, block in zip(("light", "dark"), blocks, strict=True):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        assert (colours["paper"], colours["ink"]) == (THEMES[theme]["face"], THEMES[theme]["ink"])
        for name in ("ink", "soft", "good", "fair", "bad"):
            assert contrast(colours[name], colours["paper"]) > 4.5, (theme, name)
            assert contrast(colours[name], colours["panel"]) > 4.5, (theme, name)


def test_pictures_follow_the_theme_and_fit_a_phone(moe_html: str) -> None:
    """One for each theme, drawn in its colours, narrow enough for its text to be read at 360 pixels."""
    found = pictures(Reader(moe_html))
    assert len(found) == 2 * 12 + 2  # the wide timeline has two more
    for name, root in found:
        text = ElementTree.tostring(root, encoding="unicode")
        papers = [t["face"] in text for t in THEMES.values()]
        assert papers.count(True) >= 1
        if name == "src":
            assert papers[0]
            assert THEMES["light"]["ink"] in text
            assert float(root.attrib["width"].removesuffix("pt")) <= 72 * WIDTH + 1
    media = [v for tag, name, v in Reader(moe_html).attributes if (tag, name) == ("source", "media")]
    assert media.count("(prefers-color-scheme: dark)") == 12


def test_cells_name_their_column(moe_html: str) -> None:
    """On a narrow screen a row becomes a list, so that every cell needs the name of its column."""
    page = Reader(moe_html)
    assert page.tags["td"] == sum((tag, name) == ("td", "data-label") for tag, name, _ in page.attributes)


# ---- names and texts from anywhere ------------------------------------------------------------------------------------


def test_names_from_a_hostile_directory(tmp_path: Path) -> None:
    store, model = open_store(str(tmp_path)), Model(2)
    names = [h for h in HOSTILE if "\ud800" not in h]  # the store writes no lone surrogates
    write_job(store, model, (3.0,), in_dir="/models/" + names[0].replace("/", "|"), architecture=names[1])
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
                                  ("written", {"bits": 3.0, "directory": name}), ("note", {"message": name}),
                                  ("warning", {"message": name})):  # fmt: skip
                print(json.dumps({**stamp, "name": event, "fields": fields}), file=f)
    result = evaluation((3.0,))
    result["results"][0] |= {"model": names[0], "reference": names[1], "warnings": names}
    result["results"][0]["kinds"][names[2]] = result["results"][0]["kinds"]["code"]
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    html, _ = render(read_facts(str(tmp_path)), show_paths=True)
    page = Reader(html)
    assert_closed(page)
    pictures(page)
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "nav", "a", "section",
        "article", "span", "dl", "dt", "dd", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "picture",
        "source", "img", "ul", "li", "details", "summary", "code",
    }  # fmt: skip
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800]", html)
    for name in names:
        assert not name.isprintable() or name in "".join(page.texts)
    assert "49{" not in html


@pytest.mark.parametrize("what", ["job", "measurement", "events"])
def test_a_directory_that_has_hardly_anything(tmp_path: Path, what: str) -> None:
    store, model = open_store(str(tmp_path)), Model(1)
    write_job(store, model, (3.0,))
    if what == "measurement":
        write_measurement(store, model, complete=False)
    if what == "events":
        write_events(store, model, (3.0,), 1)
    page = Reader(html_of(tmp_path))
    sections = [v for tag, name, v in page.attributes if (tag, name) == ("section", "id")]
    assert sections == {
        "job": ["summary", "notes", "settings"],
        "measurement": ["summary", "curves", "notes", "settings"],
        "events": ["summary", "quality", "time", "notes", "settings"],
    }[what]


def test_frontier() -> None:
    points = [(2.0, 0.5), (3.0, 0.6), (3.0, 0.4), (4.0, 0.4), (5.0, 0.1)]
    assert frontier(*zip(*points, strict=True)) == [(2.0, 0.5), (3.0, 0.4), (5.0, 0.1)]
