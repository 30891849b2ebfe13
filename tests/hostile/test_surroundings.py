"""What surrounds a conversion: variables of the environment, names that draw on terminals, two processes at one moment."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bounded import ROOT, exl2ray
from forks import fork_server
from small_sources import write_exl2
from stopped_runs import Stopped
from workdir_cases import FLAGS, PLACES, Conversion, contents

NAME = "mo\x1b[2Jd\nel\x1b]0;x\x07\u202e \"x\" $(id) `id`"
DRAWS = set("\x1b\x07\u202e")


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens: the port is taken, and refuses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{s.getsockname()[1]}"


# ---- the environment --------------------------------------------------------------------------------------------------

ENVIRONMENTS = {
    "no folders": {"TMPDIR": "/nonexistent", **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"), "/proc/x")},
    "no language": {"LC_ALL": "C", "LANG": "xx_YY.bogus", "PYTHONIOENCODING": "ascii", "HOME": ""},
    "no terminal": {"COLUMNS": "-5", "LINES": "0", "TERM": "\x1b[2J", "FORCE_COLOR": "1", "TZ": "../../etc/passwd"},
    "another cluster": {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "x", "NUMBA_CACHE_DIR": "/proc/x"},
}  # fmt: skip


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_odd_environments_change_no_byte(case: str, made: Conversion, tmp_path: Path) -> None:
    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "target"
    exl2ray(*made.arguments(work, target), "-b", "4", env=ENVIRONMENTS[case], seconds=30).ends_with(0)
    assert contents(target) == contents(made.target)


@pytest.mark.parametrize("flags", [[], ["--executor", "ray"]], ids=["auto", "ray"])
def test_a_cluster_that_nobody_answers_for(flags: list[str], nobody: str, made: Conversion, tmp_path: Path) -> None:
    arguments = [a for a in made.arguments(tmp_path / "work", tmp_path / "target") if a not in ("--executor", "inline")]
    run = exl2ray(*arguments, "-b", "4", *flags, env={"RAY_ADDRESS": nobody}, seconds=30)
    run.ends_with(9, "cannot start or reach Ray", nobody, "$RAY_ADDRESS")


PRINTING = (["version"], ["--help"], ["plan", "-i", "x", "-b", "4"], ["architectures"])


@pytest.mark.parametrize("command", PRINTING, ids=lambda c: c[0])
def test_standard_output_on_a_full_disk(command: list[str]) -> None:
    exl2ray(*command, output="/dev/full").ends_with(7, "cannot write to standard output: No space left on device")


def test_a_current_directory_that_is_gone(tmp_path: Path) -> None:
    """Torch would end the process when it is imported, with the status of wrong flags and a word on a library."""
    start = [sys.executable, "-c", "from exl2ray.cli import main; main()"]
    (tmp_path / "gone").mkdir()
    gone = "cd gone && rmdir ../gone && exec \"$@\""
    run = subprocess.run(["sh", "-c", gone, "sh", *start, "plan", "-i", "m", "-b", "4"], cwd=tmp_path, capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: the current directory cannot be read: No such file or directory"), run.stderr


# ---- names ------------------------------------------------------------------------------------------------------------

COMMANDS = (["inspect"], ["verify"], ["publish", "--repo", "me/x", "--dry-run"],
            ["chat", "--prompt", "\x1b[2J", "--max-tokens", "1"],
            ["eval", "--rows", "1", "--length", "32", "--model"])  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_names_of_models_reach_the_terminal_as_text(command: list[str], tmp_path: Path) -> None:
    model = write_exl2(tmp_path / NAME)
    run = exl2ray(*command, model, *(["--device", "cpu"] if command[0] in ("chat", "eval") else []))
    run.ends_with(0)
    assert not DRAWS & set(run.out + run.err), run


def test_names_of_a_conversion_reach_terminal_and_card_as_text(made: Conversion, tmp_path: Path) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / NAME))
    work, target = made.copy_of_work(tmp_path / f"work {NAME}"), tmp_path / f"target {NAME}"
    runs = [exl2ray("convert", "-i", model, "-o", work, "-c", made.text, "-cf", target, *FLAGS, "-b", "4", seconds=30)]
    runs += [exl2ray(*c) for c in (["status", work], ["report", work], ["convert", "-o", work, *PLACES])]
    for run in runs:
        run.ends_with(0)
        assert not DRAWS & set(run.out + run.err), run
    for written in (target / "README.md", work / "report.html"):
        assert not DRAWS & set(written.read_text(encoding="utf-8")), written


def test_tokens_reach_the_terminal_as_text(tmp_path: Path) -> None:
    model = write_exl2(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["\x1b[2J\u202e\x07"] = vocabulary.pop("<unk>")  # what the model answers: its logits are all alike
    tokenizer["model"].pop("unk_token", None)
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<unk>"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    run = exl2ray("chat", model, "--prompt", "hi", "--max-tokens", "3", "--device", "cpu")
    run.ends_with(0, "\\x1b[2J")
    assert not DRAWS & set(run.out + run.err), run


# ---- two at one moment --------------------------------------------------------------------------------------------------


def test_one_work_directory_for_two_at_the_same_moment(made: Conversion, tmp_path: Path) -> None:
    """One of them goes on, or one after the other; what is written is whole, and no lock stays."""
    server = fork_server("ray")
    for attempt in range(2):
        work, target = made.copy_of_work(tmp_path / f"work{attempt}"), tmp_path / f"target{attempt}"
        runs = [Stopped(server, [*made.arguments(work, target), "-b", "4"], tmp_path / f"err{i}") for i in range(2)]
        ended = sorted(run.status() for run in runs)
        errors = [run.err for run in runs]
        assert ended in ([0, 0], [0, 7]), errors
        assert not any("Traceback" in text for text in errors), errors
        assert contents(target) == contents(made.target)
        assert not {"driver.lock", ".exl2ray.lock"} & {*os.listdir(work), *os.listdir(target)}
