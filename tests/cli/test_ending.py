"""How the program's process ends: as an interpreter ends, but for taking everything down piece by piece."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exl2ray.stopping import interruptible

ROOT = Path(__file__).resolve().parents[2]
SETTING = """
import atexit, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor

class Told:
    def __del__(self):
        print("taken down")

def slowly(name):
    time.sleep(0.3)
    sys.stdout.write(f"{name}\\n")  # print would write the end of the line by itself, and the other thread in between

kept = Told()
folder = tempfile.TemporaryDirectory()
print(folder.name)
atexit.register(print, "at exit")
threading.Thread(target=slowly, args=("thread",)).start()
pool = ThreadPoolExecutor(1)
pool.submit(slowly, "pool")
"""


def run(code: str, *arguments: str, output: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=env, timeout=60, check=False)


def test_threads_and_what_was_asked_for_come_first() -> None:
    found = run(SETTING + "from exl2ray.cli import program\nprogram()", "version")
    folder, *lines = found.stdout.splitlines()
    assert (found.returncode, found.stderr) == (0, "")
    assert not Path(folder).exists()
    assert sorted(lines[:-1]) == ["exl2ray 0.1.0", "pool", "thread"]
    assert lines[-1] == "at exit", "and nothing of what an object says when it is taken down"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["version"], 0), (["inspect", "/nowhere"], 8), (["plan", "--no-such-flag"], 2), ([], 2)]
)
def test_exit_codes_are_those_of_the_command_line(arguments: list[str], code: int) -> None:
    ended = {f: run(f"from exl2ray.cli import {f}; {f}()", *arguments) for f in ("main", "program")}
    assert ended["program"].returncode == ended["main"].returncode == code
    assert (ended["program"].stdout, ended["program"].stderr) == (ended["main"].stdout, ended["main"].stderr)


def test_other_statuses_and_errors_are_the_interpreters() -> None:
    ends = (("SystemExit('a word')", 1, "a word"), ("SystemExit(259)", 3, ""), ("OSError('x')", 1, "OSError: x"))
    for raised, code, said in ends:
        found = run(f"from exl2ray import cli\ndef main(): raise {raised}\ncli.main = main\ncli.program()")
        assert (found.returncode, said in found.stderr) == (code, True), found


def test_a_reader_that_has_gone_changes_nothing() -> None:
    ended = {}
    for function in ("main", "program"):
        reading, writing = os.pipe()
        os.close(reading)
        ended[function] = run(f"from exl2ray.cli import {function}; {function}()", "architectures", output=writing)
        os.close(writing)
    assert ended["program"].returncode == ended["main"].returncode
    assert ended["program"].stderr == ended["main"].stderr


AS_CLICK_IS_IMPORTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from exl2ray.__main__ import program
program()
"""


def test_a_signal_while_the_program_is_loaded_is_no_traceback() -> None:
    done = run(AS_CLICK_IS_IMPORTED, "version")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_signal_waits_for_the_end_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised at once, an exception is swallowed by callbacks of the import, or ends the process in C++ (SIGABRT)."""
    name = "imported_while_stopped"
    body = "import os, signal, weakref\n\nclass A: pass\n\nkept = A()\n"
    body += "told = weakref.ref(kept, lambda _: os.kill(os.getpid(), signal.SIGTERM))\ndel kept\nDONE = True\n"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)

    def imports_and_goes_on() -> None:
        with interruptible():
            importlib.import_module(name)
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        imports_and_goes_on()
    assert sys.modules.pop(name).DONE


def test_a_second_signal_does_not_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        "import os, signal, time\nfor _ in range(2): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\ntime.sleep(20)\n"
    )
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom exl2ray.stopping import interruptible\n"
    done = run(start + "with interruptible():\n    import endless\n")
    assert (done.returncode, done.stderr) == (130, "stopped at once, as asked for; the same command resumes the job\n")
