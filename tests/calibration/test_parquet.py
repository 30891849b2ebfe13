"""Parquet calibration data: the reference's text rule, reading no more than needed, and errors that name the cause."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from exl2ray.calibration.data.sources import local_source
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.rows import Rows
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError, SourceError, UsageError


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(path: Path | str, tokenizer: ModelTokenizer, rows: int = 2, length: int = 128, **options: Any) -> Rows:
    with CalibrationData([local_source(str(path))], tokenizer) as data:
        return data.rows(rows, length, "-r", "-l", options.pop("vocab_size", 2048), **options)


def test_cells_are_joined_and_streams_concatenated(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    columns = {
        "text": [f"row {i} of the {'quiet ' * i}harbour" for i in range(40)],
        "n": [i * 7 for i in range(40)],
        "x": [None if i % 3 else i / 4 for i in range(40)],
        "day": [datetime.date(2020, 1, 1 + i % 28) for i in range(40)],
        "tag": pa.array(["b", "a"] * 20).dictionary_encode(),
    }
    rows = read(f"{write(tmp_path / 'a.parquet', columns)}:*", tokenizer)  # as the reference does
    stream: list[int] = []
    for i in range(40):
        cells = [f"row {i} of the {'quiet ' * i}harbour", str(i * 7)]
        cells += [] if i % 3 else [str(i / 4)]
        cells += [f"2020-01-{1 + i % 28:02d}", "ba"[i % 2]]
        stream += tokenizer.encode(" ".join(cells)).tolist()
    assert rows.ids.flatten().tolist() == stream[:256]
    assert rows.ids.shape == (2, 128)
    assert rows.kinds == ("-c a.parquet", "-c a.parquet")
    assert rows.source.endswith("a.parquet:*")


def test_only_as_much_as_needed_is_read(
    tokenizer: ModelTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a long enough line of text"] * 5000})
    encoded = 0
    original = ModelTokenizer.encode_batch

    def counting(self: ModelTokenizer, texts: list[str]) -> Any:
        nonlocal encoded
        encoded += len(texts)
        return original(self, texts)

    monkeypatch.setattr(ModelTokenizer, "encode_batch", counting)
    read(path, tokenizer)
    assert 0 < encoded <= 256 // 6 + 6 * 256


def test_null_and_empty_rows_are_left_out(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    texts = [None, "", "words " * 30] * 20
    full = read(write(tmp_path / "a.parquet", {"t": texts}), tokenizer)
    dense = read(write(tmp_path / "b.parquet", {"t": ["words " * 30] * 20}), tokenizer)
    assert torch.equal(full.ids, dense.ids)


def test_pandas_index_is_not_text(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    table = pa.table({"t": ["one two three "] * 400, "__index_level_0__": list(range(400))})
    meta = '{"index_columns": ["__index_level_0__"], "columns": []}'
    pq.write_table(table.replace_schema_metadata({"pandas": meta}), tmp_path / "a.parquet")
    plain = write(tmp_path / "b.parquet", {"t": ["one two three "] * 400})
    assert torch.equal(read(tmp_path / "a.parquet", tokenizer).ids, read(plain, tokenizer).ids)


def test_too_little_data(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"t": ["some words here"] * 100})
    have = 100 * len(tokenizer.encode("some words here"))
    with pytest.raises(CalibrationError) as error:
        read(path, tokenizer, rows=100, length=2048)
    assert f"-r 100 x -l 2048 needs 204800 tokens, file gives {have} (100 documents with text)" in error.value.message
    assert error.value.hint == "use a smaller -l, or more text"
    with pytest.raises(CalibrationError) as error:
        read(path, tokenizer, rows=100, length=128)
    assert error.value.hint == f"use -r {have // 128}, or more text"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, 2]] * 100),
        pa.array([{"a": 1}] * 100),
        pa.array([b"\x89PNG"] * 100),
        pa.array([b"abcd"] * 100, type=pa.binary(4)),
        pa.array([None] * 100),
        pa.array([7] * 100),
    ],
)
def test_columns_without_text_are_left_out_and_named(tokenizer: ModelTokenizer, tmp_path: Path, column: pa.Array) -> None:
    alone = read(write(tmp_path / "a.parquet", {"text": ["one two three "] * 100}), tokenizer)
    both = read(write(tmp_path / "b.parquet", {"text": ["one two three "] * 100, "odd one": column}), tokenizer)
    assert torch.equal(alone.ids, both.ids)
    assert [n for n in both.notes if "odd one" in n and "ignored" in n]
    with pytest.raises(CalibrationError, match=r"no column holds text|the file has no columns"):
        read(write(tmp_path / "c.parquet", {"odd one": column}), tokenizer)


def test_empty_files(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no columns"):
        read(write(tmp_path / "a.parquet", {}), tokenizer)
    with pytest.raises(CalibrationError, match=r"file gives 0 \(0 documents with text\)"):
        read(write(tmp_path / "b.parquet", {"t": pa.array([], type=pa.string())}), tokenizer)
    with pytest.raises(CalibrationError, match=r"file gives 0 \(0 documents with text\)"):
        read(write(tmp_path / "c.parquet", {"t": pa.array([None, ""])}), tokenizer)


def test_unreadable_files(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", {"t": [f"line {i} of text" for i in range(5000)]}).read_bytes()
    path = tmp_path / "bad.parquet"
    for bad, words in ((b"", "is empty"), (b"PAR1", "not a readable Parquet file"), (b"not parquet at all", "is no Parquet"),
                       (good[: len(good) // 2], "not a readable Parquet file")):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(CalibrationError, match=rf"bad\.parquet: {words}"):
            read(path, tokenizer)
    path.write_bytes(good[:8] + bytes(len(good) // 2) + good[8 + len(good) // 2 :])
    with pytest.raises(CalibrationError, match=r"bad\.parquet"):
        read(path, tokenizer)
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path / "missing.parquet", tokenizer)


def test_text_that_is_not_utf8(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    column = pa.array([b"caf\xe9 au lait"] * 200).view(pa.string())
    with pytest.raises(CalibrationError, match="data row 0: not UTF-8 at its byte 3"):
        read(write(tmp_path / "a.parquet", {"t": column}), tokenizer)


@pytest.mark.parametrize(
    ("rows", "length", "options", "message"),
    [
        (0, 2048, {}, r"-r 0: at least one"),
        (-3, 2048, {}, r"-r -3: "),
        (2, 64, {}, r"-l 64: .* at least 128"),
        (2, 4096, {"max_positions": 2048}, r"-l 4096 is longer than the 2048 positions"),
    ],
)
def test_flags_are_checked_before_the_file_is_read(
    tokenizer: ModelTokenizer, tmp_path: Path, rows: int, length: int, options: dict[str, int], message: str
) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x"]})
    with pytest.raises(CalibrationError, match=message):
        read(path, tokenizer, rows, length, **options)


def test_any_length_from_128_is_taken(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"t": ["some words here"] * 1000})
    assert read(path, tokenizer, 1, 2500).ids.shape == (1, 2500)


def test_ids_beyond_the_embedding(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"t": ["some words here"] * 1000})
    with pytest.raises(SourceError, match="the model has 20 embedding rows"):
        read(path, tokenizer, vocab_size=20)


def test_columns_of_one_name(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    """Text that is joined is read as it stands; where it matters which one is meant, the file is refused by its name."""
    text, number = pa.array(["a quiet harbour at night " * 20] * 40), pa.array(range(40))
    said = pa.array([[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, well " * 30}]] * 40)

    def table(columns: list[pa.Array], *names: str) -> Path:
        pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    once = read(table([text], "text"), tokenizer)
    assert not torch.equal(read(table([text, text], "text", "text"), tokenizer).ids, once.ids)
    assert torch.equal(read(table([text, pa.nulls(40)], "text", "text"), tokenizer).ids, once.ids)
    assert torch.equal(read(table([text, number, said], "text", "x", "x"), tokenizer).ids, once.ids)
    for columns, names in (
        ([text, number], ("text", "text")), ([number, text], ("text", "text")), ([text, said], ("text", "text")),
        ([said, said], ("messages", "messages")), ([text, text, text, number], ("question", "answer", "answer", "k")),
    ):  # fmt: skip
        path = table(columns, *names)
        with pytest.raises(CalibrationError, match=rf"-c {path}: several columns are called '{names[1]}'") as e:
            read(path, tokenizer)
        assert "rename" in str(e.value.hint)
