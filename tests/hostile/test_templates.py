"""Chat templates of strangers: what they try costs them the template, never the run, its memory or its time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_models import write_model
from tokenizer_cases import Change, content, plan, settings, sparse

from exl2ray.calibration.chat_text import ChatText, TemplateProcess, plain_chat
from exl2ray.calibration.text import Conversation

LOOP = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TEXT = "all conversations are plain text, not templated"
MEMORY = f"{TEXT}: the chat template used more than 256 MB of memory"
TIME = f"{TEXT}: the chat template did not finish within"
SAMPLE = Conversation("t", (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
DOUBLING = "{% set ns = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RECURSION = f"{TEXT}: chat template: RecursionError"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("templates") / "model")


def template(text: str) -> Change:
    return settings(chat_template=text)


# Each within 10 s and 2 GB, exit status 0: plain text takes the template's place, and a note says why.
CASES: dict[str, tuple[Change, str]] = {
    "loops in loops": (template(LOOPS + LOOP), TIME),
    "long product": (template("{{ 'abcdefgh' * 800000000 }}" + LOOP), MEMORY),
    "long product of a message": (template("{{ messages[0].content * 999999999 }}" + LOOP), MEMORY),
    "doubling": (template(DOUBLING + LOOP), MEMORY),
    "wide format": (template("{{ '%999999999d' % 1 }}" + LOOP), MEMORY),
    "wide indentation": (template("{{ ('a\n' * 99999) | indent(99999) }}" + LOOP), MEMORY),
    "long output": (template(LOOP + "{{ 'a' * 30000000 }}"), "30000"),
    "nested conditions": (template("{% if 1 %}" * 3000 + LOOP + "{% endif %}" * 3000), RECURSION),
    "parentheses": (template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}" + LOOP), RECURSION),
    "recursive macro": (template("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}" + LOOP), "RecursionError"),
    "import": (template("{% import 'os' as os %}{{ os.system('touch pwned') }}" + LOOP), TEXT),
    "escapes in an error": (template("{{ raise_exception('\x1b[2J\x07' + 'x' * 99999) }}"), r"\x1b[2J\x07xxx"),
    "half a character": (settings(chat_template=LOOP + "{{ '\ud800' }}"), ""),
    "the file, hostile": (content("chat_template.jinja", "{{ 'abcdefgh' * 800000000 }}" + LOOP), MEMORY),
}


@pytest.mark.parametrize("name", CASES)
def test_templates(name: str, model: Path, tmp_path: Path) -> None:
    change, words = CASES[name]
    run = plan(model, tmp_path / "m", change)
    run.ends_with(3 if name == "half a character" else 0, words)
    assert "\x1b" not in run.out + run.err
    assert not (tmp_path / "m" / "pwned").exists()


# The same without the program around it: a tenth of a second each.
ALONE: dict[str, tuple[str, str]] = {
    "wide centring": ("{{ 'a' | center(999999999) }}" + LOOP, MEMORY),
    "growing list": ("{% set l = [1] * 900000000 %}" + LOOP, MEMORY),
    "nested lists": ("{{ " + "[" * 3000 + "]" * 3000 + " }}" + LOOP, RECURSION),
    "negations": ("{{ " + "not " * 20000 + "1 }}" + LOOP, "RecursionError"),
    "recursive loop": ("{% for m in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}" + LOOP, "RecursionError"),
    "class walk": ("{{ ''.__class__.__mro__[1].__subclasses__() }}" + LOOP, "SecurityError"),
    "globals": ("{{ raise_exception.__globals__['__builtins__'] }}" + LOOP, "SecurityError"),
    "format string": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}" + LOOP, "SecurityError"),
    "attr filter": ("{{ (messages | attr('__class__')).__mro__ }}" + LOOP, TEXT),
    "include": ("{% include '/etc/passwd' %}" + LOOP, TEXT),
    "drops the messages": ("x", "is missing in its output"),
}


@pytest.mark.parametrize("name", ALONE)
def test_templates_alone(name: str) -> None:
    text, words = ALONE[name]
    process = TemplateProcess(text, {})
    chat = ChatText(process, SAMPLE)
    assert chat.text(SAMPLE) == plain_chat(SAMPLE)
    (note,) = chat.notes()
    assert words in note
    process.close()


def a_fifo(d: Path) -> None:
    os.mkfifo(d / "chat_template.jinja")


REFUSED: dict[str, tuple[Change, str]] = {
    "sparse file": (sparse("chat_template.jinja", 4 << 30), "larger than 1048576 bytes"),
    "FIFO": (a_fifo, "a FIFO, not a regular file"),
    "device": (lambda d: (d / "chat_template.jinja").symlink_to("/dev/zero"), "a device, not a regular file"),
    "directory": (lambda d: (d / "chat_template.jinja").mkdir(), "a directory, not a regular file"),
    "not UTF-8": (content("chat_template.jinja", b"\xff\xfe\x00"), "not UTF-8"),
    "LFS pointer": (content("chat_template.jinja", POINTER), "git lfs pull"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_template_files(name: str, model: Path, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    plan(model, tmp_path / "m", change).ends_with(3, "chat_template.jinja", words)
