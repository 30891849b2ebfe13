"""Models beside one another: the same model says the same, another one parts from it, and that place is named."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from exl2ray.cli import cli
from exl2ray.commands.side_by_side import MARK, plain_lines, read_prompts, side_by_side
from exl2ray.errors import SourceError, UsageError
from exl2ray.evaluate.chat import Answer, Panel

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with noise in its head: it soon says something else."""
    target = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(DEMO, target)
    tensors = load_file(target / "model.safetensors")
    g = torch.Generator().manual_seed(1)
    head = tensors["lm_head.weight"].float()
    tensors["lm_head.weight"] = (head + 0.5 * head.std() * torch.randn(head.shape, generator=g)).half()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def ask(models: list[Path], question: str, most: int = 12) -> list[Answer]:
    panel = Panel([str(m) for m in models], "cpu")
    *_, answers = panel.ask([(("user", question),)] * len(models), most)
    return answers


def test_the_same_model_says_the_same_and_another_parts(other: Path) -> None:
    same, again, changed = ask([DEMO, DEMO, other], "The harbour")
    assert len(same.tokens) == 12
    assert same.text == again.text != changed.text
    assert same.parts is None is again.parts
    assert changed.parts is not None
    assert same.tokens[: changed.parts] == changed.tokens[: changed.parts]
    assert same.tokens[changed.parts] != changed.tokens[changed.parts]
    assert same.text[: changed.common] == changed.text[: changed.common]
    assert same.finished == "length"


def test_a_stop_token_ends_an_answer(tmp_path: Path) -> None:
    (plain,) = ask([DEMO], "The harbour")
    target = tmp_path / "model"
    shutil.copytree(DEMO, target)
    config = json.loads((target / "generation_config.json").read_text())
    stop = plain.tokens[5]
    (target / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [stop]}))
    (answer,) = ask([target], "The harbour")
    assert answer.tokens == plain.tokens[: plain.tokens.index(stop)]
    assert answer.finished == "stop"


def test_an_answer_that_ends_earlier_parts_at_its_end(tmp_path: Path) -> None:
    (plain,) = ask([DEMO], "The harbour")
    target = tmp_path / "model"
    shutil.copytree(DEMO, target)
    config = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": plain.tokens[5]}))
    _, short = ask([DEMO, target], "The harbour")
    assert short.parts == len(short.tokens) == plain.tokens.index(plain.tokens[5])
    assert short.common == len(short.text)


def test_models_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "model"
    shutil.copytree(DEMO, target)
    tensors = load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:32]])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 32}))
    with pytest.raises(SourceError, match="compared token by token"):
        Panel([str(DEMO), str(target)], "cpu")


def test_command_in_lines_and_in_json(other: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("\ufeffThe harbour\n\nOne day\n", encoding="utf-8")
    arguments = ["chat", str(DEMO), str(other), "--prompts", str(questions), "--max-tokens", "8", "--device", "cpu"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert "? The harbour" in shown.output
    assert "? One day" in shown.output
    assert MARK.strip() in shown.output
    found = CliRunner().invoke(cli, [*arguments, "--json"])
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert [line["prompt"] for line in lines] == ["The harbour", "One day"]
    for line in lines:
        source, changed = line["answers"]
        assert source["first_difference"] is None
        assert changed["first_difference"] is not None
        assert source["tokens"] == changed["tokens"] == 8


CASES = [
    ("", "holds no question"),
    ("[1, 2]", "not a JSON array of strings"),
    ('["a", ', "not a JSON array of strings"),
    ("[" * 3000, "not a JSON array of strings"),
    ("[]", "holds no question"),
]


@pytest.mark.parametrize(("content", "message"), CASES)
def test_broken_prompts(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(UsageError, match=message) as e:
        read_prompts(tmp_path / "q.json")
    assert e.value.hint


def test_prompts_from_an_array_and_from_no_file(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('["one\\ntwo", "three"]')
    assert read_prompts(tmp_path / "q.json") == ["one\ntwo", "three"]
    with pytest.raises(UsageError, match="missing"):
        read_prompts(tmp_path / "none")


def test_prompts_that_are_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    def piped(data: bytes) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return read_prompts(Path("-"))

    assert piped(b"one\n\ntwo\n") == ["one", "two"]
    assert piped(b'["one\\ntwo"]') == ["one\ntwo"]
    for data, words in ((b"", "holds no question"), (b"\xff\n", "not UTF-8"), (b"a" * ((1 << 20) + 1), "more than 1 MiB")):
        with pytest.raises(UsageError, match=words):
            piped(data)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="closed"):
        read_prompts(Path("-"))


def test_what_people_see() -> None:
    from rich.console import Console

    first = Answer("models/source", [1, 2, 3], "the same end", 1.0, "stop")
    other = Answer("out/4.0", [1, 2, 9], "the same \x1b[31mfoe", 0.5, "length", parts=2, common=9)
    lines = plain_lines("Why?", [first, other])
    assert f"the same {MARK}\\x1b[31mfoe" in "\n".join(lines)
    assert "3 tokens, 6.0 a second, differs from token 3 on, cut off" in "\n".join(lines)
    console = Console(width=80, file=None, record=True, color_system=None)
    with console.capture() as capture:
        console.print(side_by_side("Why?", [first, other]))
    assert "\x1b" not in capture.get()
    assert "the same end" in capture.get()


def test_nothing_to_ask_is_a_usage_error() -> None:
    found = CliRunner().invoke(cli, ["chat", str(DEMO), "--device", "cpu"])
    assert found.exit_code == 2


@pytest.mark.parametrize(("count", "says"), [("0", "at least one"), ("99999999999", "at most 32768 can")])
def test_answers_of_no_or_endless_length(count: str, says: str) -> None:
    result = CliRunner().invoke(cli, ["chat", str(DEMO), "--prompt", "x", "--max-tokens", count, "--device", "cpu"])
    assert result.exit_code == 2
    assert says in result.stderr
