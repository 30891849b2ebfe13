"""A conversion that only reports, answers of the doctor's probes, and a way to call the program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exl2ray import convert as conversion
from exl2ray.cli import cli
from exl2ray.convert import OutputSummary, Summary
from exl2ray.doctor import examination as doctor
from exl2ray.doctor import probes
from exl2ray.events import Reporter
from exl2ray.recipe import Recipe

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """``run("convert", "-o", ...)``: result with stdout, stderr and exit_code. Exceptions never escape."""

    def call(*args: str) -> Result:
        return CliRunner().invoke(cli, list(args))

    return call


class FakeConversion:
    """Stands in for ``convert`` and ``dry_run``; keeps the recipes. ``error`` is raised after the first item."""

    def __init__(self) -> None:
        self.recipes: list[Recipe] = []
        self.dry: list[Recipe] = []
        self.error: BaseException | None = None

    def dry_run(self, recipe: Recipe, reporter: Reporter) -> None:
        self.dry.append(recipe)
        if self.error is not None:
            raise self.error

    def convert(self, recipe: Recipe, reporter: Reporter) -> Summary:
        self.recipes.append(recipe)
        event = reporter.event
        event("start", model=recipe.in_dir, architecture="LlamaForCausalLM", modules=15, bits=list(recipe.bits),
              device="cpu", workers=1, resumed=False)  # fmt: skip
        event("warning", message="sliding window: \x1b[31mnot red\x1b[0m")
        event("stage", stage="measure", items=3, done=0)
        for i in range(3):
            event("item", stage="measure", key=f"model.layers.{i}.mlp", done=i + 1, items=3, seconds=0.5,
                  detail="accuracy 0.81 .. 0.99")  # fmt: skip
            if self.error is not None:
                raise self.error
        event("end", stage="measure", seconds=1.5)
        if recipe.output_measurement is not None:
            return Summary((), recipe.output_measurement, 1.5)
        outputs = tuple(
            OutputSummary(b, b - 0.001, "out", ("out/output.safetensors",), 4_700_000, 12.28, float("nan"))
            for b in recipe.bits
        )
        event("done", outputs=[o.__dict__ for o in outputs], seconds=2.0)
        return Summary(outputs, "measurement.json", 2.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    stand_in = FakeConversion()
    monkeypatch.setattr(conversion, "convert", stand_in.convert)
    monkeypatch.setattr(conversion, "dry_run", stand_in.dry_run)
    return stand_in


@pytest.fixture
def job_args(tmp_path: Path) -> list[str]:
    """Flags of a conversion whose directories are in ``tmp_path``; the model is an empty folder."""
    (tmp_path / "model").mkdir()
    return ["-i", str(tmp_path / "model"), "-o", str(tmp_path / "work")]


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quick_probes(plain_environment: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """torch works, without GPUs; no kernels. Probing this machine for real takes seconds."""
    answers: dict[str, dict[str, Any]] = {
        probes.TORCH: {"version": "2.13.0", "cuda": None, "gpus": [], "reason": ""},
        probes.KERNEL: {"error": "numba.cuda.cudadrv.error.CudaSupportError: no driver"},
        probes.RAY: {"version": "2.60.0", "seconds": 7.5},
    }
    monkeypatch.setattr(doctor, "run_probe", answers.__getitem__)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: ([], ""))
    return answers
