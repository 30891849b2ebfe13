"""Rows of tokens from arrays and text files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from exl2ray.errors import CalibrationError, SourceError, UsageError
from exl2ray.evaluate.metrics import counted_predictions
from exl2ray.evaluate.tokens import find_tokenizer, load_tokens


def saved(directory: Path, array: np.ndarray) -> Path:
    path = directory / "ids.npy"
    np.save(path, array)
    return path


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint32])
def test_a_flat_array_is_cut_into_rows(tmp_path: Path, dtype: type) -> None:
    path = saved(tmp_path, np.arange(103, dtype=dtype))
    ids = load_tokens(path, length=10)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, torch.arange(100).view(10, 10))
    assert torch.equal(load_tokens(path, rows=3, length=10), torch.arange(30).view(3, 10))


def test_rows_of_a_2d_array_are_kept_apart(tmp_path: Path) -> None:
    path = saved(tmp_path, np.arange(40, dtype=np.uint16).reshape(4, 10))
    assert torch.equal(load_tokens(path), torch.arange(40).view(4, 10))
    assert torch.equal(load_tokens(path, rows=2, length=6), torch.arange(40).view(4, 10)[:2, :6])
    with pytest.raises(UsageError, match="--stride 5"):
        load_tokens(path, stride=5)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 80), st.integers(2, 20), st.data())
def test_windows_predict_every_token_once(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    with tempfile.TemporaryDirectory() as directory:
        path = saved(Path(directory), np.arange(count))
        if count < length:
            with pytest.raises(CalibrationError, match=f"{count} tokens"):
                load_tokens(path, length=length, stride=stride)
            return
        ids = load_tokens(path, length=length, stride=stride)
    predicted = ids[:, 1:][counted_predictions(len(ids), length, stride)].tolist()
    last = int(ids[-1, -1])
    separate = stride == length  # rows without overlap: nothing predicts their first token
    assert predicted == [i for i in range(1, last + 1) if not separate or i % length]
    assert count - 1 - last < stride


def test_text_is_encoded_without_special_tokens(tmp_path: Path, bytes_tokenizer: Tokenizer, twins: tuple[Path, Path]) -> None:
    model = shutil.copytree(twins[0], tmp_path / "model")
    bytes_tokenizer.save(str(model / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("naïve " * 20, encoding="utf-8")
    tokenizer = find_tokenizer([twins[1], model])
    ids = load_tokens(text, tokenizer, rows=5, length=28)
    assert ids.flatten().tolist() == bytes_tokenizer.encode("naïve " * 20).ids
    with pytest.raises(CalibrationError, match=r"has 140 tokens; 6 rows of --length 28 need 168"):
        load_tokens(text, tokenizer, rows=6, length=28)


def test_a_text_without_a_tokenizer_is_refused(tmp_path: Path, twins: tuple[Path, Path]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello")
    with pytest.raises(SourceError, match="needs a tokenizer"):
        load_tokens(text, length=2)
    with pytest.raises(SourceError, match=r"no tokenizer.json in .*fp16, .*exl2"):
        find_tokenizer(twins)


@pytest.mark.parametrize(
    ("array", "kwargs", "error", "message"),
    [
        (np.arange(10), {"rows": 3, "length": 5}, CalibrationError, "10 tokens; 3 rows of --length 5 need 15"),
        (np.arange(10), {}, CalibrationError, "10 tokens; 1 rows of --length 2048 need 2048"),
        (np.arange(20), {"rows": 3, "length": 10, "stride": 6}, CalibrationError, "--length 10 --stride 6 need 22"),
        (np.zeros((2, 8), np.int32), {"rows": 3}, CalibrationError, "2 rows of 8 tokens; --rows 3"),
        (np.zeros((2, 8), np.int32), {"length": 9}, CalibrationError, "--length 9 asks for more"),
        (np.zeros((0, 8), np.int32), {}, CalibrationError, "not a .npy array|0 rows"),
        (np.zeros(8, np.float32), {"length": 2}, CalibrationError, "float32"),
        (np.zeros((2, 2, 2), np.int32), {"length": 2}, CalibrationError, r"\(2, 2, 2\)"),
        (np.array([3, -1, 5]), {"length": 2}, CalibrationError, "from -1 to 5"),
        (np.array([3, 1 << 60]), {"length": 2}, CalibrationError, "token ids from 3"),
        (np.arange(10), {"length": 1}, UsageError, "--length 1"),
        (np.arange(10), {"rows": 0, "length": 2}, UsageError, "--rows 0"),
        (np.arange(10), {"length": 4, "stride": 5}, UsageError, "--stride 5 is greater than --length 4"),
        (np.arange(10), {"length": 4, "stride": 0}, UsageError, "--stride 0"),
    ],
)
def test_errors_name_flags_and_numbers(tmp_path: Path, array, kwargs, error, message: str) -> None:
    with pytest.raises(error, match=message) as e:
        load_tokens(saved(tmp_path, array), **kwargs)
    assert e.value.hint


def test_hostile_arrays_are_refused(tmp_path: Path) -> None:
    good = saved(tmp_path, np.arange(64)).read_bytes()
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    huge = good.replace(b"(64,), ", b"(1%s,)," % (b"0" * 30))
    code = good.replace(b"(64,)", b"f(4),")
    cases = {
        "cut": (good[:-100], "it breaks off: its header tells of more than its"),
        "header": (good[:20], "it breaks off"),
        "empty": (b"", "is empty"),
        "text": (b"not an array", r"it begins with b'not an'"),
        "huge": (huge, "its header cannot be read"),
        "code": (code, "its header cannot be read"),  # numpy names an object at an address
        "lfs": (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        "bare": (b"\x80\x04\x95" + bytes(99), "a pickle"),
        "zip": (None, r"an archive of arrays \(.npz\)"),
        "pickled": (None, "it holds Python objects"),
    }
    with (tmp_path / "zip.npy").open("wb") as f:
        np.savez(f, ids=np.arange(64))
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(CalibrationError, match=f"{name}.npy: not a .npy array: {words}") as e:
            load_tokens(tmp_path / f"{name}.npy", length=8)
        assert e.value.hint


def test_a_missing_file_and_binary_text(tmp_path: Path, bytes_tokenizer: Tokenizer, twins: tuple[Path, Path]) -> None:
    with pytest.raises(CalibrationError, match="missing"):
        load_tokens(tmp_path / "nothing.npy")
    model = shutil.copytree(twins[0], tmp_path / "model")
    bytes_tokenizer.save(str(model / "tokenizer.json"))
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    with find_tokenizer([model]) as tokenizer:
        with pytest.raises(CalibrationError, match=r"text\.txt: not UTF-8 text \(byte 0\)") as e:
            load_tokens(tmp_path / "text.txt", tokenizer)
        assert "iconv -f UTF-16" in e.value.hint
        starts = ((b"PK\x03\x04\xff", "a ZIP file"), (b"%PDF-1.4 plain", "a PDF"), (b"\x1f\x8b\x08", "a gzip file"))
        for start, name in starts:
            (tmp_path / "text.txt").write_bytes(start)
            with pytest.raises(CalibrationError, match=rf"text\.txt: is {name}, not a text"):
                load_tokens(tmp_path / "text.txt", tokenizer)
        found = []
        for mark in (b"", b"\xef\xbb\xbf"):  # which Windows puts in front; it was a token of the text
            (tmp_path / "text.txt").write_bytes(mark + b"a quiet harbour")
            found.append(load_tokens(tmp_path / "text.txt", tokenizer, length=12).tolist())
    assert found[0] == found[1]


def test_zero_bytes_are_no_text(tmp_path: Path, bytes_tokenizer: Tokenizer, twins: tuple[Path, Path]) -> None:
    model = shutil.copytree(twins[0], tmp_path / "model")
    bytes_tokenizer.save(str(model / "tokenizer.json"))
    zeros = tmp_path / "zeros.txt"
    zeros.write_bytes(bytes(5000))
    with pytest.raises(CalibrationError, match=r"zeros\.txt: holds zero bytes, as a text does not"):
        load_tokens(zeros, find_tokenizer([model]), rows=1, length=28)
