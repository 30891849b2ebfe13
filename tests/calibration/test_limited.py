"""The child process of templates and tokenizers: what it is given, what it may do, and that it never outlives its use."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from exl2ray.calibration.limited import MIB, ChildError, LimitedProcess

ROOM = {"cpu_seconds": 1.0, "memory_bytes": 256 * MIB}


def compiled(template: str) -> LimitedProcess:
    child = LimitedProcess("template")
    child.ask({"op": "compile", "special_tokens": {}}, [template.encode()], **ROOM)  # type: ignore[arg-type]
    return child


def render(child: LimitedProcess, **limits: float) -> str:
    request = {"op": "render", "messages": [["user", "hi"]], "characters": 1000, "reply": False}
    return child.ask(request, **{**ROOM, **limits})[1][0].decode()  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    """No such process, not even as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_one_process_serves_many_requests_and_ends_when_it_is_closed() -> None:
    child = compiled("{{ messages[0].content }}!")
    assert {render(child) for _ in range(20)} == {"hi!"}
    child.close()
    assert gone(child.pid)
    with pytest.raises(ChildError, match="closed"):
        render(child)
    child.close()


def test_it_ends_with_whoever_holds_it() -> None:
    child = compiled("{{ messages[0].content }}")
    pid = child.pid
    del child
    gc.collect()
    assert gone(pid)


def test_a_failure_is_an_answer_and_a_limit_an_end() -> None:
    child = compiled("{% if messages[0].content == 'hi' %}{{ raise_exception('no') }}{% endif %}")
    with pytest.raises(ChildError, match="no") as failed:
        render(child)
    assert not failed.value.ended
    child.close()
    child = compiled("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(ChildError, match=r"did not finish within 2 s of processor time") as ended:
        render(child, cpu_seconds=0.0)
    assert ended.value.ended
    assert gone(child.pid)
    with pytest.raises(ChildError, match="did not finish"):
        render(child)


def test_a_child_that_is_killed_is_named() -> None:
    child = compiled("{{ messages[0].content }}")
    os.kill(child.pid, 11)
    with pytest.raises(ChildError, match=r"crashed \(SIGSEGV\)"):
        render(child)
    assert gone(child.pid)


def test_it_gets_no_secrets_and_nothing_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's folder may hold a jinja2.py; tokens are not for who wrote the template."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    (tmp_path / "jinja2.py").write_text("open('pwned', 'w')")
    monkeypatch.chdir(tmp_path)
    child = compiled("{{ messages[0].content }}")
    assert render(child) == "hi"
    environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"secret" not in environment
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    assert next(line.split()[3:5] for line in limits.splitlines() if line.startswith("Max file size")) == ["0", "0"]
    child.close()
    assert not (tmp_path / "pwned").exists()
