"""Calibration text in CSV and Arrow files: read as Parquet and JSON lines of the same content are, else told why not."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from tiny_models import write_model

from exl2ray.calibration.data.columns import choose
from exl2ray.calibration.data.problem import DataError
from exl2ray.calibration.data.sources import local_source
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.rows import Rows
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.errors import CalibrationError

TEXTS = [f'a quiet harbour, {i} "boats"\nand gulls; évening\t{"on and on " * (i % 7)}|' for i in range(60)]
NUMBERS = list(range(60))
SAID = [[{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}] for t in TEXTS]
Write = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelTokenizer]:
    model = write_model(tmp_path_factory.mktemp("model") / "m")
    config = json.loads((model / "config.json").read_text())
    with load_tokenizer(model, config, config["vocab_size"]) as opened:
        yield opened


def taken(tokenizer: ModelTokenizer, place: object) -> Rows:
    with CalibrationData([local_source(str(place))], tokenizer) as data:
        return data.rows(3, 128, "-r", "-l", 1 << 20)


def ids(tokenizer: ModelTokenizer, place: object) -> list[int]:
    return taken(tokenizer, place).ids.flatten().tolist()


def arrow_file(path: Path, columns: dict[str, Any]) -> None:
    pa.feather.write_feather(pa.table(columns), path, chunksize=7)


def plain_file(path: Path, columns: dict[str, Any]) -> None:
    pa.feather.write_feather(pa.table(columns), path, compression="uncompressed")


def arrow_stream(path: Path, columns: dict[str, Any]) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def comma_separated(path: Path, columns: dict[str, Any], delimiter: str = ",", end: str = "\n", mark: str = "") -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    data = (mark + out.getvalue()).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize(
    ("name", "write", "columns", "column"),
    [
        ("a.feather", arrow_file, {"id": NUMBERS, "text": TEXTS, "none": pa.nulls(60)}, ""),
        ("a.arrow", plain_file, {"b": TEXTS, "a": TEXTS[::-1]}, ""),
        ("b.arrow", arrow_stream, {"b": TEXTS, "a": TEXTS[::-1], "n": NUMBERS}, ":a,b"),
        ("a.feather", arrow_file, {"text": pa.array(TEXTS).dictionary_encode(), "url": TEXTS}, ":text"),
        ("b.arrow", arrow_stream, {"messages": SAID, "n": NUMBERS}, ""),
    ],
)
def test_arrow_is_read_as_parquet_is(
    name: str, write: Write, columns: dict[str, Any], column: str, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    write(tmp_path / name, columns)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = taken(tokenizer, f"{tmp_path / name}{column}")
    assert found.ids.tolist() == taken(tokenizer, f"{tmp_path / 'a.parquet'}{column}").ids.tolist()
    assert found.taken[0].format == "Arrow"


@pytest.mark.parametrize(
    ("name", "options", "columns"),
    [
        ("a.csv", {}, {"id": NUMBERS, "text": TEXTS}),
        ("a.csv", {"delimiter": ";", "end": "\r\n", "mark": "\ufeff"}, {"": NUMBERS, "a": TEXTS}),
        ("a.csv", {"delimiter": ";", "mark": "sep=;\n"}, {"id": NUMBERS, "text": TEXTS, "url": TEXTS}),
        ("a.tsv.gz", {"delimiter": "\t"}, {"question": TEXTS, "answer": TEXTS[::-1], "n": NUMBERS}),
        ("a.csv.gz", {"delimiter": "|", "end": "\r\n"}, {"a b": NUMBERS, "text": TEXTS}),
    ],
)
def test_csv_is_read_as_json_lines_are(
    name: str, options: dict[str, Any], columns: dict[str, Any], tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    comma_separated(tmp_path / name, columns, **options)
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = taken(tokenizer, tmp_path / name)
    assert found.ids.tolist() == taken(tokenizer, tmp_path / "a.jsonl").ids.tolist()
    assert found.taken[0].format == "CSV"


def test_csv_without_names_loses_no_text(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    long = [f"{i} " + "a sentence, and on " * 20 for i in range(9)]
    (tmp_path / "a.csv").write_text("".join(f'"{t}"\n' for t in long))
    (tmp_path / "b.csv").write_text("id,text,text\n" + "".join(f'{i},"{t}",x\n\n' for i, t in enumerate(long)))
    expected = tokenizer.encode("".join(long)).tolist()[:384]
    assert ids(tokenizer, tmp_path / "a.csv") == ids(tokenizer, tmp_path / "b.csv") == expected
    assert any("ignored columns: id, text.1" in note for note in taken(tokenizer, tmp_path / "b.csv").notes)


def flipped(path: Path) -> None:
    """Offsets of strings that lead out of their buffer."""
    plain_file(path, {"text": TEXTS})
    data = path.read_bytes()
    offsets = b"".join(sum(len(t.encode()) for t in TEXTS[:i]).to_bytes(4, "little") for i in range(9))
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, b"\0" * 4 + (b"\xff" * 3 + b"\x7f") * 8))


def half(path: Path) -> None:
    arrow_file(path, {"text": TEXTS})
    path.write_bytes(path.read_bytes()[:-200])


def broken_stream(path: Path) -> None:
    arrow_stream(path, {"text": TEXTS})
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text\nHello, world\n", r"line 2 has 2 cells, the first line 1"),
        ("a.csv", b'id,text\n1,"x' + b"\n" * 9, r"line 10 is not CSV: unexpected end of data"),
        ("a.csv", b'id,text\n1,"x" y\n', r"line 2 is not CSV"),
        ("a.csv", b"text\ncaf\xe9\n", r"line 2: not UTF-8 at its byte 3"),
        ("a.csv", b"text\na\0b\n", r"line 2 holds a zero byte"),
        ("a.csv", b"text\n", r"holds no records"),
        ("a.csv", b"a,b\n1,2\n", r"no column holds text: a \(number\), b \(number\)"),
        ("a.csv", b"text\n" + b"x" * (33 << 20), r"line 2 is longer than 32 MiB"),
        ("a.csv", b'text\n"' + (b"x" * (1 << 20) + b"\n") * 33, r"line \d+ is not CSV: field larger than"),
        ("a.csv", "text\nx\n".encode("utf-16"), r"is UTF-16 text"),
        ("a.arrow", b"text\n", r"is no Arrow file"),
        ("a.arrow", b"ARROW1\0\0" + b"x" * 99, r"not a readable Arrow file"),
        ("a.arrow", b"\xff" * 99, r"not a readable Arrow file"),
        ("a.arrow.gz", gzip.compress(b"ARROW1\0\0" + b"x" * 99, mtime=0), r"is compressed Arrow"),
        ("a.feather", b"FEA1" + b"x" * 99, r"is an old Feather"),
        ("a.arrow", flipped, r"reading failed at data row 0: "),
        ("a.arrow", half, r"not a readable Arrow file"),
        ("a.arrow", broken_stream, r"reading failed at data row"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,  # megabytes of it
)
def test_what_cannot_be_read_is_told(
    name: str, content: bytes | Callable[[Path], None], words: str, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content(tmp_path / name)
    with pytest.raises(CalibrationError, match=words) as e:
        taken(tokenizer, tmp_path / name)
    assert e.value.hint


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """Its own caches are no data, nor is what it says of them; of text beside a table the text counts, not a README."""
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        arrow_stream(tmp_path / name / "data-00000-of-00001.arrow", {"text": TEXTS if name == "train" else TEXTS[::-1]})
        (tmp_path / name / "state.json").write_text("{}")
    arrow_stream(tmp_path / "train" / "cache-1f.arrow", {"text": ["wrong"] * 99})
    (tmp_path / "README.md").write_text("wrong")
    source = local_source(str(tmp_path))
    assert [f.name for f in source.files] == ["train/data-00000-of-00001.arrow"]
    (tmp_path / "table").mkdir()
    comma_separated(tmp_path / "table" / "a.csv", {"text": TEXTS})
    (tmp_path / "table" / "README.md").write_text("wrong")
    assert [f.name for f in local_source(str(tmp_path / "table")).files] == ["a.csv"]
    (tmp_path / "table" / "b.txt").write_text("right")
    assert [f.name for f in local_source(str(tmp_path / "table")).files] == ["b.txt"]


@pytest.mark.parametrize(("name", "write"), [("a.arrow", arrow_stream), ("a.csv", comma_separated)])
def test_evaluations_read_them(name: str, write: Write, tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    from exl2ray.evaluate.tokens import load_tokens

    write(tmp_path / name, {"id": NUMBERS, "text": TEXTS})
    found = load_tokens(tmp_path / name, tokenizer, rows=3, length=128)
    assert found.flatten().tolist() == tokenizer.encode("".join(TEXTS)).tolist()[:384]


def test_a_data_set_of_tokens_is_told_as_that() -> None:
    with pytest.raises(DataError, match="no column holds text: input_ids") as e:
        choose({"input_ids": "other", "attention_mask": "other"}, None, True)
    assert "give the text that they were made from" in e.value.hint
