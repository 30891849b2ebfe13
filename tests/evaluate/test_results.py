"""What ``exl2ray eval`` prints and writes: tables, the one form of results, the plot of a ladder, what it all means."""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from bounded import exl2ray
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.cli import cli
from exl2ray.commands import evaluate as command
from exl2ray.commands.evaluate import write_positions
from exl2ray.errors import SourceError
from exl2ray.evaluate.forward import open_model, run_model
from exl2ray.evaluate.heldout import KINDS, heldout_kinds, heldout_rows, heldout_text
from exl2ray.evaluate.record import CLASSES, judged, parse_evaluation, parse_evaluations, verdict
from exl2ray.evaluate.result import model_size
from exl2ray.report.plot_files import is_plot
from exl2ray.report.style import Plot, write_plots

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SCHEMA = json.loads(resources.files("exl2ray.evaluate").joinpath("results.schema.json").read_text())


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo model, and twice with noise on its linears, much and little."""
    root = tmp_path_factory.mktemp("noisy")
    for name, amount in (("much", 0.2), ("little", 0.02)):
        (root / name).mkdir()
        for file in DEMO.iterdir():
            if file.suffix == ".json":
                (root / name / file.name).write_bytes(file.read_bytes())
        generator = torch.Generator().manual_seed(1)
        tensors = load_file(DEMO / "model.safetensors")
        for key, t in tensors.items():
            if "proj" in key:
                tensors[key] = (t.float() * (1 + amount * torch.randn(t.shape, generator=generator))).to(t.dtype)
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def printed(noisy: Path) -> tuple[str, dict[str, Any]]:
    """(as text, as JSON) of evaluations of both."""
    words = ["eval", "much", "little", "--reference", DEMO, "--device", "cpu", "--length", "256", "--rows"]
    text = exl2ray(*words, 10, "--ladder", "--plot", "plot.svg", cwd=noisy)
    text.ends_with(0)
    found = exl2ray(*words, 16, "--json", cwd=noisy)
    found.ends_with(0)
    return text.out, json.loads(found.out)


def test_the_tables(printed: tuple[str, dict[str, Any]], noisy: Path) -> None:
    lines = printed[0].splitlines()
    for column in ("decoder bpw", "head", "file", "flipped top-1", "p99.9"):
        assert any(column in line for line in lines)
    for kind in ("letters, law, news", "German and Spanish"):
        assert sum(f" {kind} " in line for line in lines) == 2
    sentences = [line for line in lines if "against" in line]
    assert [s.split(":")[0] for s in sentences] == ["much", "little"]
    assert (noisy / "plot.svg").read_text().startswith("<?xml")
    assert not (noisy / "ladder.png").exists()


def test_the_form_of_results(printed: tuple[str, dict[str, Any]]) -> None:
    found = printed[1]
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    much, little = parse_evaluations(json.dumps(found).encode(), "printed")
    for e in (much, little):
        assert e.kl is not None
        tail = [e.kl_tail[n].value for n in ("p95", "p99", "p99.9", "max")]
        assert e.kl.value < tail[0] <= tail[1] <= tail[2] <= tail[3]
        assert sum(k.predictions for k in e.kinds.values()) == e.predictions
        mean = sum(k.kl.value * k.predictions for k in e.kinds.values() if k.kl) / e.predictions
        assert mean == pytest.approx(e.kl.value, rel=1e-9)
    assert much.kl_tail["p99"].value > little.kl_tail["p99"].value
    result = found["results"][0]
    for wrong in ({**result, "kl": 3}, {**result, "rows": -1}, {k: v for k, v in result.items() if k != "kl_tail"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"results": [wrong]}, SCHEMA)


def test_without_a_reference_there_is_no_tail_and_no_judgement(noisy: Path) -> None:
    run = exl2ray("eval", "--model", noisy / "much", "--rows", "2", "--device", "cpu", "--length", "64")
    run.ends_with(0, "By kind of text")
    assert "what this share stays below" not in run.out
    assert "against" not in run.out


def test_files_take_the_place_of_earlier_ones_only(noisy: Path) -> None:
    (noisy / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\n a photograph")
    np.savez(noisy / "mine.npz", weights=np.zeros(3))
    for flag, name in (("--plot", "mine.png"), ("--positions", "mine.npz")):
        before = (noisy / name).read_bytes()
        exl2ray("eval", "much", flag, name, cwd=noisy).ends_with(7, f"{flag} {name} is there already, and is no")
        assert (noisy / name).read_bytes() == before
    for end in ("png", "svg", "pdf"):
        write_plots([Plot("a curve", lambda ax: ax.plot([1.0, 2.0]))], noisy / f"ours.{end}")
        assert is_plot((noisy / f"ours.{end}").read_bytes())
    write_positions(noisy / "ours.npz", [])
    words = ["--positions", "ours.npz", "--plot", "ours.png", "--rows", "9999"]
    exl2ray("eval", "much", *words, cwd=noisy).ends_with(2, "--rows 9999")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([], 2, "no model to evaluate"),
        (["much", "--plot", "x.gif"], 2, ".png, .svg"),
        (["much", "--plot", "not/there.png"], 2, "no folder"),
    ],
)
def test_refusals_come_before_any_work(noisy: Path, words: list[str], status: int, says: str) -> None:
    exl2ray("eval", *words, cwd=noisy).ends_with(status, says)


def test_every_token_has_one_kind_of_text() -> None:
    with load_tokenizer(DEMO, json.loads((DEMO / "config.json").read_text()), 10**6) as tokenizer:
        rows = heldout_rows(tokenizer, 128)
        kinds = heldout_kinds(tokenizer, rows)
        code = tokenizer.decode(rows[kinds["code"]].tolist())
        german = tokenizer.decode(rows[kinds["German and Spanish"]].tolist())
    assert list(kinds) == list(KINDS)
    assert torch.stack(list(kinds.values())).sum(dim=0).eq(1).all()
    assert "package quota" in code
    assert "Regentonne" in german
    assert "Regentonne" not in code
    assert len(code) + len(german) < len(heldout_text()) / 2


def test_what_a_divergence_means() -> None:
    assert [verdict(kl)[0] for kl in (0.0, 0.005, 0.02, 0.1, 0.3, 0.6, float("inf"), float("nan"))] == [
        "excellent", "excellent", "good", "fair", "poor", "bad", "bad", "bad",
    ]  # fmt: skip
    assert [limit for limit, *_ in CLASSES] == sorted(limit for limit, *_ in CLASSES)
    assert judged(6.0, None, None)[0] == ""
    assert judged(6.3, 6.0, None)[0] == "good"  # ln(6.3 / 6) = 0.049
    assert judged(5.9, 6.0, None)[0] == "excellent"
    word, sentence = judged(6.3, 6.0, 0.2, 0.8)
    assert word == "poor"
    assert sentence == ("Clearly worse than the source model; more bits would help: KL divergence 0.2 nats per token, "
                        "perplexity 6.3 against 6 of the source (+5.0%), the most probable token is another one in 20.0% of "
                        "places.")  # fmt: skip


def test_older_results_without_the_new_figures_are_read() -> None:
    found = parse_evaluation({"model": "m", "perplexity": {"value": 5, "standard_error": None}, "rows": 2}, "x")
    assert (found.kl, found.kl_tail, found.kinds, found.head_bpw) == (None, {}, {}, None)


def test_a_source_in_float64_is_evaluated_too(tmp_path: Path) -> None:
    """`convert` takes it as well."""
    for file in DEMO.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({k: t.double() for k, t in load_file(DEMO / "model.safetensors").items()}, tmp_path / "model.safetensors")
    size, half = (model_size(open_model(directory)) for directory in (tmp_path, DEMO))
    assert size.linears_bpw == 64
    assert size.head_bpw == 4 * half.head_bpw


def test_a_shape_of_any_size_is_shown_to_people(tmp_path: Path) -> None:
    for file in DEMO.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(DEMO / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, :100].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"embed_tokens.weight has shape \(\d+, 100\), expected \(any, 128\)"):
        run_model(tmp_path, torch.zeros(1, 8, dtype=torch.int64), "cpu")


def test_an_evaluation_that_is_stopped_says_that_it_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_many", stop)
    ran = CliRunner().invoke(cli, ["eval", str(DEMO), "--device", "cpu", "--rows", "2"])
    assert (ran.exit_code, ran.stderr) == (
        130, "stopped; an evaluation keeps nothing\n  hint: run the same command again: it begins anew\n"
    )  # fmt: skip


@pytest.mark.parametrize("harm", ["replaced", "gone"])
def test_a_model_that_is_changed_meanwhile_has_no_figures(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """Modules are read one after another: the first of one model, the others of another one."""
    model = Path(shutil.copytree(noisy / "little", tmp_path / "model"))
    run, weights = command.evaluate_many, model / "model.safetensors"

    def running(*given: Any, **more: Any) -> Any:
        found = run(*given, **more)
        if harm == "replaced":
            shutil.copy(noisy / "much" / weights.name, tmp_path / "new")
            os.replace(tmp_path / "new", weights)
        else:
            weights.unlink()
        return found

    monkeypatch.setattr(command, "evaluate_many", running)
    ran = CliRunner().invoke(cli, ["eval", str(model), "--reference", str(DEMO), "--device", "cpu", "--rows", "2"])
    assert ran.exit_code == SourceError.exit_code
    assert "model.safetensors was changed while it was evaluated" in ran.stderr or harm == "gone"
    assert "was changed while it was evaluated" in ran.stderr
