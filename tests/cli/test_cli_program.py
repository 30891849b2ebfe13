"""The program as a whole: help, light imports, errors and exit codes, JSON, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from exl2ray import __version__, errors
from exl2ray.cli import cli
from exl2ray.errors import Exl2RayError, Interrupted, NumericError

HEAVY = ("torch", "ray", "numba", "numpy", "pyarrow", "safetensors", "tokenizers", "rich")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
ERROR_CLASSES = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exl2RayError)
]


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_of_every_command(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.startswith("Usage: ")
    assert "--help" in result.stdout


def test_the_program_as_a_module():
    """``python -m exl2ray``, for those whose PATH does not have the folder of programs."""
    found = subprocess.run([sys.executable, "-m", "exl2ray", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"exl2ray {__version__}\n"


def test_help_lists_the_commands_with_whole_sentences(run):
    for args in ([], ["--help"]):
        result = run(*args)
        assert result.exit_code == (0 if args else 2)
        result = CliRunner().invoke(cli, args, terminal_width=78)  # of a terminal with 80 columns
        for name in cli.commands:
            line = next(text for text in result.stdout.splitlines() if text.startswith(f"  {name} "))
            assert not line.endswith("...")


def test_help_of_convert_has_the_texts_of_the_recipe(run):
    text = " ".join(run("convert", "--help").stdout.split())
    assert "-hb, --head-bits INTEGER bits of the output head: 2, 3, 4, 5, 6 or 8; if absent 6, or what" in text
    assert "[default: balanced]" in text
    for title in ("Model and files:", "Quantisation:", "Calibration:", "Where it runs:", "Other:"):
        assert title in text


def test_importing_the_command_line_loads_nothing_heavy():
    program = f"""
import sys
import exl2ray.cli
loaded = [m for m in {HEAVY!r} if m in sys.modules]
try:
    exl2ray.cli.cli.main(["convert", "--help"])
except SystemExit as e:
    assert e.code == 0
print()
print(loaded, [m for m in {HEAVY!r} if m in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[] []"


def test_version(run):
    assert run("version").stdout == f"exl2ray {__version__}\n"
    assert run("--version").stdout == f"exl2ray {__version__}\n"


@pytest.mark.parametrize("kind", ERROR_CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_its_exit_code_message_and_hint(run, fake, job_args, kind):
    fake.error = kind("layer 3 is \x1b[2J broken", "mend it")
    result = run("convert", *job_args)
    assert result.exit_code == kind.exit_code
    label = "" if kind is Interrupted else "error: "
    hint = f"resume with: exl2ray convert -o {job_args[3]}" if kind is Interrupted else "mend it"
    assert result.stderr.splitlines() == [f"{label}layer 3 is \\x1b[2J broken", f"  hint: {hint}"]
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback_too(run, fake, job_args):
    fake.error = NumericError("NaN in layer 3")
    result = run("convert", *job_args, "--debug")
    assert result.exit_code == 6
    assert "Traceback" in result.stderr
    assert "error: NaN in layer 3" in result.stderr


def test_an_unforeseen_error_is_one_line_and_a_hint(run, fake, job_args, tmp_path):
    fake.error = KeyError("gone")
    result = run("convert", *job_args)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: KeyError: 'gone' (")
    assert "--debug" in lines[1]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "job.json").write_text("{}")
    hint = run("convert", *job_args).stderr.splitlines()[1]
    log = Path(hint.rpartition(" ")[2])
    assert log.parent == tmp_path / "work" / "logs"
    assert "KeyError: 'gone'" in log.read_text()
    assert "Traceback" in run("convert", *job_args, "--debug").stderr


def test_json_is_all_that_standard_output_gets(run, fake, job_args):
    result = run("convert", *job_args, "--json", "-b", "4")
    assert result.exit_code == 0
    assert result.stderr == ""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    names = [e["event"] for e in events]
    assert names == ["start", "warning", "stage", "item", "item", "item", "end", "done"]
    assert events[-1]["outputs"][0]["reference_perplexity"] is None


def test_json_of_errors(run, fake, job_args):
    fake.error = NumericError("NaN", "look at it")
    result = run("convert", *job_args, "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "warning", "stage", "item", "error"]
    assert events[-1] == {"event": "error", "message": "NaN", "hint": "look at it", "code": 6}
    assert "error: NaN" in result.stderr
    result = run("convert", "--jsno", "--json")
    assert json.loads(result.stdout)["code"] == 2
    result = run("inspect", "nowhere", "--json")
    assert json.loads(result.stdout)["code"] == result.exit_code == 8


def test_json_of_a_measurement_ends_with_where_it_is(run, fake, job_args):
    result = run("measure", *job_args, "--json")
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["event"] == "done"
    assert done["measurement"].endswith("work/measurement.json")


def test_plain_output_has_no_control_characters(run, fake, job_args):
    result = run("convert", *job_args)
    assert result.exit_code == 0
    assert not CONTROL.search(result.stdout)
    assert "[measure] 2/3  model.layers.1.mlp  0.5 s  accuracy 0.81 .. 0.99  ETA" in result.stdout
    assert r"warning: sliding window: \x1b[31mnot red\x1b[0m" in result.stdout
    assert "done in 2.0 s" in result.stdout


def test_dry_run(run, fake, job_args):
    assert run("convert", *job_args, "--dry-run").exit_code == 0
    assert fake.recipes == []
    assert fake.dry[0].in_dir == job_args[1]


def test_a_dry_run_that_is_stopped_leaves_nothing_to_resume(run, fake, job_args):
    fake.error = KeyboardInterrupt()
    result = run("convert", *job_args, "--dry-run")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_interrupted_before_the_conversion_can_notice(run, fake, job_args):
    fake.error = KeyboardInterrupt()
    result = run("measure", *job_args)
    assert result.exit_code == 130
    assert "hint: run the same command again" in result.stderr, "-o alone would find no job there, or an earlier one"
    fake.error = Interrupted("stopped")
    assert f"resume with: exl2ray measure -o {job_args[3]}" in run("measure", *job_args).stderr


def test_resume_command_can_be_pasted(run, fake, tmp_path):
    (tmp_path / "my models").mkdir()
    fake.error = Interrupted("stopped")
    result = run("convert", "-i", str(tmp_path / "my models"), "-o", str(tmp_path / "it's here"))
    command = result.stderr.partition("resume with: ")[2].strip()
    split = subprocess.run(["sh", "-c", f'for x in "$@"; do echo "$x"; done; printf "%s\\n" {command}'],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert split.stdout.splitlines()[-1] == str(tmp_path / "it's here")


def test_ctrl_c_of_the_real_program(tmp_path):
    (tmp_path / "model").mkdir()
    program = f"""
import sys, time
from exl2ray import cli, convert
def slow(recipe, reporter):
    try:
        reporter.event("note", message="running")
        time.sleep(3600)
    except KeyboardInterrupt as e:
        raise convert.Interrupted("stopped") from e
convert.convert = slow
sys.argv = ["exl2ray", "convert", "-i", {str(tmp_path / "model")!r}, "-o", {str(tmp_path / "work")!r}, "--json"]
cli.main()
"""
    # A shell's background job starts with SIGINT ignored, and children inherit that.
    program = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert b"running" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    assert child.returncode == 130
    assert json.loads(out)["code"] == 130
    assert b"resume with: exl2ray convert -o " in err


def test_a_closed_pipe_is_no_accident():
    program = "from exl2ray import cli; cli.main()"
    command = f"{sys.executable} -c '{program}' convert --help | head -c 10"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout == "Usage: exl"
    assert ran.stderr == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal(tmp_path, no_color):
    """The live display appears on a terminal, and without colours under NO_COLOR."""
    (tmp_path / "model").mkdir()
    program = f"""
import sys
from conftest import FakeConversion
from exl2ray import cli, convert
convert.convert = FakeConversion().convert
sys.argv = ["exl2ray", "convert", "-i", {str(tmp_path / "model")!r}, "-o", "w"]
cli.main()
"""
    master, slave = os.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(Path(__file__).parent)}
    env.pop("NO_COLOR", None)
    if no_color:
        env["NO_COLOR"] = no_color
    with subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave, env=env) as child:
        os.close(slave)
        text = _read_all(master)
    assert child.returncode == 0, text
    assert "\x1b[?25l" in text  # the cursor is hidden while the bar is shown
    assert "\x1b[?25h" in text
    assert "measure: 3 items in 1.5 s" in text
    assert ("\x1b[33m" in text) is not bool(no_color)
    assert "done in 2.0 s" in text


def _read_all(master: int) -> str:
    parts = []
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        parts.append(data)
    os.close(master)
    return b"".join(parts).decode()


@pytest.mark.parametrize(("argument", "expected"), [
    ("--compile-full=~/out", "--compile-full=/home/me/out"), ("-cf=~", "-cf=/home/me"), ("--note=a~/b", "--note=a~/b"),
    ("~/out", "~/out"), ("--name=~other", "--name=~other"), ("x=~/out", "x=~/out"),
])  # fmt: skip
def test_a_home_directory_behind_an_equals_sign(argument: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from exl2ray.terminal.program import _at_home

    monkeypatch.setenv("HOME", "/home/me")
    assert _at_home(argument) == expected
