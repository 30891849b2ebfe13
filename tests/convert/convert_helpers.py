"""Running small conversions and looking at what they left."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exl2ray.convert import Summary, convert
from exl2ray.events import Silent
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.tensorfile import TensorFile
from exl2ray.formats.verify import verify_directory
from exl2ray.model.arch import load_spec
from exl2ray.recipe import Recipe

MEASURED, QUANTISED = 5, 8  # calibration rows
MODULES = [f"model.layers.{i}.{half}" for i in range(2) for half in ("self_attn", "mlp")]  # of the tiny model
TENSORS = (".q_weight", ".q_scale", ".q_scale_max", ".q_groups", ".q_invperm", ".bias")


@dataclass(frozen=True)
class Quiet:
    """An undisturbed conversion at 4 and 5 bpw; its directories must not be changed."""

    model: Path
    work: Path
    outputs: dict[float, Path]
    summary: Summary
    reporter: Silent


@cache
def calibration_file() -> str:
    """A file with enough text for some rows: much quicker than the 134 rows of the built-in set."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    text = [f"Line {i} of some text, with {i * i} and {i**3 % 1009} in it and {chr(97 + i % 26) * 3}." for i in range(99)]
    Path(directory, "calibration.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    return f"{directory}/calibration.jsonl"


def recipe(model: Path, out: Path, **changes: Any) -> Recipe:
    """A few rows of 128 tokens, 4 bpw, on the CPU and in this process."""
    settings: dict[str, Any] = {
        "bits": (4.0,), "length": 128, "measurement_length": 128, "executor": "inline", "device": "cpu",
        "evaluate": "never", "quality": "reference",
        "cal_dataset": calibration_file(), "measurement_rows": MEASURED, "dataset_rows": QUANTISED,
    }  # fmt: skip
    return Recipe(**{"in_dir": str(model), "out_dir": str(out), **settings, **changes})


def run(model: Path, out: Path, **changes: Any) -> tuple[Summary, Silent]:
    reporter = Silent()
    return convert(recipe(model, out, **changes), reporter), reporter


def without_scores(value: Any) -> Any:
    """Of a measurement.json, read: all but the accuracies, which are of few rows where nothing is chosen by them."""
    if isinstance(value, dict):
        return {k: without_scores(v) for k, v in value.items() if k not in ("accuracy", "scores")}
    return [without_scores(v) for v in value] if isinstance(value, list) else value


def again(quiet: Quiet, root: Path, **changes: Any) -> Silent:
    settings = {"bits": (4.0, 5.0), "compile_full": str(root / "out-{bpw}")}
    return run(quiet.model, root / "work", **{**settings, **changes})[1]


def stages(reporter: Silent) -> list[str]:
    return [fields["stage"] for name, fields in reporter.events if name == "stage"]


def items(reporter: Silent) -> list[str]:
    """Keys of the modules that were computed, each with its stage."""
    return [f"{fields['stage']}: {fields['key']}" for name, fields in reporter.events if name == "item"]


def messages(reporter: Silent, kind: str) -> list[str]:
    return [fields["message"] for name, fields in reporter.events if name == kind]


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def shapes(model: Path) -> dict[str, LinearShape]:
    """Shape of every linear of the output."""
    spec = load_spec(SourceModel(model))
    return {x.key: LinearShape(x.in_features, x.out_features, x.has_bias) for x in spec.linears}


def assert_sound(model: Path, output: Path) -> None:
    assert verify_directory(output, shapes(model)) == []


def quantised_bytes(output: Path, keys: set[str]) -> int:
    """Bytes of the tensors of quantised linears in the shards of a directory."""
    total = 0
    for shard in output.glob("*.safetensors"):
        for name, info in TensorFile(shard).tensors.items():
            if name.endswith(TENSORS) and name.rsplit(".", 1)[0] in keys:
                total += info.nbytes
    return total


def logged(work: Path, name: str) -> list[dict[str, Any]]:
    """Fields of all events of a name in the work directory's log."""
    lines = (work / "events.jsonl").read_text().splitlines()
    return [e["fields"] for e in map(json.loads, lines) if e["name"] == name]
