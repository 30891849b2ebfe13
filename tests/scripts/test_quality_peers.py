"""Columns of other quantisers, with stand-ins of their packages: what they make is judged, failures cost one column."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import quality
import quality_peers
import quality_table
import tiny_models
import torch
from rounded_models import write_rounded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
EXL2 = """
import argparse, os, shutil, sys, time
parser = argparse.ArgumentParser()
for flag in ("-i", "-o", "-b", "-hb", "-cf", "-m"):
    parser.add_argument(flag)
args = parser.parse_args()
assert (args.m is not None) == (args.b == "5.0"), "only the second bitrate has a measurement to begin with"
assert os.environ["EXLLAMA_NO_SDPA"] == "1" and not os.listdir(args.o) and args.hb == "6"
if args.m:
    assert open(args.m).read() == "measured"
else:
    open(os.path.join(args.o, "measurement.json"), "w").write("measured")
if args.b == "3.0":
    sys.exit("no such bits")
if args.b == "4.0":
    time.sleep(3600)
if args.b != "5.0":
    shutil.copytree(os.environ["PEER_MODEL"], args.cf, dirs_exist_ok=True)
"""
EXL3 = """
import argparse, os, shutil
parser = argparse.ArgumentParser()
for flag in ("-i", "-o", "-b", "-w"):
    parser.add_argument(flag)
def prepare(args):
    return args, {}, True, None
def main(args, state):
    shutil.copytree(os.environ["PEER_MODEL"], args.o, dirs_exist_ok=True)
"""
EXL3_MODEL = """
import torch
from exl2ray.evaluate.forward import RunOptions, run_model
class Config:
    from_directory = staticmethod(lambda directory: directory)
class Model:
    from_config = classmethod(lambda cls, config: cls(config))
    def __init__(self, directory):
        self.directory, self.loaded, self.calls = directory, False, 0
    def load(self):
        self.loaded = True
    def forward(self, ids, params):
        assert self.loaded
        if params.get("attn_mode") == "flash_attn_nc":
            raise RuntimeError("no flash-attn here")
        self.calls += 1
        logits = run_model(self.directory, ids, "cpu", RunOptions()).logits(slice(0, 1), slice(0, ids.shape[1]))
        logits[..., 0] += 100 * self.calls if params else 0  # the second way is not causal
        return torch.nn.functional.pad(logits, (0, 64), value=50.0)  # columns beyond the vocabulary
"""


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins of both packages, of which little more is known than how they are called; an EXL2 model is what they make."""
    for path, text in (
        ("exllamav2/conversion/convert_exl2.py", EXL2), ("exllamav2/__init__.py", ""),
        ("exllamav3/conversion/convert_model.py", EXL3), ("exllamav3/__init__.py", EXL3_MODEL),
        ("exllamav2-9.dist-info/METADATA", "Name: exllamav2\nVersion: 9\n"),
        ("exllamav3-8.dist-info/METADATA", "Name: exllamav3\nVersion: 8\n"),
    ):  # fmt: skip
        file = tmp_path / "site" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("PEER_MODEL", str(tmp_path / "made"))
    monkeypatch.setattr(quality_peers, "DEVICES", ("cuda", "cpu"))
    return tmp_path


def test_columns_of_peers_and_what_their_failures_cost(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One model by both: the same figures; and whatever a peer does, the other columns are there."""
    source = tiny_models.write_model(peers / "source", hidden_size=128, intermediate_size=256)
    np.save(source / "eval-tokens.npy", np.random.default_rng(1).integers(3, 259, (2, 64)))
    write_rounded(source, peers / "made")
    work = peers / "work"
    arguments = ["--model", f"demo={source}", "--variant", "A:peer:exllamav2 -hb 6", "--variant", "B:peer:exllamav3",
                 "--variant", "C:peer:exllamav4", "--bits", "2.5", "5.0", "--draws", "2", "--work", str(work),
                 "--rows", "2", "--length", "64", "--device", "cpu", "--threads", "1", "--match-bytes"]  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert quality.main(arguments) == 1, "one conversion failed"
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err
    for words in ("failed: demo, builtin, draw 0, 5 bpw, A", "wrote no model", "skipped: demo, draw 1, 5 bpw, B",
                  "skipped: demo, draw 0, 5 bpw, C: exllamav4: known are"):  # fmt: skip
        assert words in said
    results = quality_table.load([work / "results.jsonl"])
    assert [(r["variant"], r["bits"], r["version"]) for r in results] == [("A", 2.5, "9"), ("B", 2.5, "8"), ("B", 5.0, "8")]
    assert results[0]["rows"]["kl"] == pytest.approx(results[1]["rows"]["kl"], rel=1e-3)
    (left,) = (work / "jobs").iterdir()
    assert left.name.startswith("demo-builtin-peer-")
    assert left.read_text() == "measured", "nothing else is left"
    study = quality.Study(quality.parse_args([*arguments, "--variant", "ours:"]))
    ours = study.groups()[1][3]
    assert (ours.draw, ours.variant.name, ours.bits) == (1, "ours", 2.5)
    done = {(r["key"], r["source"]): r for r in results}
    assert study.target(ours, {}, done) == results[0]["file_bytes"], "as large as the peer's only draw"


@pytest.mark.parametrize(("bits", "why"), [(3.0, "ended with 1: no such bits"), (4.0, "took more than 2 s")])
def test_a_peer_that_fails_or_hangs_is_ended(peers: Path, bits: float, why: str) -> None:
    model: Any = argparse.Namespace(device="cpu", path=DEMO, fingerprint="f")
    with pytest.raises(quality_peers.Failed, match=f"-m exllamav2.conversion.convert_exl2 {why}"):
        quality_peers.convert(model, "peer:exllamav2 -hb 6", bits, peers / "w", peers / "o", seconds=3600 if bits < 4 else 2)


def test_a_measurement_serves_the_same_model_and_flags_alone(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def run(command: list[str], seconds: float) -> str:
        asked.append("-m" in command[2:])
        (peers / "w" / "measurement.json").write_text("measured")
        return ""

    monkeypatch.setattr(quality_peers, "_run", run)
    (peers / "w").mkdir()
    for fingerprint, flags in (("f", ["-hb", "6"]), ("f", ["-hb", "8"]), ("g", []), ("f", ["-c", "other"])):
        model: Any = argparse.Namespace(path=DEMO, fingerprint=fingerprint)
        quality_peers._exllamav2(model, ["-b", "3.0", *flags, "-o", str(peers / "w"), "-cf", "o"], peers / "w", 1)
    assert asked == [False, True, False, False]


def test_a_model_without_tensors_is_none(peers: Path) -> None:
    (peers / "made").mkdir()
    save_file({}, peers / "made" / "model.safetensors")
    model: Any = argparse.Namespace(device="cpu", path=DEMO, fingerprint="f")
    with pytest.raises(quality_peers.Failed, match="exllamav3: ended without an error, but wrote no model"):
        quality_peers.convert(model, "peer:exllamav3", 4.0, peers / "w", peers / "o", seconds=60)


def test_a_text_only_gemma_3_is_laid_out_like_one_with_an_image_tower(tmp_path: Path) -> None:
    source = tiny_models.write_model(tmp_path / "source", "Gemma3", num_hidden_layers=6)
    (source / "model.safetensors.index.json").write_text("{}")
    tensors = load_file(source / "model.safetensors")
    with quality_peers._as_it_reads(source, tmp_path) as place:
        copied = load_file(place / "model.safetensors")
        assert not place.name.startswith(".")
        assert (place / "tokenizer.json").is_file()
        assert not (place / "model.safetensors.index.json").exists()
        images = json.loads((place / "preprocessor_config.json").read_text())
        config = json.loads((place / "config.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["source"], "the copy is gone"
    assert images["image_processor_type"] == "Gemma3ImageProcessor"
    assert sorted(copied) == sorted(f"language_model.{name}" for name in tensors)
    assert all(torch.equal(copied[f"language_model.{name}"], tensor) for name, tensor in tensors.items())
    before = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert config["vision_config"]["hidden_size"] % config["vision_config"]["num_attention_heads"] == 0
    assert {k: v for k, v in text.items() if k in before} == before
    assert text["rope_theta"] == before["rope_parameters"]["full_attention"]["rope_theta"] != 1e4
    assert config["layer_types"] == before["layer_types"], "read outside text_config"
    with quality_peers._as_it_reads(DEMO, tmp_path) as place:
        assert place == DEMO


def test_bos_is_in_front_where_the_family_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer adds none of its own: transformers stands in for it, with the weights of the source."""
    source = tiny_models.write_model(tmp_path / "source", "Gemma3")
    seen: list[list[int]] = []

    class Stand:
        def __init__(self, directory: str) -> None:
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

        def load(self) -> None:
            pass

        def forward(self, ids: torch.Tensor, params: dict[str, str]) -> torch.Tensor:
            seen.append(ids[0].tolist())
            return self.model(ids).logits

    package = SimpleNamespace(Config=SimpleNamespace(from_directory=str), Model=SimpleNamespace(from_config=Stand))
    monkeypatch.setitem(sys.modules, "exllamav3", package)
    ids = torch.randint(3, tiny_models.VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    found = quality_peers.judge(str(source), str(source), ids, torch.float32, "cpu")
    assert seen[-1] == [1, *ids[1].tolist()]
    assert found["kl"].shape == (2, 11)
    assert abs(found["kl"]).max() < 1e-3
    assert found["top1"].min() == 1
    assert found["nll"] == pytest.approx(found["source_nll"], abs=1e-2)


def test_peers_that_cannot_run_are_skipped_with_a_reason(tmp_path: Path) -> None:
    model: Any = argparse.Namespace(device="cpu", path=DEMO, fingerprint="f")
    assert quality_peers.peer_of("-hb 6") is None
    assert quality_peers.peer_of("peer:exllamav2 -hb 6") == "exllamav2"
    for package, reason in (("torch", "known are exllamav2, exllamav3"), ("exllamav3", "not installed|needs a CUDA GPU")):
        with pytest.raises(quality_peers.Skipped, match=reason):
            quality_peers.convert(model, f"peer:{package}", 3.0, tmp_path, tmp_path, 1)
