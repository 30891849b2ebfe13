"""Evaluations are of the bytes that they were made of: after a patch, report and publish do not show them as the model's."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from fake_hub import FakeHub
from published import REPO, convert_source, send

from exl2ray.cli import cli
from exl2ray.evaluate.record import read_evaluations
from exl2ray.evaluate.standing import CURRENT, EARLIER, UNKNOWN, standing
from exl2ray.report.facts import read_facts
from exl2ray.report.page import render


@pytest.fixture
def patched(source: Path, tmp_path: Path) -> Path:
    """As `converted`, but 4.0bpw was patched after its evaluation."""
    convert_source(source, tmp_path)
    command = ["patch", "-o", str(tmp_path / "work"), "--set", "*.0.*.o_proj=8", "-b", "4", "--device", "cpu"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    return tmp_path


def without_weights(path: Path) -> None:
    """As earlier versions wrote it."""
    found = json.loads(path.read_text())
    for result in found["results"]:
        del result["weights"]
    path.write_text(json.dumps(found))


def test_what_an_evaluation_is_of(patched: Path) -> None:
    file = patched / "work" / "evaluation.json"
    jsonschema.validate(json.loads(file.read_text()), json.loads(
        resources.files("exl2ray.evaluate").joinpath("results.schema.json").read_text()
    ))
    four, five = read_evaluations(file)
    assert (standing(four, [four.model]), standing(five, [five.model])) == (EARLIER, CURRENT)
    assert standing(five, [patched / "nowhere", five.model]) == CURRENT
    assert standing(five, [patched / "nowhere"], five.file_bytes) == UNKNOWN
    assert standing(five, [patched / "nowhere"], five.file_bytes + 1) == EARLIER
    without_weights(file)
    four, five = read_evaluations(file)
    assert (standing(four, [four.model]), standing(five, [five.model])) == (EARLIER, UNKNOWN), "by the size"


def test_a_report_after_a_patch(patched: Path) -> None:
    facts = read_facts(str(patched / "work"))
    four, five = facts.bitrates
    assert (four.evaluation, four.was_evaluated) == (None, True)
    assert (five.evaluation is None, five.was_evaluated) == (False, False)
    assert [Path(e.model).name for e in facts.evaluations] == ["5.0bpw"]
    assert [Path(e.model).name for e in facts.earlier] == ["4.0bpw"]
    page = render(facts)[0]
    assert page.count("Written again since its evaluation") == 1
    assert "<h3>Of earlier states</h3>" in page
    assert "did not note" not in page
    without_weights(patched / "work" / "evaluation.json")
    old = render(read_facts(str(patched / "work")))[0]
    assert "did not note of what state of the model: 5.0bpw." in old
    assert "<h3>Of earlier states</h3>" in old


def test_publishing_after_a_patch(hub: FakeHub, patched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_repo(REPO)
    send(patched / "4.0bpw", patched / "5.0bpw", work=str(patched / "work"))
    branches = hub.repos[REPO].branches
    four, five = (branches[n].files for n in ("4.0bpw", "5.0bpw"))
    assert b"written again after its last evaluation" in four["README.md"]
    assert b"KL divergence from the source" not in four["README.md"]
    assert b"KL divergence from the source" in five["README.md"]
    assert [name in four for name in ("evaluation.json", "ladder.png")] == [False, False]
    assert "ladder.png" not in branches["main"].files, "of one model there is none"
    for files in (five, branches["main"].files):
        assert [r["model"] for r in json.loads(files["evaluation.json"])["results"]] == ["5.0bpw"]
    assert "written again since its evaluation, so no figures go along" in capsys.readouterr().err
