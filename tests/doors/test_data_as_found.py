"""Calibration data under names and with contents that nobody would choose: read where they hold text, else told why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_model

from exl2ray.calibration.chat_text import plain_chat
from exl2ray.calibration.data.columns import Kind, choose
from exl2ray.calibration.data.sources import local_source
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.text import Conversation
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.errors import CalibrationError, UsageError

TEXTS = [f"document {i} says: a quiet harbour, {'boats and gulls, ' * (i % 5)}evening." for i in range(60)]
OBJECTS = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


def opened(model: Path) -> ModelTokenizer:
    config = json.loads((model / "config.json").read_text())
    return load_tokenizer(model, config, config["vocab_size"])


def first_row(model: Path, place: Path, chat_rows: bool = True) -> list[int]:
    with opened(model) as tokenizer, CalibrationData([local_source(str(place))], tokenizer, chat_rows) as data:
        return [int(i) for i in data.rows(1, 128, "-r", "-l", 1 << 20).ids[0]]


def begin_of(model: Path, text: str) -> list[int]:
    with opened(model) as tokenizer:
        return [int(i) for i in tokenizer.encode(text)[:128]]


def test_half_a_character_in_a_conversation(model: Path, tmp_path: Path) -> None:
    """JSON can write a lone surrogate, which is no text: a model without a chat template ended with a traceback."""
    said = [{"role": "us\ud800er", "content": "a \ud800 b " * 40}, {"role": "assistant", "content": "yes \udfff"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(20)))
    whole = plain_chat(Conversation("", (("us?er", "a ? b " * 40), ("assistant", "yes ?"))))
    for chat_rows in (True, False):
        assert first_row(model, path, chat_rows) == begin_of(model, whole)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_under_the_name_of_lines(indent: int | None, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(OBJECTS, indent=indent))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps([t, "and on"]) + "\n" for t in TEXTS))
    assert first_row(model, tmp_path / "a.jsonl") == begin_of(model, "".join(TEXTS))
    assert first_row(model, tmp_path / "b.jsonl") == begin_of(model, "".join(f"{t}\nand on" for t in TEXTS))


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.train.tokens", "wiki.test.raw.txt"])
def test_the_usual_files_of_text(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n".join(TEXTS))
    assert first_row(model, tmp_path / name) == begin_of(model, "\n".join(TEXTS))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [("corpus", "ü" * 4000, True), ("a.log", "x\n" * 200, True), ("a.py", "x = 1\n", True),
     ("a.bin", "\0\1", False), ("b.bin", b"\xff\xfe\xfd" * 9, False)],
)  # fmt: skip
def test_text_under_a_name_that_is_not_read(
    name: str, content: str | bytes, named: bool, model: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError) as e:
        first_row(model, tmp_path / name)
    assert ("a file called *.txt" in e.value.hint) == named


@pytest.mark.parametrize("place", ["https://example.com/x.parquet", "s3://bucket/x.jsonl"])
def test_an_address_that_is_not_read(place: str) -> None:
    """It did not exist in the current directory."""
    with pytest.raises(UsageError, match="an address; of those hf://datasets/") as e:
        local_source(place)
    assert "fetch it" in e.value.hint


@pytest.mark.parametrize("place", ["{}", "datasets/{}", "https://huggingface.co/datasets/{}", "http://hf.co/datasets/{}/tree/main"])
def test_a_data_set_of_the_hub_by_its_name(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as e:
        local_source(place.format("Salesforce/wikitext"))
    assert e.value.hint.endswith("hf://datasets/Salesforce/wikitext")
    for file in ("texts/wiki.parquet", "Salesforce/wikitext.txt.gz"):
        with pytest.raises(UsageError) as e:
            local_source(file)
        assert "Hub" not in e.value.hint


@pytest.mark.parametrize(("kinds", "strings"), [({"messages": "text"}, True), ({"n": "number", "Dialogue": "text"}, False)])
def test_conversations_that_are_strings_are_told(kinds: dict[str, Kind], strings: bool) -> None:
    """JSON in the cells of a table, as CSV has it: calibration is on the JSON."""
    found = choose(kinds, None, joins_strings=strings)
    assert found.form == "text"
    assert "holds strings, which are taken as text, not as conversations" in found.note
    assert choose({"text": "text"}, None, joins_strings=strings).note == ""
    assert choose({"messages": "messages"}, None, joins_strings=strings).note == ""
