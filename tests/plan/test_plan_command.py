"""The command: what people and programs read, exit codes, the probe for real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from header_models import LLAMA_405B, write_header_model

from exl2ray.cli import cli
from exl2ray.plan import compose

SHORT = ("-l", "128", "-ml", "128")


def run(*args: str) -> Result:
    """With the plain algorithm, whose sizes the figures below are; test_sizes.py has the others."""
    return CliRunner().invoke(cli, ["plan", "--quality", "reference", *args])


def answer(*args: str) -> dict[str, Any]:
    result = run(*args, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["sound"] == (result.exit_code == 0)
    return found


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_405b_model_from_headers_alone(tmp_path: Path) -> None:
    model = write_header_model(tmp_path / "405b", LLAMA_405B, 16)
    found = answer("-i", str(model), "-b", "3", "-b", "4.25")
    assert found["layers"] == 126
    assert found["weights"] == 405_853_388_800
    assert found["source_bytes"] == 2 * found["weights"]
    assert [s["bits"] for s in found["sizes"]] == [3, 4.25]
    for size in found["sizes"]:
        assert not size["exact"]
        assert size["low_bytes"] < size["high_bytes"] < 1.01 * size["low_bytes"]
        table = 128256 * 16384  # embedding in float16, head with somewhat more than 6 bits
        decoder = found["weights"] - 2 * table
        assert size["high_bytes"] == pytest.approx(size["bits"] / 8 * decoder + 2 * table + 6.35 / 8 * table, rel=0.001)
    assert [d["device"] for d in found["memory"]] == ["GPU of 24 GiB", "GPU of 80 GiB", "CPU"]
    assert [t["device"] for t in found["times"]] == ["H200"]
    assert 30 * 60 < found["times"][0]["least_seconds"] < found["times"][0]["most_seconds"] < 5 * 3600
    assert any("24 GiB" in w for w in found["warnings"])
    assert found["sound"]


def test_for_people(llama_8b: Path, tmp_path: Path) -> None:
    args = ("-i", str(llama_8b), "-o", str(tmp_path / "work"), "-cf", str(tmp_path / "out"), "-b", "4")
    result = run(*args, "--fit", "8GB", "--context", "8192", "--cache", "q8", "--gpu-memory", "48GiB")
    assert result.exit_code == 0, result.output
    for text in (
        "32 layers, 8.03 billion weights, 16.1 GB in 8 files", "reachable: 2.0135 to 8.0370", "GPU of 48 GiB",
        "4,931,903,512 to 4,957,594,392", "q8 cache of 8,192 tokens", "largest bitrate that fits: -b 7", "output 4.0",
        "time on one H200 (estimate)", "docs/log.md", "--probe", "no problem found",
    ):  # fmt: skip
        assert text in result.stdout, text
    assert "\033" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_fit_alone_chooses_the_bitrate(llama_8b: Path) -> None:
    found = answer("-i", str(llama_8b), "--fit", "8GB", "--context", "8192")
    assert [s["bits"] for s in found["sizes"]] == [found["fit"]["bits"]]
    assert found["times"][0]["stages"][-2]["stage"] == f"quantize {found['fit']['bits']}"
    both = answer("-i", str(llama_8b), "--fit", "8GB", "--context", "8192", "-b", "3")
    assert [s["bits"] for s in both["sizes"]] == [3, found["fit"]["bits"]]
    assert [s["stage"] for s in both["times"][0]["stages"]] == ["start", "measure", "quantize 3.0", "write"]
    nothing = run("-i", str(llama_8b), "--fit", "2GB")
    assert nothing.exit_code == 5
    assert "the smallest weights" in nothing.stdout
    assert "--context" in nothing.stdout


def test_context_of_the_model_and_beyond(llama_8b: Path) -> None:
    assert answer("-i", str(llama_8b), "--fit", "24GB")["fit"]["context"] == 32768
    long = answer("-i", str(llama_8b), "--fit", "24GB", "--context", "200000", "--cache", "q4")
    assert any("longer than the 131072 positions" in w for w in long["warnings"])
    for wrong in (("--context", "8192"), ("--fit", "a lot"), ("--fit", "24GB", "--context", "0"), ("--gpu-memory", "big")):
        assert run("-i", str(llama_8b), *wrong).exit_code == 2, wrong


def test_all_problems_are_shown_and_the_exit_status_says_so(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    args = ("-i", str(model), "-o", str(tmp_path / "file" / "work"), "-b", "2", "-b", "4.5", *SHORT)
    (tmp_path / "file").write_text("")
    result = run(*args)
    assert result.exit_code == 7
    assert "\n3 problems\n" in result.stdout
    for text in ("1. work directory: ", "2. bitrate: -b 2: ", "3. tokenizer: tokenizer not found", "   -> choose another -o"):
        assert text in result.stdout, text
    found = answer(*args)
    assert [p["topic"] for p in found["problems"]] == ["work directory", "bitrate", "tokenizer"]
    assert [p["code"] for p in found["problems"]] == [7, 5, 3]
    assert [s["bits"] for s in found["sizes"]] == [4.5], "what can be told is told"


def test_many_missing_tensors_fit_on_a_page(tmp_path: Path) -> None:
    from header_models import LLAMA_8B, tensors_of

    some = {n: s for n, s in tensors_of(LLAMA_8B).items() if ".mlp." not in n}
    model = write_header_model(tmp_path / "m", LLAMA_8B, 2, some)
    result = run("-i", str(model))
    assert result.exit_code == 3
    assert "96 problems" in result.stdout
    assert "and 66 more of tensors" in result.stdout
    assert result.stdout.count("the weights do not fit config.json") == 1
    assert len(answer("-i", str(model))["problems"]) == 96


def test_notes_on_the_time_stand_where_there_is_a_time(llama_8b: Path, tmp_path: Path) -> None:
    def warnings(*flags: str) -> str:
        return " ".join(answer("-i", str(llama_8b), "--quality", "balanced", *flags)["warnings"])

    tuned = ("--tune", "4M", "-o", str(tmp_path / "work"), "-cf", str(tmp_path / "out"))
    known = warnings("-b", "4", *tuned)
    for note in ("the time leaves out the pass", "the time is that of the plain algorithm", "the time leaves out --tune 4M"):
        assert note in known
    assert "the time" not in warnings("-b", "4", "--device", "cpu"), "none is known for CPUs"
    assert "the time" not in warnings("-b", "2", *tuned), "nothing can be converted"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run("-i", str(tmp_path / "nowhere"), "-c", str(tmp_path / "none.parquet"))
    assert result.exit_code == 2
    assert "nowhere: does not exist" in result.stdout
    assert run().exit_code == 2


def test_the_probe_times_the_worst_layer_and_the_head(tiny: Path, text: Path, tmp_path: Path) -> None:
    args = ("-i", str(tiny), "-o", str(tmp_path / "work"), "-c", str(text), "-r", "4", "-mr", "2", *SHORT, "--device", "cpu")
    found = answer(*args, "-b", "4", "--probe")
    assert found["sound"]
    items = found["probe"]["items"]
    assert [(i["stage"], i["module"].split(".")[-1]) for i in items] == [
        ("measure", "self_attn"), ("quantize", "self_attn"), ("measure", "mlp"), ("quantize", "mlp"), ("quantize", "linear"),
    ]  # fmt: skip
    assert all(i["seconds"] > 0 for i in items)
    (times,) = found["times"]
    assert times["device"] == "CPU"
    _, measure, quantize, _ = times["stages"]
    two_layers = 2 * (items[0]["seconds"] + items[2]["seconds"])
    assert measure["least_seconds"] == pytest.approx(two_layers, rel=0.05) or items[0]["rows"] < 2
    assert quantize["modules"] == 5
    assert list(tmp_path.iterdir()) == [], "the scratch directory is gone"


def test_a_probe_that_fails_is_a_problem(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exl2ray.errors import NumericError

    def broken(*args: Any) -> Any:
        raise NumericError("Hessian is not finite", "look at the weights")

    monkeypatch.setattr(compose, "probe", broken)
    args = ("-i", str(tiny), "-c", str(text), "-r", "4", "-mr", "2", *SHORT, "--device", "cpu", "--probe")
    result = run(*args)
    assert result.exit_code == 6
    assert "1. probe: Hessian is not finite" in result.stdout
    monkeypatch.setattr(compose, "probe", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    result = run(*args)
    assert result.exit_code == 0
    assert "ran out of GPU memory" in result.stdout


def test_takes_the_flags_of_convert() -> None:
    """So that `convert` can be replaced by `plan` in a command."""
    flags = {o for p in cli.commands["convert"].params if not getattr(p, "hidden", False) for o in p.opts}
    missing = flags - {o for p in cli.commands["plan"].params for o in p.opts}
    assert missing <= {"-om", "--output-measurement", "-nr", "--no-resume", "--reuse", "--checkpoint-seconds", "--dry-run"}
