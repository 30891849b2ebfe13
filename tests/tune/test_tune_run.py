"""A whole tuning: what it writes, that a kill costs nothing but time, and what is refused."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bounded import exl2ray
from evaluation import evaluate
from safetensors import safe_open

from exl2ray.calibration.data.sources import local_source
from exl2ray.commands.tune import show
from exl2ray.errors import StoreError
from exl2ray.events import Silent
from exl2ray.formats.files import sha256_of
from exl2ray.formats.summary import inspect_directory
from exl2ray.formats.verify import verify_directory
from exl2ray.tune import driving, judge, state
from exl2ray.tune.deciding import decided
from exl2ray.tune.messages import TunePass
from exl2ray.tune.module import TunedModule
from exl2ray.tune.run import WORK, Tuned, tune
from exl2ray.tune.settings import Settings

Pairs = Callable[..., tuple[Path, Path]]
SMALL: dict[str, Any] = {"tokens": 8192, "length": 64, "step_tokens": 512, "passes": 1, "rate": 2e-2, "gain_rate": 5e-3}


def settings(pair: Pairs, text: tuple[Path, Path], output: Path, family: str = "Llama", **changes: Any) -> Settings:
    source, exl2 = pair(family)
    sources = tuple(local_source(str(path)) for path in text)
    return Settings(**{**SMALL, "directory": str(exl2), "reference": str(source), "output": str(output), "sources": sources,
                       **changes})  # fmt: skip


def tuned(found: Settings) -> Tuned:
    return tune(found, torch.device("cpu"), Silent())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "output.safetensors", framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}


def test_less_divergence_in_a_file_of_the_same_size(pair: Pairs, text: tuple[Path, Path], tmp_path: Path) -> None:
    source, exl2 = pair("Llama")
    result = tuned(settings(pair, text, tmp_path / "out"))
    assert {"norms", "MLP"} <= set(re.findall(r"[a-zA-Z]{3,}", result.kept.replace("and ", "")))
    own = ["letters.txt", "figures.txt", "mean"]
    watched = [kind for kind in result.before if kind not in own]
    assert list(result.before) == [*own[:2], *watched, "mean"]
    assert judge.WATCHED + "code" in watched
    assert all(result.after[kind] < 0.8 * result.before[kind] for kind in own)
    letters, figures, mean = (result.before[kind] for kind in own)
    assert min(letters, figures) <= mean <= max(letters, figures), "of what is not only watched"
    assert 0 < result.changed < 0.5
    before, after = tensors(exl2), tensors(tmp_path / "out")
    assert list(before) == list(after)
    assert (exl2 / "output.safetensors").stat().st_size == (tmp_path / "out" / "output.safetensors").stat().st_size
    kept = [name for name in before if torch.equal(before[name], after[name])]
    changed = set(before) - set(kept)
    assert all(name.endswith((".q_weight", "norm.weight")) for name in changed)
    assert "model.norm.weight" in changed
    assert ("lm_head.q_weight" in changed) == ("head" in result.kept)
    assert any("self_attn" in name for name in changed) == ("attention" in result.kept)
    assert verify_directory(tmp_path / "out") == []
    assert not (tmp_path / "out" / WORK).exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"].pop("tuned")["kept"] == result.kept
    assert config == json.loads((exl2 / "config.json").read_text())
    # what it says is what an evaluation of the directories says
    ids = torch.randint(35, 60, (4, 64), generator=torch.Generator().manual_seed(1))
    kl = [evaluate(d, source, ids, "cpu").kl for d in (exl2, tmp_path / "out")]
    assert kl[1] is not None
    assert kl[0] is not None
    assert kl[1].value < 0.9 * kl[0].value


def test_a_model_that_says_nothing_of_itself(pair: Pairs, text: tuple[Path, Path], tmp_path: Path) -> None:
    """As the first versions of ExLlamaV2 wrote them: the result says what its tensors tell."""
    source, exl2 = pair("Llama")
    old = Path(shutil.copytree(exl2, tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    tuned(replace(settings(pair, text, tmp_path / "out", tokens=1024), directory=str(old), reference=str(source)))
    assert verify_directory(tmp_path / "out") == []
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "exl2"
    assert found["bits"] == pytest.approx(inspect_directory(exl2).decoder_bpw, abs=1e-3)


@pytest.mark.parametrize("family", ["Qwen2", "Mixtral"])
def test_biases_and_experts(pair: Pairs, text: tuple[Path, Path], tmp_path: Path, family: str) -> None:
    _, exl2 = pair(family)
    result = tuned(settings(pair, text, tmp_path / "out", family, tokens=4096))
    assert result.ratio < 0.99
    before, after = tensors(exl2), tensors(tmp_path / "out")
    endings = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert endings <= {"q_weight", "weight", "bias"}
    assert ("bias" in endings) == (family == "Qwen2")
    assert verify_directory(tmp_path / "out") == []


def test_what_does_not_gain_is_left_as_it_was(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, exl2 = pair("Llama")
    result = tuned(settings(pair, text, tmp_path / "out", rate=0.9, gain_rate=0.9, tokens=1024))
    assert (result.kept, result.ratio, result.changed) == ("nothing", 1.0, 0.0)
    assert result.before == result.after
    show(result, False)
    told = capsys.readouterr().out
    assert "holds the model as it was" in told
    assert "a lower rate may keep something" in told
    assert sha256_of(exl2 / "output.safetensors") == sha256_of(tmp_path / "out" / "output.safetensors")


def test_what_was_trained_has_left_memory_when_it_is_decided(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models are loaded then, and a GPU that held one with its optimiser has no room for three."""
    alive = []

    def counted(*given: Any) -> dict[str, Any]:
        alive.append(sum(type(x) is TunedModule for x in gc.get_objects()))
        return decided(*given)

    monkeypatch.setattr("exl2ray.tune.worker.decided", counted)
    tuned(settings(pair, text, tmp_path / "out", tokens=1024))
    assert alive == [0]


class Killed(BaseException):
    """Not an error that anybody answers to."""


def same(first: Path, second: Path) -> bool:
    return all(sha256_of(first / n) == sha256_of(second / n) for n in ("output.safetensors", "config.json"))


def test_killed_ten_times_it_comes_to_the_same_bytes(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: dict[str, Any] = {"tokens": 6144}
    tuned(settings(pair, text, tmp_path / "whole", **few))
    save, moments = state.save, iter([0, 1, 1, 2, 1, 1, 2, 1, 1, 1])  # checkpoints until the next kill; 0: before the first
    left = [next(moments)]

    def saving(*given: Any) -> None:
        if left[0] == 0:
            raise Killed
        save(*given)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(state, "save", saving)
    kills = 0
    while True:
        reporter = Silent()
        try:
            tune(settings(pair, text, tmp_path / "killed", checkpoint_seconds=0, **few), torch.device("cpu"), reporter)
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "killed" / "config.json").exists()
            left[0] = next(moments, 1000)
    notes = " ".join(fields.get("message", "") for _, fields in reporter.events)
    steps = [int(n) for n in re.findall(r"going on from step (\d+)", notes)]
    assert kills == 10
    assert steps == [11]
    of_pass = [(name, f["done"], f["items"]) for name, f in reporter.events if name in ("stage", "item")]
    assert of_pass == [("stage", 11, 12), ("item", 12, 12)], "a bar begins where the run does"
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".exl2ray-tune/*"))


def test_a_full_disk_costs_the_checkpoints_and_nothing_else(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: dict[str, Any] = {"tokens": 2048}
    tuned(settings(pair, text, tmp_path / "roomy", **few))
    saved: list[bool] = []
    save = state.save

    def noted(store: Any, comm: Any, progress: state.Progress, states: Any) -> None:
        saved.append(progress.over)
        save(store, comm, progress, states)

    monkeypatch.setattr(state, "save", noted)
    disk = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("exl2ray.tune.keeping.shutil", disk)
    reporter = Silent()
    tune(settings(pair, text, tmp_path / "full", checkpoint_seconds=0, **few), torch.device("cpu"), reporter)
    notes = [fields.get("message", "") for _, fields in reporter.events]
    assert sum("has no room for a checkpoint of" in note for note in notes) == 1
    assert saved == [True], "the best state, after the last step"
    assert same(tmp_path / "roomy", tmp_path / "full")


def test_large_checkpoints_are_rare_from_the_first_on(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exl2ray.tune.keeping.SAVING_BYTES", 1000)
    saved: list[bool] = []
    monkeypatch.setattr(state, "save", lambda *given, save=state.save: (saved.append(given[2].over), save(*given)))
    reporter = Silent()
    found = settings(pair, text, tmp_path / "rare", checkpoint_seconds=1e-6, tokens=2048)
    tune(found, torch.device("cpu"), reporter)
    notes = " ".join(fields.get("message", "") for _, fields in reporter.events)
    assert re.search(r"checkpoints are of [\d.]+ [kMG]?B: one about every \d+ minutes", notes)
    assert saved == [True]


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_a_module_at_a_time_the_numbers_are_the_same(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    few: dict[str, Any] = {"tokens": 2048}
    tuned(settings(pair, text, tmp_path / "whole", family, **few))
    monkeypatch.setattr("exl2ray.tune.memory.usable_memory_bytes", lambda: 1 << 20)  # for some; the others lie in files
    reporter = Silent()
    streamed = settings(pair, text, tmp_path / "streamed", family, checkpoint_seconds=0, **few)
    result = tune(streamed, torch.device("cpu"), reporter)
    notes = " ".join(fields.get("message", "") for _, fields in reporter.events)
    assert "tuning a module at a time" in notes
    assert "lie in files" in notes
    assert result.kept != "nothing"
    assert same(tmp_path / "whole", tmp_path / "streamed")


@pytest.mark.parametrize("damage", ["cut", "gone", "bytes", "numbers", "fields", "elsewhere", "step"])
def test_a_damaged_checkpoint_costs_what_was_trained(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    few: dict[str, Any] = {"tokens": 2048}
    tuned(settings(pair, text, tmp_path / "whole", **few))
    save = state.save

    def once(*given: Any) -> None:
        save(*given)
        raise Killed

    out = tmp_path / "out"
    monkeypatch.setattr(state, "save", once)
    with pytest.raises(Killed):
        tuned(settings(pair, text, out, checkpoint_seconds=0, **few))
    monkeypatch.setattr(state, "save", save)
    work = out / WORK
    one = sorted((work / state.FOLDER).iterdir())[0]
    facts = json.loads((work / state.FILE).read_text())
    if damage == "cut":
        one.write_bytes(one.read_bytes()[:-100])
    elif damage == "gone":
        one.unlink()
    elif damage == "bytes":  # a whole file of safetensors still
        data = bytearray(one.read_bytes())
        data[-200:-100] = bytes(b ^ 0x11 for b in data[-200:-100])
        one.write_bytes(data)
    else:
        forged: dict[str, dict[str, Any]] = {
            "numbers": {"best": 99}, "fields": {"scores": None}, "elsewhere": {"files": {"x": ["../x"]}},
            "step": {"step": facts["step"] + 1},
        }  # fmt: skip
        (work / state.FILE).write_text(json.dumps({**facts, **forged[damage]}))
    reporter = Silent()
    tune(settings(pair, text, out, **few), torch.device("cpu"), reporter)
    notes = [fields.get("message", "") for _, fields in reporter.events]
    assert sum("checkpoint cannot be used, so training begins anew" in note for note in notes) == 1, notes
    assert same(tmp_path / "whole", out)


def test_another_tuning_does_not_take_the_place_of_a_finished_one(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tuned(settings(pair, text, out, tokens=2048))
    before = sha256_of(out / "output.safetensors")
    with pytest.raises(StoreError, match="tuned with other settings") as e:
        tuned(settings(pair, text, out, tokens=1024))
    assert "another -o" in e.value.hint
    assert sha256_of(out / "output.safetensors") == before
    tuned(settings(pair, text, out, tokens=2048))


@pytest.mark.parametrize(
    "change", [{"result": {}}, {"before": 5}, {"after": {}}, {"seconds": None}, {"worse": None}, {"changed": "x"}], ids=str
)
def test_a_damaged_record_of_a_finished_tuning_counts_for_nothing(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    tuned(settings(pair, text, out, tokens=2048))
    before, record = sha256_of(out / "output.safetensors"), out / f"{WORK}.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "result": change.get("result", {**facts["result"], **change})}))
    assert tuned(settings(pair, text, out, tokens=2048)).after["mean"] == facts["result"]["after"]["mean"]
    assert sha256_of(out / "output.safetensors") == before
    assert json.loads(record.read_text())["result"].keys() == facts["result"].keys()


def test_what_a_kill_at_the_very_end_left_goes_with_the_next_run(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tuned(settings(pair, text, out, tokens=2048))
    (out / WORK / state.FOLDER).mkdir(parents=True)
    (out / WORK / state.FOLDER / "5-1-0-0.safetensors").write_bytes(bytes(1000))
    tuned(settings(pair, text, out, tokens=2048))
    assert not (out / WORK).exists()


def test_temporary_files_of_a_killed_run_go_with_the_next_one(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    name = ".tmp-exl2ray-4711-0123456789ab"
    left = [out / WORK / folder / name for folder in (state.FOLDER, "homes", "written/tensors", ".")]
    left.append(out / f".{WORK}.json.0123abcd.tmp")
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    seen: list[list[Path]] = []
    kept = driving.put_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driving, "put_tensors", lambda *given: (seen.append([p for p in left if p.exists()]), kept(*given))[1])
        tuned(settings(pair, text, out, tokens=2048))
    assert seen == [[]], "before there is any more"


def test_workers_find_models_that_are_named_from_here(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may run in another directory."""
    seen: list[Settings] = []
    given = settings(pair, text, tmp_path / "out", tokens=2048)
    monkeypatch.chdir(Path(given.reference).parent)
    here = replace(given, reference=Path(given.reference).name, directory=os.path.relpath(given.directory))
    monkeypatch.setattr(driving, "TunePass", lambda **made: seen.append(made["settings"]) or TunePass(**made))
    tuned(here)
    assert {(s.reference, s.directory) for s in seen} == {(given.reference, given.directory)}


def test_the_command(pair: Pairs, text: tuple[Path, Path], tmp_path: Path) -> None:
    source, exl2 = pair("Llama")
    out = tmp_path / "out"
    arguments = ["tune", exl2, "--reference", source, "-o", out, "--tokens", "2k", "--length", "64", "--step-tokens", "256",
                 "--rate", "0.02", "--text", text[0], "--device", "cpu"]  # fmt: skip
    run = exl2ray(*arguments, "--report", seconds=20)
    run.ends_with(0, "KL (nats) on held-out text", "letters.txt", "kept: ", "of the integers changed in")
    assert 0 < run.text.find("reading the text to tune on: ") < run.text.find("attention, twice over the text")
    as_json = json.loads(exl2ray(*arguments, "--json", seconds=20).out)
    assert as_json["after"]["mean"] < as_json["before"]["mean"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_says_how_it_goes_on(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    source, exl2 = pair("Llama")
    work = tmp_path / "out" / WORK
    words = ["tune", exl2, "--reference", source, "-o", tmp_path / "out", "--tokens", "1G", "--length", "64", "--step-tokens",
             "64", "--text", text[0], "--device", "cpu"]  # fmt: skip
    code = "from exl2ray.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, text=True) as running:
        while not (work / driving.ROWS).exists():
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(number)
        told = running.communicate(timeout=120)[1]
    assert running.returncode == 130
    assert f"stopped; what has been trained is kept in {tmp_path / 'out'}" in told
    assert "run the same command again: it goes on from the last checkpoint" in told


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"directory": "source"}, 2, "is no EXL2 model"),
        ({"reference": "Mixtral"}, 3, "of another size than in --reference"),
        ({"--tokens": "none"}, 2, "not a number of tokens"),
        ({"--length": "8"}, 2, "at least 16 tokens"),
        ({"--step-tokens": "32"}, 2, "at least one row of --length 64"),
        ({"--rate": "0"}, 2, "a number between 0 and 1"),
        ({"--text": "/nowhere.txt"}, 2, "--text /nowhere.txt: does not exist"),
        ({"--length": "100000"}, 4, "at least 20 rows of 100000 are needed"),
        ({"output": "exl2"}, 2, "is the model to be tuned itself"),
        ({"output": "source"}, 2, "is the reference itself"),
    ],
)
def test_what_cannot_be_tuned(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, change: dict[str, str], status: int, words: str
) -> None:
    source, exl2 = pair("Llama")
    places = {"source": source, "exl2": exl2, "Mixtral": pair("Mixtral")[0]}
    given = {"directory": exl2, "reference": source, "output": tmp_path / "out", "--tokens": "2k", "--length": "64",
             "--step-tokens": "100000", "--rate": "0.002", "--text": text[0], "--device": "cpu"}  # fmt: skip
    given |= {name: places.get(value, value) for name, value in change.items()}
    flags = [x for name, value in given.items() if name.startswith("--") for x in (name, value)]
    arguments = [given["directory"], "--reference", given["reference"], "-o", given["output"], *flags]
    run = exl2ray("tune", *arguments)
    run.ends_with(status, words)
    assert "-cf" not in run.err, "a flag of convert"
    if "output" in change:
        assert f"-o {given['output']}: is the" in run.err


# ---- what is kept ----------------------------------------------------------------------------------------------------
