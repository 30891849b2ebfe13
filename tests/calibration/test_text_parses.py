"""Every built-in document whose format the standard library can read is well formed.

Calibration text with a broken quote or a lost brace would teach the quantiser statistics that real input does not
have. YAML needs PyYAML, which the project does not depend on: those files are skipped without it.
"""

from __future__ import annotations

import ast
import configparser
import csv
import email
import email.policy
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

TEXT = Path(__file__).resolve().parents[2] / "exl2ray" / "calibration" / "text"
VOID = set("area base br col embed hr img input link meta source track wbr".split())


def parse_python(text: str) -> None:
    ast.parse(text, feature_version=(3, 10))


def parse_json_lines(text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"line {number}: {e}") from e


def parse_toml(text: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    tomllib.loads(text)


def parse_yaml(text: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not a dependency of the project")
    if not [d for d in yaml.safe_load_all(text) if d is not None]:
        raise ValueError("no document")


def parse_csv(text: str) -> None:
    """Strict quoting and as many fields in each row as in the header; semicolons where the header has more of them."""
    header = text.partition("\n")[0]
    delimiter = ";" if header.count(";") > header.count(",") else ","
    rows = list(csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True))
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} fields, the header {len(rows[0])}")
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ValueError(f"{len(rows)} rows of {len(rows[0])} fields are no table")


def parse_ini(text: str) -> None:
    configparser.ConfigParser(interpolation=None).read_string(text)


def parse_mail(text: str) -> None:
    message = email.message_from_string(text, policy=email.policy.default)
    for part in message.walk():
        if part.defects:
            raise ValueError(f"{part.get_content_type()}: {part.defects}")
    if message["subject"] is None:
        raise ValueError("no subject")


class TagBalance(HTMLParser):
    """The standard library's parser forgives everything; this one wants each element closed in its own order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> on line {self.getpos()[0]} closes nothing")


def parse_html(text: str) -> None:
    parser = TagBalance()
    parser.feed(text)
    parser.close()
    if parser.open:
        raise ValueError(f"never closed: {parser.open}")


def parse_conversation(text: str) -> None:
    """JSON; Python and JSON code blocks inside the messages are read too."""
    fence = re.compile(r"^```(python|json)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for message in json.loads(text)["messages"]:
        for language, block in fence.findall(message["content"]):
            (parse_python if language == "python" else json.loads)(block)


PARSERS: dict[str, Callable[[str], object]] = {
    ".csv": parse_csv,
    ".eml": parse_mail,
    ".html": parse_html,
    ".ini": parse_ini,
    ".json": json.loads,
    ".jsonl": parse_json_lines,
    ".py": parse_python,
    ".svg": ET.fromstring,
    ".toml": parse_toml,
    ".xml": lambda text: ET.fromstring(text.encode()),  # bytes: a str must not declare its encoding
    ".yaml": parse_yaml,
    ".yml": parse_yaml,
}
CONVERSATIONS = sorted(p.relative_to(TEXT).as_posix() for p in TEXT.rglob("chat/*.json"))
FILES = sorted(p.relative_to(TEXT).as_posix() for p in TEXT.rglob("*") if p.suffix in PARSERS)


@pytest.mark.parametrize("name", FILES)
def test_document_parses(name: str) -> None:
    path = TEXT / name
    PARSERS[path.suffix](path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_code_in_conversations_parses(name: str) -> None:
    parse_conversation((TEXT / name).read_text(encoding="utf-8"))


def test_broken_code_in_a_conversation_is_noticed() -> None:
    for block in ("```python\nx = (\n```", '```json\n{"a": }\n```'):
        text = json.dumps({"messages": [{"role": "user", "content": f"Look:\n\n{block}\n"}]})
        with pytest.raises((SyntaxError, ValueError)):
            parse_conversation(text)


def test_the_set_has_documents_of_each_format() -> None:
    assert {Path(name).suffix for name in FILES} >= set(PARSERS) - {".yml"}


@pytest.mark.parametrize(
    ("suffix", "broken"),
    [
        (".csv", "a,b\n1,2\n3\n"),
        (".csv", 'a,b\n1,"2"x\n'),
        (".csv", "a;b\n1,2\n"),
        (".eml", "From: a@example.org\n\nno subject\n"),
        (".eml", "Subject: x\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\nnever closed\n"),
        (".html", "<p><b>x</p></b>"),
        (".html", "<p>x"),
        (".ini", "[a]\nx = 1\nx = 2\n"),
        (".json", '{"a": 1,}'),
        (".jsonl", '{"a": 1}\n{"a": \n'),
        (".py", "def f(:\n    pass\n"),
        (".svg", "<svg><g></svg>"),
        (".xml", '<?xml version="1.0" encoding="UTF-8"?><a>&nbsp;</a>'),
    ],
)
def test_a_broken_document_is_noticed(suffix: str, broken: str) -> None:
    with pytest.raises((ValueError, SyntaxError, csv.Error, configparser.Error)):  # ET.ParseError is a SyntaxError
        PARSERS[suffix](broken)


def test_broken_toml_is_noticed() -> None:
    with pytest.raises(ValueError, match="overwrite"):
        parse_toml("a = 1\na = 2\n")


def test_broken_yaml_is_noticed() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not a dependency of the project")
    with pytest.raises(yaml.YAMLError):
        parse_yaml("a: [1, 2\nb: 3\n")
