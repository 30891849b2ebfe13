"""What a report says of models of `convert --tune`: of the tuned one, not of what it was made from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_helpers import Clock, Model, evaluation, html_of, write_chain, write_job, write_measurement

from exl2ray.report.facts import Facts, read_facts
from exl2ray.store.open import open_store

RESULT = {
    "directory": "/out/tuned-3.0", "kept": "norms, MLP", "ratio": 0.75, "steps": 9, "tokens": 4096, "worse": [],
    "before": {"web": 0.21, "mean": 0.2}, "after": {"web": 0.16, "mean": 0.15}, "file_bytes": 777_000_000,
}  # fmt: skip


def tuned_work(root: Path, directory: str | None = None, record: Any = None) -> Path:
    store, model = open_store(str(root)), Model(2)
    write_job(store, model, (3.0,))
    write_chain(store, model, write_measurement(store, model), 3.0)
    clock = Clock(store)
    clock.event("allocated", bits=3.0, bpw=2.99, gap=0.0, choice=[], predicted_kl=0.1)
    where = directory or f"{root}/quant/3.0/solved"
    clock.event("written", bits=3.0, directory=where, files=["output.safetensors"], bytes=776_000_000)
    clock.save()
    if record is not None:
        (root / "quant/3.0/tune.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return root


def card(root: Path) -> str:
    return html_of(root).partition('<article class="card">')[2].partition("</article>")[0]


def test_the_card_is_of_the_tuned_model(tmp_path: Path) -> None:
    root = tuned_work(tmp_path, record={"result": RESULT})
    result = evaluation((3.0,))["results"][0] | {"model": "/out/tuned-3.0", "file_bytes": 777_000_000}
    (root / "evaluation.json").write_text(json.dumps({"results": [result]}))
    bitrate = read_facts(str(root)).bitrates[0]
    assert (bitrate.directory, bitrate.file_bytes) == ("/out/tuned-3.0", 777_000_000)
    assert bitrate.evaluation is not None
    found = card(root)
    assert "KL 0.2000 -&gt; 0.1500 nats on held-out text (0.750 times); kept: norms, MLP" in found
    assert "777 MB" in found
    assert "tuned-3.0" in found
    assert "solved" not in found
    assert "Judged by calibration rows" not in found


def test_without_an_evaluation_it_says_of_what_the_figures_are(tmp_path: Path) -> None:
    assert "This is of the model before it was tuned." in card(tuned_work(tmp_path, record={"result": RESULT}))


def test_what_was_rolled_back_is_no_gain(tmp_path: Path) -> None:
    result = RESULT | {"kept": "nothing", "worse": ["code"], "after": RESULT["before"]}
    found = card(tuned_work(tmp_path, record={"result": result}))
    assert "worse on code, so all was rolled back: the model is as it was, KL 0.2000" in found


def test_an_evaluation_of_another_size_is_of_an_earlier_model(tmp_path: Path) -> None:
    root = tuned_work(tmp_path, record={"result": RESULT})
    result = evaluation((3.0,))["results"][0] | {"model": "/out/tuned-3.0", "file_bytes": 5}
    (root / "evaluation.json").write_text(json.dumps({"results": [result]}))
    facts = read_facts(str(root))
    assert (facts.bitrates[0].evaluation, len(facts.earlier)) == (None, 1)


def test_a_model_that_waits_for_its_tuning(tmp_path: Path) -> None:
    root = tuned_work(tmp_path)
    found = card(root)
    assert "Only solved so far: --tune is still to come" in found
    assert "quant/3.0/solved" in read_facts(str(root)).bitrates[0].directory


def test_a_tuning_of_another_solved_model_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tuned_work(tmp_path, record={"result": RESULT, "start": "ab"})

    def facts(now: str) -> Facts:
        monkeypatch.setattr("exl2ray.report.tuned._solved_now", lambda *given: now)
        return read_facts(str(root))

    assert facts("ab").bitrates[0].tuning is not None
    assert (facts("cd").bitrates[0].tuning, facts("cd").bitrates[0].untuned) == (None, True)


def test_a_patch_elsewhere_is_shown_as_what_it_is(tmp_path: Path) -> None:
    root = tuned_work(tmp_path, "/out/patched", {"result": RESULT})
    bitrate = read_facts(str(root)).bitrates[0]
    assert (bitrate.directory, bitrate.tuning, bitrate.untuned) == ("/out/patched", None, False)


WRONG: list[dict[str, Any]] = [RESULT | {"before": 1}, RESULT | {"kept": None}, RESULT | {"after": {"mean": "nan"}}]
BROKEN = ["", "[", "[]", "{}", *(json.dumps({"result": r}) for r in WRONG), "[" * 99999]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_damaged_records_of_a_tuning(text: str, tmp_path: Path) -> None:
    facts = read_facts(str(tuned_work(tmp_path, record=text)))
    assert "tune.json is damaged" in facts.problems[0]
    assert replace(facts.bitrates[0]).tuning is None
