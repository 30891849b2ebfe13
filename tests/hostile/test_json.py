"""JSON from outside: what it may be, and that reading what it may not be costs neither time nor memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from special_files import make_pipe, make_socket

from exl2ray.errors import CalibrationError, FormatError, SourceError
from exl2ray.formats.json_file import (
    MAX_DEPTH,
    OTHER_LIMIT,
    as_json,
    as_number,
    odd_values,
    parse_json_object,
    read_bounded,
    read_json_object,
)

GOOD = {
    "plain": b'{"a": 1}',
    "BOM": b'\xef\xbb\xbf{"a": 1}',
    "duplicate keys": b'{"a": 2, "a": 1}',
    "as deep as may be": b'{"a": 1, "b": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
    "brackets in strings": b'{"a": 1, "t": "' + b"[{" * 5000 + b'"}',
    "brackets behind escaped quotes": b'{"a": 1, "t": "\\"' + b"[" * 5000 + b'\\\\"}',
    "the largest integer of real files": b'{"a": 1, "model_max_length": 1000000000000000019884624838656}',
    "two halves of one character": b'{"a": 1, "t": "\\ud83d\\ude00"}',
}


@pytest.mark.parametrize("case", GOOD)
def test_json_is_read(case: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(GOOD[case])
    assert read_json_object(path)["a"] == 1


BAD = {
    "empty": (b"", "is empty"),
    "blanks": (b" \n\t ", "is empty"),
    "zeros": (bytes(4096), "only zeros"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "UTF-16 with mark": ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    "UTF-16 little": ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
    "UTF-16 big": ('{"a": 1}'.encode("utf-16-be"), "UTF-16"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "UTF-32"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 (byte 7)"),
    "gzip": (b"\x1f\x8b\x08\0\0\0", "a gzip file"),
    "ZIP": (b"PK\x03\x04....", "a ZIP file"),
    "web page": (b"\n<!DOCTYPE html><html></html>", "a web page"),
    "a list": (b"[1]", "a JSON object is needed, this is a list"),
    "a text": (b'"x"', "a JSON object is needed, this is a text"),
    "null": (b"null", "a JSON object is needed, this is null"),
    "digits": (b"1" * 5000, "a JSON object is needed, this is a number of 5000 digits"),
    "trailing comma in an object": (b'{\n "a": 1,\n}', "a trailing comma before line"),
    "trailing comma in a list": (b'{"a": [1, 2,]}', "a trailing comma before line 1"),
    "comment": (b'{\n // five\n "a": 5}', "a comment at line 2"),
    "comment behind": (b'{"a": 5 /* five */}', "a comment at line 1"),
    "single quotes": (b"{'a': 1}", "single quotes at line 1 column 2"),
    "Python": (b'{"a": True}', "True at line 1 column 7 is not JSON"),
    "cut off": (b'{"a": [1, 2', "cut off at line 1"),
    "two documents": (b'{"a": 1}{"a": 1}', "Extra data at line 1 column 9"),
    "NaN": (b'{"a": NaN}', "a is NaN, which"),
    "minus infinity": (b'{"a": [0, {"b": -Infinity}]}', "a.1.b is -Infinity"),
    "1e999": (b'{"a": 1e999}', "a is 1e999, beyond the range of numbers"),
    "a long integer": (b'{"a": ' + b"1" * 100_000 + b"}", "a is a number of 100000 digits"),
    "a long negative integer": (b'{"a": -' + b"1" * 5_000_000 + b"}", "a number of 5000001 digits"),
    "a long fraction": (b'{"a": 0.' + b"1" * 100_000 + b"}", "a number of 100002 characters"),
    "half a character": (b'{"a": "\\ud800"}', "lone surrogate"),
    "half a character in a key": (b'{"\\udfff": 1}', "lone surrogate"),
    "one too deep": (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested too deeply"),
    "deep lists": (b'{"a": ' + b"[" * 8_000_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 1_500_000, "nested too deeply"),
    "deep, of both kinds": (b'{"a":[' * 1_000_000, "nested too deeply"),
    "deep behind quotes": (b'{"\\"": "\\\\", "b": ' + b"[" * 4_000_000, "nested too deeply"),
    "an endless string": (b'{"a": "' + b'\\"' * 4_000_000, "Unterminated string"),
    "only backslashes": (b'{"' + b"\\" * 8_000_000, "Unterminated string"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_json_is_named(case: str, tmp_path: Path) -> None:
    raw, words = BAD[case]
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    start = time.process_time()
    with pytest.raises(SourceError) as e:
        read_json_object(path)
    assert words in str(e.value)
    assert str(path) in e.value.message
    assert time.process_time() - start < 2
    with pytest.raises(FormatError):
        parse_json_object(raw, "here", FormatError)


LONG = f"1.{0:080}e400"
ODD = {"NaN": "null", "Infinity": "1e999", "-Infinity": "-1e999", "1e999": "1e999", "-2e400": "-1e999", LONG: "1e999"}


@pytest.mark.parametrize("written", ODD)
def test_no_numbers_can_be_kept_and_become_json(written: str) -> None:
    """For who reads only some keys: no number to any check, and valid JSON where it is written again."""
    texts = ["NaN, Infinity", 'a "quoted" -Infinity\\', written]
    raw = f'{{"a": [0.5, {{"b": {written}}}], "texts": {json.dumps(texts)}}}'
    obj = parse_json_object(raw.encode(), "here", odd=True)
    assert [(place, repr(value)) for place, value in odd_values(obj)] == [("a.1.b", written[:40])]
    value = obj["a"][1]["b"]
    assert as_number(value) is None
    assert not isinstance(value, (int, float, str))
    out = as_json(obj, indent=1)
    again = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert again["texts"] == texts
    assert again["a"][0] == 0.5
    assert str(again["a"][1]["b"]).replace("None", "nan") == str(float(written))
    assert f'"b": {ODD[written]}\n' in out


def test_numbers_of_endless_digits_are_refused_all_the_same() -> None:
    with pytest.raises(SourceError, match="a is a number of 400 digits"):
        parse_json_object(b'{"b": NaN, "a": ' + b"1" * 400 + b"}", "here", odd=True)


def test_equal_keys_can_be_refused() -> None:
    with pytest.raises(FormatError, match="the key 'b' appears twice"):
        parse_json_object(b'{"a": {"b": 1, "c": 2, "b": 3}}', "header", FormatError, unique=True)


def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    with path.open("wb") as f:
        f.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="larger than"):
            read_json_object(path)
        assert tracemalloc.get_traced_memory()[1] < OTHER_LIMIT / 8
    finally:
        tracemalloc.stop()


def test_a_limit_counts_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    assert read_bounded(path, 8) == b"12345678"
    with pytest.raises(CalibrationError, match="8 bytes; larger than 7 bytes"):
        read_bounded(path, 7, CalibrationError)


SPECIAL = {
    "missing": (lambda p: None, "missing"),
    "directory": (lambda p: p.mkdir(), "a directory, not a regular file"),
    "FIFO": (make_pipe, "a FIFO, not a regular file"),
    "socket": (make_socket, "a socket, not a regular file"),
    "device without end": (lambda p: p.symlink_to("/dev/zero"), "a device, not a regular file"),
    "standard input": (lambda p: p.symlink_to("/dev/null"), "a device, not a regular file"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "cannot be read"),
    "link to itself": (lambda p: p.symlink_to(p.name), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECIAL)
def test_only_regular_files_are_read(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = SPECIAL[case]
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(SourceError, match=words):
        read_json_object(path)


def test_names_with_zeros_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a file name"):
        read_bounded(tmp_path / "a\0b", 10)


def test_a_file_that_is_json_is_read_as_json_does(tmp_path: Path) -> None:
    obj = {"a": [1, -2.5e-3, None, True, {"b": "\u00e9\n\"\\"}], "c": {}}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(obj, indent=2))
    assert read_json_object(path) == obj
