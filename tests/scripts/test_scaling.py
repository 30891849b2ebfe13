"""scaling.py: the order of its work, its budget, its verdict on bytes; and all of it on CPU workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from observed import Observed, observe
from random_models import SHAPES
from scaling import Results, ordered
from scaling_run import Call, Figure, Run, calls_of

ROOT = Path(__file__).resolve().parents[2]


def figure(run: Run, seconds: float = 10.0, **changes: object) -> Figure:
    made = Figure(run, seconds, 5.0, 1.0, seconds + 8.0, 0.1, 0.9, 0.0, (), ())
    return replace(made, **changes)  # type: ignore[arg-type]


def test_what_matters_most_comes_first() -> None:
    runs = ordered(["70b", "mixtral"], ["measure", "reference", "quantized", "ladder"], [1, 2, 4])
    assert len(runs) == len(set(runs)) == 2 * 4 * 3
    assert [(r.model, r.gpus) for r in runs[:8]] == [("70b", n) for n in (4, 4, 4, 1, 1, 1, 4, 1)]
    assert {r.gpus for r in runs[-8:]} == {2}
    for model in ("70b", "mixtral"):
        assert next(r for r in runs if r.model == model).work == "measure"
    assert ordered(["70b"], ["ladder"], [2])[0] == Run("70b", "measure", 2)


def test_estimates_come_from_the_nearest_work() -> None:
    results = Results()
    assert results.estimate(Run("70b", "measure", 4), SHAPES) is None
    results.add(figure(Run("70b", "measure", 4)))
    assert results.estimate(Run("70b", "measure", 1), SHAPES) == 8 + 40
    unseen = results.estimate(Run("70b", "ladder", 4), SHAPES)
    results.add(figure(Run("70b", "ladder", 4), 100.0))
    assert unseen == pytest.approx(8 + 26)
    assert results.estimate(Run("70b", "ladder", 4), SHAPES) == 8 + 100
    other = results.estimate(Run("mixtral", "measure", 4), SHAPES)
    assert other == pytest.approx(8 + 100 / 2.6 * SHAPES["mixtral"].linears / SHAPES["70b"].linears)


def test_a_single_changed_file_is_seen() -> None:
    results = Results()
    results.add(figure(Run("70b", "quantized", 4), digests={"4.0/a": "x", "4.0/b": "y"}))
    results.add(figure(Run("70b", "reference", 1), digests={"4.0/a": "z"}))  # other files by the same names
    results.add(figure(Run("70b", "ladder", 1), digests={"4.0/a": "x", "4.0/b": "y", "5.0/a": "n"}))
    assert list(results.verdict.values()) == ["first", "first", "2 same"]
    assert results.equal
    results.add(figure(Run("70b", "quantized", 1), digests={"4.0/a": "x", "4.0/b": "Y"}))
    assert results.verdict[Run("70b", "quantized", 1)] == "1 DIFFER"
    assert not results.equal


def test_of_repeated_runs_the_fastest_counts_and_no_difference_is_forgotten() -> None:
    results, run = Results(), Run("70b", "reference", 2)
    results.add(figure(replace(run, gpus=1), digests={"4.0/a": "x"}))
    for seconds, digest in ((9.0, "x"), (7.0, "other"), (8.0, "x")):
        results.add(figure(run, seconds, digests={"4.0/a": digest}))
    assert results.figures[run].seconds == 7.0
    assert results.verdict[run] == "1 DIFFER"
    assert not results.equal


def test_time_without_a_call() -> None:
    def event(seconds: float, name: str, worker: str) -> dict[str, object]:
        fields = {"method": "measure", "key": "k", "worker": worker, "seconds": 1.0, "received": 7}
        return {"time": f"2026-01-01T00:00:{seconds:06.3f}Z", "name": name, "fields": fields}

    log = [event(0, "started", "a"), event(1, "started", "b"), event(3, "finished", "a"), event(4, "finished", "b"),
           event(6, "started", "a"), event(7, "finished", "a")]  # fmt: skip
    calls, covered, worked = calls_of(log)
    assert (covered, worked) == (pytest.approx(5.0), pytest.approx(7.0))
    assert sum(c.received for c in calls) == 21


def test_first_calls_are_told_apart() -> None:
    seconds = {"a": (5.0, 1.0, 3.0), "b": (7.0, 2.0)}
    key = "model.layers.0.mlp"
    calls = tuple(Call("measure", key, worker, s, 0) for worker, several in seconds.items() for s in several)
    run = Run("70b", "measure", 1)
    seen = observe("a test", [("70B", 3, figure(run, calls=calls)), ("70B", 3, figure(replace(run, gpus=2), calls=calls))])
    assert seen.models == {"70B": {"measure": {"mlp": {"module": (6.0, 2.0)}}}}
    assert seen.driver_s == pytest.approx(0.1 / 5)
    assert json.loads(seen.to_json())["models"]["70B"]["measure"]["mlp"] == {"module": [6.0, 2.0]}


@pytest.mark.cluster
def test_on_two_workers(tmp_path: Path) -> None:
    """Measures and quantises a tiny model on one worker and on two: same bytes, and a table of everything."""
    out, costs = tmp_path / "out.jsonl", tmp_path / "costs.json"
    command = [
        sys.executable, str(ROOT / "scripts" / "scaling.py"), "--device", "cpu", "--models", "tiny", "--gpus", "1", "2",
        "--work", "measure", "quantized", "--compare", "--out", str(out), "--costs", str(costs), "--place", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == out.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    runs = {(x["work"], x["gpus"]): x for x in lines if x["what"] == "run"}
    assert set(runs) == {(w, n) for w in ("measure", "quantized") for n in (1, 2)}
    for (_, gpus), run in runs.items():
        assert run["seconds"] > run["driver_s"]
        assert (run["moved_gb"] > 0) == (gpus == 2)
        assert 0 < run["busy"] <= 1
    assert runs["measure", 1]["bytes"] == "1 same"
    assert re.fullmatch(r"\d+ same", runs["quantized", 1]["bytes"])
    table = [line for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert len(table) == 4
    assert set(Observed.load(costs).models["tiny"]) == {"measure", "quantized"}
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
