"""Chat templates: rendering, the sandbox, and falling back to plain text instead of failing."""

from __future__ import annotations

from itertools import islice

import pytest

from exl2ray.calibration import generate
from exl2ray.calibration.chat_text import ChatRenderer, ChatText, TemplateProcess, plain_chat
from exl2ray.calibration.text import Conversation
from exl2ray.errors import CalibrationError

SHORT = Conversation("t", (("user", "Hi"), ("assistant", "Hello")))
CHAT = Conversation(
    "t",
    (("system", "Be kind."), ("user", "Hi & <b>"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")),
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"


def test_rendering() -> None:
    text = ChatRenderer("{{ bos_token }}" + LOOP, TOKENS).render(CHAT)
    expected = "<s>system: Be kind.</s>\nuser: Hi & <b></s>\nassistant: Hello</s>\nuser: Bye</s>\nassistant: Ciao</s>\n"
    assert text == expected


def test_plain_text() -> None:
    expected = "Be kind.\n\nUser: Hi & <b>\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant: Ciao\n"
    assert plain_chat(CHAT) == expected


def test_template_helpers() -> None:
    """tojson does not escape for HTML, the date is fixed, loop controls and training markers are known."""
    template = (
        "{{ strftime_now('%d %b %Y') }}|{{ {'k': '<é>'} | tojson }}|"
        "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}"
        "{% if loop.index == 9 %}{% break %}{% endif %}{% endfor %}"
    )
    assert ChatRenderer(template, TOKENS).render(CHAT) == '26 Jul 2024|{"k": "<é>"}|Be kind.Hi & <b>HelloByeCiao'


@pytest.mark.parametrize(
    "start",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
    ],
)
def test_template_without_a_system_role(start: str) -> None:
    """Refusing the system message and dropping it silently are both met by moving it into the first question."""
    text = ChatRenderer(start + LOOP, TOKENS).render(CHAT)
    assert text.startswith("user: Be kind.\n\nHi & <b></s>\nassistant: Hello")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",  # does not compile
        "{{ messages[0].content.missing.attribute }}",
        "{{ raise_exception('never') }}",
        "{{ messages[99].content }}",
        "only this",  # drops the messages
        "{{ messages.append(1) }}" + LOOP,  # immutable sandbox
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + LOOP,
        "{% for i in range(10**9) %}x{% endfor %}" + LOOP,
    ],
)
def test_bad_templates(template: str) -> None:
    with pytest.raises(CalibrationError, match="chat template: "):
        ChatRenderer(template, TOKENS).render(CHAT)
    chat = ChatText(TemplateProcess(template, TOKENS), sample=CHAT)
    assert not chat.templated
    assert chat.text(CHAT) == plain_chat(CHAT)
    (note,) = chat.notes()
    assert note.startswith("chat: all conversations are plain text, not templated: chat template: ")


def test_single_failures_are_counted() -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('long') }}{% endif %}" + LOOP
    chat = ChatText(TemplateProcess(template, TOKENS), SHORT)
    assert chat.templated
    assert chat.notes() == []
    assert chat.text(CHAT) == plain_chat(CHAT)
    assert chat.text(SHORT).startswith("user: Hi</s>")
    assert chat.notes() == ["chat: 1 conversations are plain text, not templated: chat template: TemplateError: long"]


def test_no_template_needs_no_note() -> None:
    chat = ChatText(None, CHAT)
    assert (chat.templated, chat.notes()) == (False, [])


PUBLISHED_FORMS = {
    "headers": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|header|>' + "
        "message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    ),
    "strict": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<turn>' + message['role'] + '\n' + "
        "message['content'] | trim + '</turn>\n' }}{% endfor %}"
    ),
    "whitespace": (
        "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' "
        "+ '\n' }}\n{%- endfor %}\n  {%- if tools %}\n {{ tools | tojson }}\n{% endif %}\n"
    ),
    "generation": (
        "{% for m in messages %}{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}\n   {{ m.content }} {% continue %}{% endif %}{{ {'a': '<ü>'} | tojson(indent=2) }}\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_FORMS)
def test_same_text_as_transformers(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    renderer = ChatRenderer(PUBLISHED_FORMS[name], TOKENS)
    compared = 0
    for conversation in islice(generate.conversations(3), 20):
        if name == "strict" and conversation.messages[0][0] == "system":
            continue
        messages = [{"role": role, "content": content} for role, content in conversation.messages]
        theirs, _ = utils.render_jinja_template([messages], chat_template=PUBLISHED_FORMS[name], **TOKENS)
        assert renderer.render(conversation) == theirs[0]
        compared += 1
    assert compared > 5
