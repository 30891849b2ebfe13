"""Conversations as text: rendered with the model's own chat template, or plainly when it has none.

An instruct model sees its template's markers in every prompt, so calibration should too. Templates are code that comes
with the model: they run in Jinja's immutable sandbox, and their output is checked against the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exl2ray.calibration.text import Conversation
from exl2ray.errors import CalibrationError

# Some templates print the date; a fixed one keeps equal seeds giving equal rows.
TEMPLATE_DATE = datetime(2024, 7, 26, tzinfo=timezone.utc)
# Training-only markers of Hugging Face templates; Jinja does not know the tag.
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
SPEAKERS = {"user": "User", "assistant": "Assistant"}


def plain_chat(conversation: Conversation) -> str:
    """Text of a conversation for models without a template: a "User:" or "Assistant:" line before each turn."""
    turns = [f"{SPEAKERS[role]}: {text}" if role in SPEAKERS else text for role, text in conversation.messages]
    return "\n\n".join(turns) + "\n"


class ChatRenderer:
    """Renders conversations with one template. Raises CalibrationError if the template cannot be compiled."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = TEMPLATE_DATE.strftime
        self._special_tokens = dict(special_tokens)
        try:
            self._template = env.from_string(GENERATION_TAG.sub("", template))
        except TemplateError as e:
            raise CalibrationError(f"chat template: {type(e).__name__}: {e}") from e

    def render(self, conversation: Conversation) -> str:
        """The templated text. A template without a system role gets the system message inside the first user turn.

        Raises CalibrationError if the template fails on this conversation or drops a user's message.
        """
        try:
            return self._render(conversation.messages)
        except CalibrationError:
            if conversation.messages[0][0] != "system":
                raise
        (_, system), (_, first), *rest = conversation.messages
        return self._render((("user", f"{system}\n\n{first}"), *rest))

    def _render(self, messages: tuple[tuple[str, str], ...]) -> str:
        context: dict[str, Any] = {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "add_generation_prompt": False,
            "tools": None,
            "documents": None,
            **self._special_tokens,
        }
        try:
            text = self._template.render(context)
        except Exception as e:  # code of the model's author; it can raise anything
            raise CalibrationError(f"chat template: {type(e).__name__}: {e}") from e
        for role, content in messages:
            if role != "assistant" and content.strip() not in text:
                raise CalibrationError(f"chat template: the {role} message {content[:40]!r} is missing in its output")
        return text


class ChatText:
    """Conversations to text, never failing: what the template cannot render becomes plain text, and ``notes`` says so.

    A template that cannot render ``sample`` is not used at all (``templated`` is False).
    """

    def __init__(self, template: str | None, special_tokens: Mapping[str, str], sample: Conversation) -> None:
        self._renderer: ChatRenderer | None = None
        self._failed = 0
        self._reason = ""
        if template is None:
            return
        try:
            renderer = ChatRenderer(template, special_tokens)
            renderer.render(sample)
            self._renderer = renderer
        except CalibrationError as e:
            self._reason = e.message

    @property
    def templated(self) -> bool:
        return self._renderer is not None

    def text(self, conversation: Conversation) -> str:
        if self._renderer is None:
            return plain_chat(conversation)
        try:
            return self._renderer.render(conversation)
        except CalibrationError as e:
            self._failed += 1
            self._reason = e.message
            return plain_chat(conversation)

    def notes(self) -> list[str]:
        if not self._reason:
            return []
        which = f"{self._failed} conversations are" if self.templated else "all conversations are"
        return [f"chat: {which} plain text, not templated: {self._reason}"]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML, which no chat format wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
