"""What `verify` and `publish` find of a directory that keeps every rule of the format, and that nothing could run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from rounded_models import write_rounded
from tiny_models import write_model

from exl2ray.evaluate.soundness import problems_of
from exl2ray.formats.verify import verify_directory


@pytest.fixture(scope="module")
def exl2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exl2")
    return write_rounded(write_model(root / "model"), root / "exl2")


@pytest.fixture
def folder(exl2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exl2, tmp_path / "exl2"))


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


SPOILED = {
    "no width": (edited("config.json", lambda c: c.pop("hidden_size")), "model", "hidden_size"),
    "RoPE": (edited("config.json", lambda c: c.update(rope_scaling="auto")), "model", "rope_scaling"),
    "vocabulary": (edited("tokenizer.json", lambda t: t["model"]["vocab"].update(x=-1)), "tokenizer", "-1"),
    "no model": (edited("tokenizer.json", lambda t: t.pop("model")), "tokenizer", "Model missing"),
    "large": (edited("tokenizer.json", lambda t: t["model"]["vocab"].update(x=5000)), "tokenizer", "5000"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_could_not_be_run_is_not_sound(case: str, folder: Path) -> None:
    spoil, rule, word = SPOILED[case]
    assert problems_of(folder) == []
    spoil(folder)
    assert verify_directory(folder) == [], "no rule of the format"
    (found,) = problems_of(folder)
    assert found.rule == rule
    assert word in found.message
    assert str(folder) not in found.message


def test_a_family_of_others_is_sound(folder: Path) -> None:
    edited("config.json", lambda c: c.update(architectures=["NewlyMadeForCausalLM"], model_type="newly_made"))(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert problems_of(folder) == verify_directory(folder) == []


def test_broken_files_are_told_once(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert [p.rule for p in problems_of(folder)] == ["side-file"]


def test_verify_and_publish_say_it(folder: Path) -> None:
    SPOILED["no model"][0](folder)
    exl2ray("verify", folder).ends_with(8, "[tokenizer] tokenizer.json:")
    exl2ray("publish", folder, "--repo", "me/model", "--dry-run").ends_with(8, "not published", "[tokenizer]")
