"""Broken and hostile model files: each must raise its typed error, naming file and field, in time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from corrupt_helpers import expect
from exl2_numpy import pack_linear_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from exl2ray.errors import FormatError, SourceError
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import GroupLayout
from exl2ray.formats.shards import TensorEntry, write_tensor_file
from exl2ray.formats.side_files import copy_side_files
from exl2ray.formats.summary import inspect_directory
from exl2ray.formats.tensorfile import TensorFile, read_tensor
from exl2ray.formats.verify import verify_directory

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}


# -- safetensors ---------------------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(data: bytes = b"\0" * 16, **changes: object) -> bytes:
    """A file with one F32 tensor "w" of four entries, with changed header fields."""
    return raw({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}, data)


def two(first: list[int], second: list[int], data: bytes = b"\0" * 32) -> bytes:
    entry = {"dtype": "F32", "shape": [4]}
    return raw({"w": {**entry, "data_offsets": first}, "v": {**entry, "data_offsets": second}}, data)


HUGE = 2**62
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4976698672\n"

# content of model.safetensors -> what the message must name
SAFETENSORS: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["0 bytes"]),
    "shorter than the length field": (b"\x10\0\0", ["3 bytes"]),
    "git lfs pointer": (LFS_POINTER, ["model.safetensors", "LFS"]),
    "header length beyond the file": (raw({}, length=HUGE), ["header length"]),
    "header length with the sign bit": (raw({}, length=2**64 - 1), ["header length"]),
    "header not json": (raw(b"{'w': 1}"), ["header", "not valid JSON"]),
    "header not utf-8": (raw(b'{"\xff": 1}'), ["header", "not UTF-8"]),
    "header a list": (raw([1, 2]), ["header", "list"]),
    "header cut off": (raw(b'{"w": {"dtype": "F32", "sha'), ["header", "not valid JSON"]),
    "nested lists": (raw(b'{"w":' + b"[" * 200_000), ["header", "nested too deeply"]),
    "nested objects": (raw(b'{"w":' * 100_000), ["header", "nested too deeply"]),
    "duplicate name": (raw(b'{"w": {}, "w": {}}'), ["header", "'w' appears twice"]),
    "duplicate field": (raw(b'{"w": {"dtype": "F32", "dtype": "F16"}}'), ["header", "'dtype' appears twice"]),
    "entry not an object": (raw({"w": 5}), ["'w'", "dtype, shape and data_offsets"]),
    "field missing": (raw({"w": {"dtype": "F32", "shape": [4]}}), ["'w'", "data_offsets"]),
    "surplus field": (one(extra=1), ["'w'", "exactly"]),
    "unknown dtype": (one(dtype="F31"), ["'w'", "dtype 'F31'"]),
    "dtype a number": (one(dtype=32), ["'w'", "dtype"]),
    "dtype a list": (one(dtype=[["F32"]]), ["'w'", "dtype"]),
    "sub-byte dtype": (one(dtype="F4"), ["'w'", "dtype F4"]),
    "negative dimension": (one(shape=[-4]), ["'w'", "shape"]),
    "fractional dimension": (one(shape=[4.0]), ["'w'", "shape"]),
    "boolean dimension": (one(shape=[True]), ["'w'", "shape"]),
    "shape not a list": (one(shape="4"), ["'w'", "shape"]),
    "enormous shape": (one(shape=[HUGE, HUGE]), ["'w'", "needs"]),
    "dimension of 4000 digits": (one(shape=[int("9" * 4000)]), ["w.shape.0", "4000 digits"]),
    "number of 100000 digits": (raw(b'{"w": {"shape": [' + b"9" * 100_000 + b"]}}"), ["header"]),
    "a million dimensions": (one(shape=[1] * 1_000_000), ["'w'", "shape"]),
    "shape larger than the data": (one(shape=[5]), ["'w'", "needs 20 bytes", "hold 16"]),
    "offsets beyond the file": (one(data_offsets=[0, 1 << 40]), ["'w'", "data_offsets", "truncated"]),
    "offsets reversed": (one(data_offsets=[16, 0]), ["'w'", "data_offsets"]),
    "offsets negative": (one(data_offsets=[-16, 0]), ["'w'", "data_offsets"]),
    "offsets not a pair": (one(data_offsets=[0, 8, 16]), ["'w'", "data_offsets"]),
    "offset infinite": (raw(b'{"w": {"dtype":"F32","shape":[4],"data_offsets":[0,1e999]}}'), ["w.data_offsets.1", "1e999"]),
    "offset NaN": (raw(b'{"w": {"dtype":"F32","shape":[4],"data_offsets":[0,NaN]}}'), ["header", "NaN"]),
    "truncated by one byte": (one(data=b"\0" * 15), ["'w'", "15 bytes", "truncated"]),
    "data left over": (one(data=b"\0" * 17), ["1 bytes", "no tensor"]),
    "tensors overlap": (two([0, 16], [8, 24]), ["'v'", "overlaps", "'w'"]),
    "tensors share their bytes": (two([0, 16], [0, 16]), ["overlaps"]),
    "hole between tensors": (two([0, 16], [24, 40], b"\0" * 40), ["'v'", "hole of 8 bytes"]),
    "hole before the first": (one(data=b"\0" * 24, data_offsets=[8, 24]), ["'w'", "hole"]),
    "metadata not strings": (raw({"__metadata__": {"format": 1}}), ["__metadata__"]),
    "metadata a list": (raw({"__metadata__": []}), ["__metadata__"]),
    "name of a megabyte": (raw({"n" * 1_000_000: {}}), ["1000000 characters"]),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_broken_safetensors(tmp_path: Path, case: str) -> None:
    content, named = SAFETENSORS[case]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(content)
    expect(SourceError, lambda: SourceModel(tmp_path), "model.safetensors", *named)
    expect(FormatError, lambda: Exl2Model(tmp_path), "model.safetensors", *named)
    assert any(p.file == "model.safetensors" and p.rule == "file" for p in verify_directory(tmp_path))


def test_header_limit_needs_no_memory(tmp_path: Path) -> None:
    """A sparse file whose header claims 10 GB is refused by its length alone."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write((10 << 30).to_bytes(8, "little"))
        f.truncate(11 << 30)
    expect(SourceError, lambda: SourceModel(tmp_path), "model.safetensors", "exceeds the limit")


# -- directories and config.json -----------------------------------------------------------------------------------


def good_source(path: Path) -> None:
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(one())


def config_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / "config.json").write_bytes(content)


def config_with(**keys: object) -> Callable[[Path], object]:
    return config_bytes(json.dumps({**CONFIG, **keys}).encode())


def index(content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / "model.safetensors.index.json").write_bytes(content)


def dangling(path: Path) -> None:
    (path / "model-2.safetensors").symlink_to(path / "blobs" / "0123")


def pipe(path: Path) -> None:
    os.mkfifo(path / "model-2.safetensors")


DIRECTORIES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json", "missing"]),
    "config a directory": (
        lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()),
        ["config.json", "regular file"],
    ),
    "config empty": (config_bytes(b""), ["config.json", "not valid JSON"]),
    "config binary": (config_bytes(b"\x80\x04\x95"), ["config.json", "not valid JSON"]),
    "config a list": (config_bytes(b"[]"), ["config.json", "list"]),
    "config nested": (config_bytes(b'{"a":' + b"[" * 100_000), ["config.json", "nested"]),
    "config too large": (config_bytes(b" " * (17 << 20)), ["config.json", "larger than"]),
    "no architectures": (config_bytes(b'{"hidden_size": 4}'), ["config.json", "architectures"]),
    "two architectures": (config_with(architectures=["A", "B"]), ["config.json", "architectures"]),
    "architecture a number": (config_with(architectures=[1]), ["config.json", "architectures"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["no *.safetensors"]),
    "dangling link": (dangling, ["model-2.safetensors", "regular file"]),
    "named pipe": (pipe, ["model-2.safetensors", "regular file"]),
    "same tensor in two shards": (
        lambda p: (p / "model.safetensors").rename(p / "first.safetensors") and (p / "copy.safetensors").write_bytes(one()),
        ["'w'", "copy.safetensors", "first.safetensors"],
    ),
    "index not json": (index(b"{"), ["index.json", "not valid JSON"]),
    "index without a map": (index(b"{}"), ["index.json", "weight_map"]),
    "index map a list": (index(b'{"weight_map": []}'), ["index.json"]),
    "index nested": (index(b"[" * 100_000), ["index.json", "nested"]),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_broken_source_directory(tmp_path: Path, case: str) -> None:
    change, named = DIRECTORIES[case]
    good_source(tmp_path)
    SourceModel(tmp_path)
    change(tmp_path)
    expect(SourceError, lambda: SourceModel(tmp_path), str(tmp_path), *named)


# -- links ---------------------------------------------------------------------------------------------------------


SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_bytes(SECRET)
    return tmp_path / "home" / "id_rsa"


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "config.json"])
@pytest.mark.parametrize("how", ["absolute", "relative", "through a link", "similar folder", "blobs of another"])
def test_link_out_of_the_model(tmp_path: Path, elsewhere: Path, name: str, how: str) -> None:
    model = tmp_path / "models--a--b" / "snapshots" / "0123"
    model.mkdir(parents=True)
    good_source(model)
    link, target = model / name, elsewhere
    link.unlink(missing_ok=True)
    if how == "similar folder":
        target = Path(shutil.copytree(elsewhere.parent, f"{model}-private")) / "id_rsa"
    elif how == "blobs of another":
        target = Path(shutil.copytree(elsewhere.parent, tmp_path / "models--me--private" / "blobs")) / "id_rsa"
    if how == "through a link":
        (model / "onnx").symlink_to(target.parent)
        link.symlink_to("onnx/id_rsa")
    else:
        link.symlink_to(os.path.relpath(target, model) if how == "relative" else target)
    copy = partial(copy_side_files, model, tmp_path / "out")
    expect(SourceError, copy, f"{link}: a link to {target}, outside", "put the file itself in its place")
    assert not any(p.is_file() for p in (tmp_path / "out").rglob("*"))


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """Also where the folder itself is a link, and links inside a folder."""
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0a1b").write_text("{}")
    model = repository / "snapshots" / "0123"
    model.mkdir(parents=True)
    good_source(model)
    (model / "tokenizer.json").symlink_to("../../blobs/0a1b")
    (model / "tokenizer_config.json").symlink_to("tokenizer.json")
    (tmp_path / "model").symlink_to(model)
    assert copy_side_files(tmp_path / "model", tmp_path / "out") == ["tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_path_that_is_no_directory(tmp_path: Path) -> None:
    expect(SourceError, lambda: SourceModel(tmp_path / "absent"), "absent", "does not exist")


# -- EXL2 ----------------------------------------------------------------------------------------------------------

KEY = "model.layers.0.mlp.up_proj"


def linear() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return pack_linear_numpy(
        KEY,
        rng.integers(0, 4, (96, 32)).astype(np.uint8),
        rng.integers(1, 17, (2, 32)),
        np.ones(2, dtype=np.float16),
        rng.permutation(96),
        GroupLayout((4, 2), (32, 64)),
    ).tensors()


def numbers(*values: int, dtype: torch.dtype = torch.int16) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# replaced tensors (None removes one) -> what the message must name
EXL2: dict[str, tuple[dict[str, torch.Tensor | None], list[str]]] = {
    "no q_invperm": ({"q_invperm": None}, ["q_invperm"]),
    "no q_scale": ({"q_scale": None}, ["q_scale"]),
    "no q_groups": ({"q_groups": None}, ["q_groups"]),
    "q_groups empty": ({"q_groups": numbers()}, ["q_groups"]),
    "q_groups odd": ({"q_groups": numbers(4, 0, 2)}, ["q_groups", "3 numbers"]),
    "offset past the end": ({"q_groups": numbers(4, 0, 2, 30000)}, ["q_groups", "30000"]),
    "offset negative": ({"q_groups": numbers(4, 0, 2, -4)}, ["q_groups", "-4"]),
    "width zero": ({"q_groups": numbers(0, 0, 2, 4)}, ["q_groups", "width 0"]),
    "width seven": ({"q_groups": numbers(7, 0, 1, 7)}, ["q_groups", "width 7"]),
    "q_scale_max float32": ({"q_scale_max": torch.ones(2)}, ["q_scale_max", "float32"]),
    "q_scale_max NaN": ({"q_scale_max": torch.full((2,), torch.nan, dtype=torch.float16)}, ["q_scale_max", "NaN"]),
    "scales of another width": ({"q_scale": torch.zeros(2, 8, dtype=torch.int32)}, ["q_scale", "(2, 8)"]),
    "q_weight one-dimensional": ({"q_weight": torch.zeros(8, dtype=torch.int32)}, ["q_weight", "(8,)"]),
    "q_weight without rows": ({"q_weight": torch.zeros(0, 32, dtype=torch.int32)}, ["q_groups"]),
    "permutation out of range": ({"q_invperm": torch.arange(1, 97, dtype=torch.int32)}, ["q_invperm"]),
    "permutation too short": ({"q_invperm": torch.arange(64, dtype=torch.int32)}, ["q_invperm"]),
    "permutation empty": ({"q_invperm": numbers(dtype=torch.int32)}, ["in_features 0"]),
    "bias bfloat16": ({"bias": torch.zeros(32, dtype=torch.bfloat16)}, ["bias", "bfloat16"]),
    "bias too long": ({"bias": torch.zeros(64, dtype=torch.float16)}, ["bias", "64"]),
}


@pytest.mark.parametrize("case", EXL2)
def test_broken_linear(tmp_path: Path, case: str) -> None:
    changes, named = EXL2[case]
    tensors = {**linear(), **{f"{KEY}.{name}": t for name, t in changes.items()}}
    entries = [TensorEntry.of(n, t) for n, t in tensors.items() if t is not None]
    write_tensor_file(tmp_path / "output.safetensors", entries)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    expect(FormatError, lambda: Exl2Model(tmp_path).linear(KEY), KEY, *named)
    assert any(p.rule == "linear" and p.tensor == KEY for p in verify_directory(tmp_path))


@pytest.mark.parametrize("case", ["no q_groups", "q_groups odd", "width seven", "q_weight one-dimensional"])
def test_summary_of_a_broken_linear(tmp_path: Path, case: str) -> None:
    test_broken_linear(tmp_path, case)
    expect(FormatError, lambda: inspect_directory(tmp_path), KEY)


def test_the_unbroken_inputs_are_accepted(tmp_path: Path) -> None:
    """The cases above fail for their defect, not for the frame around it."""
    good_source(tmp_path)
    assert SourceModel(tmp_path).names() == ["w"]
    write_tensor_file(tmp_path / "model.safetensors", [TensorEntry.of(n, t) for n, t in linear().items()])
    assert Exl2Model(tmp_path).linear(KEY).in_features == 96


# -- random damage -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_to_a_header_is_noticed_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever we accept, the safetensors library accepts too, with the same tensors."""
    path = tmp_path_factory.mktemp("d") / "t.safetensors"
    content = bytearray(two([0, 16], [16, 32], bytes(range(32))))
    header_end = 8 + int.from_bytes(content[:8], "little")
    alphabet = st.sampled_from(b'0123456789{}[]",:wvF \x00\xff')
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_end - 1))
        how = data.draw(st.sampled_from(["replace", "delete", "insert"]))
        content[at : at + (how != "insert")] = b"" if how == "delete" else bytes([data.draw(alphabet)])
    path.write_bytes(content)
    try:
        ours = TensorFile(path)
    except SourceError:
        return
    theirs = load_file(path)
    assert set(theirs) == set(ours.tensors)
    for name, tensor in theirs.items():
        assert read_tensor(ours.tensors[name]).dtype == tensor.dtype
        assert torch.equal(read_tensor(ours.tensors[name]).view(torch.uint8), tensor.view(torch.uint8))
