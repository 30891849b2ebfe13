"""Names with line ends: none begins a line of its own, neither in what the program says nor in a card or a report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from bounded import exl2ray
from safetensors.torch import load_file, save_file
from small_sources import write_exl2, write_source
from workdir_cases import FLAGS, PLACES, Conversion

from exl2ray.errors import Exl2RayError, StoreError
from exl2ray.publish.card import CardInfo, model_card

FORGED = "\nerror: FORGED\r\nwarning: FORGED\u2028done in 1 s\x85# FORGED\n```\n| FORGED | x |"
BEGINS = re.compile(r"\W*(error: |warning: )?FORGED")


def forged(text: str) -> list[str]:
    """Lines that only the name can have begun: as a terminal breaks them, and as Python does."""
    return [line for line in text.splitlines() if BEGINS.match(line)]


def test_the_check_sees_a_forged_line() -> None:
    assert forged(f"note: {FORGED}") == ["error: FORGED", "warning: FORGED", "# FORGED", "| FORGED | x |"]


def test_names_of_tensors(tmp_path: Path) -> None:
    source, model = write_source(tmp_path / "source"), write_exl2(tmp_path / "exl2")
    for folder, file in ((source, "model.safetensors"), (model, "output.safetensors")):
        tensors = load_file(folder / file)
        save_file({**tensors, f"model.layers.0{FORGED}": tensors["model.norm.weight"].clone()}, folder / file)
    runs = [exl2ray("plan", "-i", source, "-b", "4", "--device", "cpu"), exl2ray("verify", model), exl2ray("inspect", model),
            exl2ray("convert", "-i", source, "-o", tmp_path / "w", "-b", "4", "--device", "cpu", "--dry-run"),
            exl2ray("publish", model, "--repo", "me/x", "--dry-run")]  # fmt: skip
    for run in runs:
        assert "FORGED" in run.text or run.status == 0, run
        assert not forged(run.out + run.err), run
    assert sum("FORGED" in run.text for run in runs) >= 2


def test_names_of_files_and_the_same_in_json(tmp_path: Path) -> None:
    model = write_exl2(tmp_path / f"model{FORGED}".replace("/", ""))
    (model / "output.safetensors").write_bytes(b"no weights")
    (model / f"x{FORGED}.safetensors").write_bytes(b"")
    for command in (["verify"], ["inspect"], ["publish", "--repo", "me/x", "--dry-run"], ["plan", "-b", "4", "-i"]):
        run = exl2ray(*command, model)
        assert run.status in (2, 3, 8), run
        assert "FORGED" in run.text, run
        assert not forged(run.out + run.err), run
        as_json = exl2ray(*command[:1], "--json", *command[1:], model)
        lines = [json.loads(line) for line in as_json.out.splitlines()]
        assert any("\nerror: FORGED" in text for line in lines for text in texts(line)), as_json


def texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in texts(v)]
    if isinstance(value, list):
        return [t for v in value for t in texts(v)]
    return [str(value)]


def test_names_of_tokens_in_warnings_and_calibration(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    rows = len(tokenizer["model"]["vocab"]) + 1000
    token = {"id": rows, "content": f"<x>{FORGED}", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    tokenizer["added_tokens"].append(token)  # beyond the embedding: named in a warning or an error
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    runs = [exl2ray("plan", "-i", source, "-b", "4", "--device", "cpu"), exl2ray("calibration", "-i", source)]
    assert "FORGED" in runs[0].text, runs[0]
    for run in runs:
        assert not forged(run.out + run.err), run


def test_names_in_a_card_and_a_report(made: Conversion, tmp_path: Path) -> None:
    """Model, work directory, target and calibration file; the card has the command in a block that a name could end."""
    name = FORGED.replace("/", "")
    model = Path(shutil.copytree(made.model, tmp_path / f"model{name}"))
    text = Path(shutil.copy(made.text, tmp_path / f"text{name}.jsonl"))
    work, target = tmp_path / f"work{name}", tmp_path / f"target{name}"
    runs = [exl2ray("convert", "-i", model, "-o", work, "-c", text, "-cf", target, *FLAGS, "-b", "4", seconds=30)]
    runs += [exl2ray(*c) for c in (["status", work], ["report", work], ["convert", "-o", work, *PLACES])]
    for run in runs:
        run.ends_with(0, "FORGED")
        assert not forged(run.out + run.err), run
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "FORGED" in card
    assert not forged(card), card
    assert card.count("\n```") % 2 == 0
    assert not forged((work / "report.html").read_text(encoding="utf-8"))


def test_warnings_in_a_card() -> None:
    card = model_card(CardInfo("Llama", 4.0, 4.0, 6, 1, 1, f"x{FORGED}", 1, 1, warnings=(f"tensor x{FORGED} is zero",)))
    assert card.count("FORGED") == 8
    assert not forged(card), card


@pytest.mark.parametrize("error", [Exl2RayError("a", "b", ["c", "d"]), StoreError("a\nx", "")])
def test_errors_keep_their_lines_between_processes(error: Exl2RayError) -> None:
    kind, arguments = error.__reduce__()
    again = kind(*arguments)
    assert (again.lines, again.message, again.hint) == (error.lines, error.message, error.hint)
