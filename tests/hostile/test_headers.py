"""Headers of safetensors files: more than a model has, or names and shapes that are none. See also tests/corrupt."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from small_sources import write_exl2, write_source

from exl2ray.errors import SourceError
from exl2ray.formats.hf import MAX_FILES, SourceModel
from exl2ray.formats.tensorfile import MAX_TENSORS, TensorFile, open_files
from exl2ray.formats.verify import verify_directory
from exl2ray.model.arch import load_spec

DRY = ("-b", "4", "--device", "cpu", "--executor", "inline", "-l", "128", "-ml", "128", "--dry-run")


def write(path: Path, header: Any, data_bytes: int = 0) -> Path:
    """A file of holes behind a header."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + data_bytes)
    return path


def empty(shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]}


def many(count: int, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{i}": empty([0]) for i in range(count)}


HEADERS: dict[str, tuple[Any, str]] = {
    "nothing, but of a huge shape": ({"w": empty([0, 2**62, 2**62])}, "beyond what can be counted"),
    "nothing, but wide": ({"w": empty([2**62, 4, 0])}, "beyond what can be counted"),
    "a scalar that takes no byte": ({"w": empty([])}, "needs 2 bytes"),
    "product that wraps to 0 in 64 bits": ({"w": empty([2**32, 2**32])}, "needs"),
    "product that wraps to the size": ({"w": {**empty([2**62 + 1, 4]), "data_offsets": [0, 8]}}, "needs"),
    "dimension beyond 63 bits": ({"w": empty([2**63, 0])}, "counts"),
    "control characters in a name": ({"\x1b[31m\x07w": empty([5])}, "'\\x1b[31m\\x07w'"),
    "line ends in a name": ({"w\nerror: all is well": empty([5])}, "'w\\nerror"),
    "name turned around": ({"\u202ew": empty([5])}, "\\u202e"),
    "half a character in a name": (b'{"\\ud800": {}}', "lone surrogate"),
    "metadata nested": ({"__metadata__": {"a": {"b": 1}}}, "__metadata__"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "appears twice"),
    "a name twice, spelled differently": (b'{"w":{},"\\u0077":{}}', "appears twice"),
    "a comment": (b'{"w": 1 /* x */}', "a comment"),
    "a trailing comma": (b'{"w": 1,}', "a trailing comma"),
    "UTF-16": ('{"w": 1}'.encode("utf-16"), "UTF-16"),
    "no header at all": (b"", "is empty"),
    "zeros": (bytes(1000), "only zeros"),
    "deep in the metadata": (b'{"__metadata__":' + b'{"a":' * 1_000_000, "nested too deeply"),
    "an offset of many digits": (b'{"w":{"data_offsets":[0,' + b"1" * 10_000 + b"]}}", "10000 digits"),
    "an offset in exponents": (b'{"w":{"dtype":"F16","shape":[0],"data_offsets":[0,0e99]}}', "not a pair of byte offsets"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    header, words = HEADERS[case]
    path = write(tmp_path / "model.safetensors", header, 8 if "wraps to the size" in case else 0)
    start = time.process_time()
    with pytest.raises(SourceError) as e:
        TensorFile(path)
    assert words in e.value.message
    assert e.value.hint
    assert len(e.value.message) < 1500
    assert "\x1b" not in e.value.message
    assert time.process_time() - start < 3


OTHERS: dict[str, tuple[bytes, str, str]] = {
    "web page": (b"<!DOCTYPE html><html>Just a moment", "a web page", "fetch it again"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer", "git lfs pull"),
    "answer of a server": (b"Invalid username or password.", "text in place of the weights: 'Invalid username", "your token"),
    "torch.save": (b"PK\x03\x04\0\0\x08\x08" + bytes(50), "a ZIP file, as torch.save writes", "in safetensors"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(50), "a GGUF file", "in safetensors"),
    "space that was never filled": (bytes(5000), "the file begins with zeros", "fetch it again"),
    "nothing": (b"", "0 bytes", "fetch the file again"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_stands_in_the_place_of_weights_is_named(case: str, tmp_path: Path) -> None:
    content, words, hint = OTHERS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=words) as e:
        TensorFile(tmp_path / "model.safetensors")
    assert hint in e.value.hint


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b", "", "model.layers.-1.x"])
def test_names_are_never_paths(name: str, tmp_path: Path) -> None:
    """Whatever a tensor is called, it is one more tensor."""
    directory = write_source(tmp_path / "m")
    write(directory / "more.safetensors", {name: empty([0])})
    before = sorted(os.listdir(tmp_path))
    run = exl2ray("convert", "-i", directory, "-o", tmp_path / "w", *DRY)
    assert run.status in (0, 3), str(run)
    assert not run.stopped
    assert "Traceback" not in run.text
    assert sorted(os.listdir(tmp_path)) == before


def test_tensors_are_counted_over_all_shards(tmp_path: Path) -> None:
    directory = write_exl2(tmp_path / "m")
    for i in range(2):
        write(directory / f"more-{i}.safetensors", many(MAX_TENSORS * 51 // 100, f"{i}."))
    with pytest.raises(SourceError, match=f"more than {MAX_TENSORS} tensors in 2 files"):
        open_files(sorted(directory.glob("more-*.safetensors")))
    exl2ray("verify", directory).ends_with(8, f"more than {MAX_TENSORS} tensors")


def test_files_are_counted(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "m")
    shard = write(tmp_path / "empty.safetensors", {})
    for i in range(MAX_FILES):
        os.link(shard, directory / f"{i}.safetensors")
    with pytest.raises(SourceError, match="safetensors files; at most"):
        SourceModel(directory)


def test_empty_tensors_do_not_make_room_for_counts(tmp_path: Path) -> None:
    """A tensor of no bytes may have any width; config.json is held against those that hold something."""
    directory = write_source(tmp_path / "m")
    write(directory / "more.safetensors", {"x": empty([0, 2**31 - 1])})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**31 - 1}))
    with pytest.raises(SourceError, match="intermediate_size is 2147483647, but no tensor"):
        load_spec(SourceModel(directory))


def test_a_quantised_model_that_is_sound_stays_so(tmp_path: Path) -> None:
    assert verify_directory(write_exl2(tmp_path / "q")) == []
