"""Every event that commands print with --json keeps to events.schema.json, and docs/events.md has the same fields."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from jsonschema import Draft202012Validator
from tiny_models import write_model

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., Result]
Event = dict[str, Any]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(importlib.resources.files("exl2ray").joinpath("events.schema.json").read_text())  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Flags:
    """Flags of a quick conversion of a tiny model: what both commands take, and what only `convert` does."""

    work: Path
    both: list[str]
    more: list[str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    folder = tmp_path_factory.mktemp("tiny")
    lines = range(12_000)  # `measure` wants enough for the usual -r and -l, too
    text = [f"Line {i} of some text, with {i * i} and {i**3 % 1009} in it." for i in lines]
    pq.write_table(pa.table({"text": text}), folder / "text.parquet")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 200, (2, 64)))
    model = write_model(folder / "model", max_position_embeddings=2048)
    both = {"-i": model, "-o": folder / "work", "-c": folder / "text.parquet", "-mr": 2, "-ml": 128,
            "--executor": "inline", "--device": "cpu"}  # fmt: skip
    more = {"-cf": f"{folder}/out-{{bpw}}", "-r": 2, "-l": 128, "--eval-text": folder / "ids.npy"}
    words = [[str(w) for pair in flags.items() for w in pair] for flags in (both, more)]
    return Flags(folder / "work", words[0], [*words[1], "-b", "4", "-b", "5"])


def events_of(result: Result) -> list[Event]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def problems(schema: dict[str, Any], events: list[Event]) -> list[str]:
    """What is wrong with each event, by the part of the schema that has its name."""
    found = []
    for event in events:
        part = {"$ref": f"#/$defs/{event['event']}", "$defs": schema["$defs"]}
        found += [f"{event['event']}: {e.message}" for e in Draft202012Validator(part).iter_errors(event)]
        if not Draft202012Validator(schema).is_valid(event) and not found:
            found.append(f"{event['event']} is no event of the schema")
    return found


def test_the_schema_is_one(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    named = {ref["$ref"].rpartition("/")[2] for ref in schema["oneOf"]}
    objects = {name for name, part in schema["$defs"].items() if part.get("type") == "object"}
    assert objects == named | {"output"}
    assert all(schema["$defs"][name]["additionalProperties"] is False for name in objects)


def test_the_page_has_the_fields_of_the_schema(schema: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "events.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    for name, part in schema["$defs"].items():
        if part.get("type") == "object":
            assert re.findall(r"^\| `(\w+)` \|", sections.pop(name), re.M) == [f for f in part["properties"] if f != "event"]
    assert sections == {}


def test_the_examples_of_the_page_are_events(schema: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "events.md").read_text()
    examples = [json.loads(line) for line in page.splitlines() if line.startswith('{"event"')]
    assert [e["event"] for e in examples] == ["start", "stage", "item", "end", "note", "done"]
    assert problems(schema, examples) == []


@pytest.mark.slow
def test_events_of_a_conversion(schema: dict[str, Any], tiny: Flags, run: Run) -> None:
    """Measured alone, converted, resumed, patched, and refused."""
    measured = events_of(run("measure", *tiny.both, "--json"))
    converted = events_of(run("convert", *tiny.both, *tiny.more, "--json"))
    again = events_of(run("convert", *tiny.both, *tiny.more, "--json"))
    patched = events_of(run("patch", "-o", str(tiny.work), "--set", "*.0.*down_proj=8", "-b", "5", "--json"))
    refused = events_of(run("convert", *tiny.both, *tiny.more, "-b", "6", "--json"))
    for events in (measured, converted, again, patched, refused):
        assert problems(schema, events) == []
        names = [e["event"] for e in events if e["event"] not in ("note", "warning")]
        assert names[-1] == ("error" if events is refused else "done"), events[-1]
        assert names[0] == ("error" if events is refused else "start")
    assert [e["stage"] for e in measured if e["event"] == "stage"] == ["measure", "sensitivity"]
    stages = [e["stage"] for e in converted if e["event"] == "stage"]
    assert sorted(stages) == ["compile 4.0", "compile 5.0", "evaluate", "quantize 4.0", "quantize 5.0"]
    told = [(e["event"], e.get("stage")) for e in converted]
    end, begin = told.index(("end", "quantize 4.0")), told.index(("stage", "quantize 5.0"))
    assert end < begin, "the clock of a pass does not run while it waits"
    for stage in stages:
        done = [e["done"] for e in converted if e["event"] == "item" and e["stage"] == stage]
        assert done == list(range(1, len(done) + 1))
    assert {"start", "note", "done"} == {e["event"] for e in again} - {"warning"}
    kls = [o["kl"] for o in converted[-1]["outputs"]]
    assert kls[0] > kls[1] > 0
    assert kls == [o["kl"] for o in again[-1]["outputs"]]


@pytest.mark.slow
def test_events_of_a_tuning(schema: dict[str, Any], tiny: Flags, run: Run) -> None:
    flags = ["convert", *tiny.both, *tiny.more, "-o", f"{tiny.work}-tuned", "-cf", f"{tiny.work}-tuned-{{bpw}}"]
    tuned = events_of(run(*flags, "--evaluate", "never", "--tune", "2k", "--tune-text", "self:1k", "--json"))
    assert problems(schema, tuned) == []
    assert tuned[-1]["event"] == "done", tuned[-1]
    stages = [e["stage"] for e in tuned if e["event"] == "stage"]
    assert stages[-4:] == ["write text", "tune", "write text", "tune"], "one bitrate after another"
    assert {e["stage"] for e in tuned if e["event"] == "item" and "worker" not in e} == {"write text", "tune"}


@pytest.mark.parametrize(
    "event",
    [
        {"event": "surprise"},
        {"event": "note", "message": "x", "more": 1},
        {"event": "end", "stage": "quantise 4", "seconds": 1.0},
        {"event": "start"},
        {"event": "error", "message": "x", "hint": "", "code": 0},
    ],
)
def test_what_is_unknown_is_noticed(schema: dict[str, Any], event: Event) -> None:
    assert not Draft202012Validator(schema).is_valid(event)
