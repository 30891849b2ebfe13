"""Tuning on folders and texts of strangers: what cannot work is refused before the training, and nothing is overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounded import Run, exl2ray
from safetensors.torch import load_file, save_file
from small_sources import write_exl2, write_source
from tiny_models import byte_tokenizer

Spoil = Callable[[Path], object]  # of the folder that holds source, model and text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_source(tmp_path / "source")
    byte_tokenizer().save(str(write_exl2(tmp_path / "model") / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    return tmp_path


def tune(folder: Path, output: str = "out", *more: str) -> Run:
    flags = {"--reference": folder / "source", "-o": folder / output, "--text": folder / "text.txt", "--tokens": "4k",
             "--length": "64", "--step-tokens": "512", "--device": "cpu"}  # fmt: skip
    flags |= {k: folder / v if "/" not in v and k == "--reference" else v for k, v in zip(more[::2], more[1::2], strict=True)}
    return exl2ray("tune", folder / "model", *(str(x) for pair in flags.items() for x in pair), seconds=20)


def tensor(folder: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(root: Path) -> None:
        file = root / folder / ("model.safetensors" if folder == "source" else "output.safetensors")
        found = load_file(file)
        save_file({**found, name: change(found[name]).contiguous()}, file)

    return spoil


def config(folder: str, **values: object) -> Spoil:
    def spoil(root: Path) -> None:
        file = root / folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return spoil


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        make(root / name)

    return spoil


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 6 << 30)


def holds_a_thesis(root: Path) -> None:
    (root / "out").mkdir()
    (root / "out/thesis").touch()


def without_tokenizers(root: Path) -> None:
    for folder in ("model", "source"):
        (root / folder / "tokenizer.json").unlink()


def elsewhere(path: Path) -> None:
    path.symlink_to(path.parents[1] / "secret.json")
    (path.parents[1] / "secret.json").write_text("{}")


NAN = lambda t: t * float("nan")  # noqa: E731
REFUSED: list[tuple[str, Spoil, int, str]] = [
    ("NaN in the source", tensor("source", "model.norm.weight", NAN), 3, "NaN"),
    ("NaN in the model", tensor("model", "model.norm.weight", NAN), 3, "NaN"),
    ("layers without end", config("model", num_hidden_layers=2**31 - 1), 3, "the weights hold 2 layers"),
    ("another number of layers", config("source", num_hidden_layers=1), 3, "of another size"),
    ("half a file", lambda r: os.truncate(r / "model/output.safetensors", 20_000), 8, "truncated"),
    ("a licence that is a link", replaced("model/LICENSE", elsewhere), 3, "outside of the model's folder"),
    ("a config that is a link", replaced("model/config.json", elsewhere), 8, "config.json"),
    ("a side file of 6 GB", replaced("model/preprocessor_config.json", sparse), 3, "larger than"),
    ("text that is a pipe", replaced("text.txt", os.mkfifo), 4, "a FIFO, not a regular file"),
    ("text of the kernel", replaced("text.txt", lambda p: p.symlink_to("/proc/kmsg")), 4, "text.txt"),
    ("text of 6 GB of zeros", replaced("text.txt", sparse), 4, "holds only zeros"),
    ("no text", replaced("text.txt", Path.touch), 4, "is empty"),
    ("something in the output", holds_a_thesis, 2, "holds thesis"),
    ("no tokenizer", without_tokenizers, 3, "no tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "status", "word"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused_before_the_training(folder: Path, spoil: Spoil, status: int, word: str) -> None:
    spoil(folder)
    run = tune(folder)
    run.ends_with(status, word)
    assert "[tune]" not in run.text
    assert not list(folder.glob("out/*.safetensors"))
    assert not (folder / "out" / "config.json").exists()


@pytest.mark.parametrize("output", ["source", "model"])
def test_neither_model_is_overwritten(folder: Path, output: str) -> None:
    before = {p: p.read_bytes() for p in folder.glob("*/*")}
    tune(folder, output).ends_with(2, "itself")
    assert before == {p: p.read_bytes() for p in folder.glob("*/*")}


FLAGS = [("--tokens", "0"), ("--tokens", "-5"), ("--tokens", "999999999T"), ("--length", "0"), ("--rate", "nan"),
         ("--reference", "model"), ("--step-tokens", "1")]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), FLAGS, ids=lambda x: x)
def test_flags_out_of_range_are_named(folder: Path, flag: str, value: str) -> None:
    tune(folder, "out", flag, value).ends_with(2, flag)
