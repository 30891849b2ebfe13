"""Training a model for quality.py: the split of the text, and a model of toy size that a conversion takes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

train_model = pytest.importorskip("train_model", reason="transformers is not installed")

PROSE = "A line of text, which is not so very long.\n" * 20


def test_split_goes_by_the_end_of_the_path() -> None:
    paths = [Path(f"pkg{i % 37}/mod{i}.py") for i in range(4000)]
    sides = [train_model.side_of(p) for p in paths]
    assert sides == [train_model.side_of(Path("/elsewhere/vendored") / p) for p in paths]
    for side in ("eval", "calibration"):
        assert 40 < sides.count(side) < 130  # 2 % of 4000 is 80


@pytest.mark.parametrize(
    ("data", "readable"),
    [
        (PROSE.encode(), True),
        (PROSE[:100].encode(), False),  # too short
        (b"\xff\xfe" + PROSE.encode(), False),
        (PROSE.encode() + b"\0", False),
        (b"1234, 5678,\n" * 100, False),  # a table
        (b"word " * 1000, False),  # one line
    ],
)
def test_what_counts_as_text(tmp_path: Path, data: bytes, readable: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert (train_model.read(path) is not None) is readable


def test_collect_takes_no_text_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a/x.py": PROSE, "b/y.py": PROSE.replace("\n", "\n\n"), "b/z.md": PROSE + "More.", "b/w.bin": PROSE}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "b/v.rst").write_bytes(PROSE.encode())
    (tmp_path / "m.1.gz").write_bytes(gzip.compress((PROSE * 2).encode()))
    monkeypatch.setattr(train_model, "builtin_documents", lambda: ())
    monkeypatch.setattr(train_model, "roots", lambda: [(tmp_path, True)])
    assert sorted(len(f.text) // len(PROSE) for f in train_model.collect(1, 1, 0)) == [1, 1, 2]
    assert train_model.collect(1, 0.0001, 0) == []


def test_a_toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_model, "roots", lambda: [])  # the built-in text alone
    out = tmp_path / "toy"
    size = ["--hidden", "32", "--intermediate", "64", "--layers", "1", "--heads", "2", "--vocab", "512"]
    loop = ["--minutes", "0.02", "--batch-tokens", "512", "--eval-rows", "2", "--reports", "2", "--device", "cpu"]
    train_model.main(["--out", str(out), *size, *loop])
    record = json.loads((out / "training.json").read_text())
    assert record["eval_loss"] < np.log(512)
    tokens = np.load(out / "eval-tokens.npy")
    assert tokens.shape == (2, 1024)
    assert tokens.max() < 512
    assert pq.read_table(out / "calibration.parquet").num_rows > 0

    from exl2ray.formats.hf import SourceModel
    from exl2ray.model.arch import load_spec

    assert len(load_spec(SourceModel(out)).modules) == 5
