"""Conversations as text: rendered with the model's own chat template, or plainly when it has none.

An instruct model sees its template's markers in every prompt, so calibration should too. Templates are code that comes
with the model: they run in Jinja's immutable sandbox, in a child process with limits, and their output is checked against
the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from exl2ray.calibration.limited import MIB, ChildError, LimitedProcess
from exl2ray.calibration.text import Conversation
from exl2ray.errors import CalibrationError

if TYPE_CHECKING:
    from jinja2.ext import Extension

# Some templates print the date; a fixed one keeps equal seeds giving equal rows.
TEMPLATE_DATE = datetime(2024, 7, 26, tzinfo=timezone.utc)
MEMORY_BYTES = 256 * MIB  # of the process that renders; Python and Jinja take 25
COMPILE_SECONDS, RENDER_SECONDS = 2.0, 0.01  # of processor time; published templates take 0.05 and 0.001
CHARACTERS, CHARACTERS_PER_CHARACTER = 100_000, 20  # of output: for the template's own text, and for the messages
SPEAKERS = {"user": "User", "assistant": "Assistant"}


def plain_chat(conversation: Conversation) -> str:
    """Text of a conversation for models without a template: a "User:" or "Assistant:" line before each turn."""
    turns = [f"{SPEAKERS[role]}: {text}" if role in SPEAKERS else text for role, text in conversation.messages]
    return "\n\n".join(turns) + "\n"


class ChatRenderer:
    """Renders conversations with one template. Raises CalibrationError if the template cannot be compiled."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # in the child alone

        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = TEMPLATE_DATE.strftime
        self._special_tokens = dict(special_tokens)
        try:
            self._template = env.from_string(template)
        except MemoryError:
            raise
        except Exception as e:  # the parser's recursion has an end, too
            raise CalibrationError(f"chat template: {type(e).__name__}: {e}") from e

    def render(self, conversation: Conversation, reply: bool = False) -> str:
        """The templated text. A template without a system role gets the system message inside the first user turn; one that
        wants the parts of a message, as those of models that see do, gets each as one part of text.

        ``reply``: with what begins the assistant's next turn. Raises CalibrationError if the template fails on this
        conversation or drops a user's message.
        """
        ways = [conversation.messages]
        if conversation.messages[0][0] == "system" and len(conversation.messages) > 1:
            (_, system), (_, first), *rest = conversation.messages
            ways.append((("user", f"{system}\n\n{first}"), *rest))
        problems = []
        for in_parts in (False, True):
            for messages in ways:
                try:
                    return self._render(messages, reply, in_parts)
                except CalibrationError as e:
                    problems.append(e)
        raise problems[len(ways) - 1]  # of messages as they mostly are

    def _render(self, messages: tuple[tuple[str, str], ...], reply: bool, in_parts: bool) -> str:
        context: dict[str, Any] = {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": content}] if in_parts else content}
                for role, content in messages
            ],
            "add_generation_prompt": reply,
            "tools": None,
            "documents": None,
            **self._special_tokens,
        }
        try:
            text = self._template.render(context)
        except MemoryError:
            raise
        except Exception as e:  # code of the model's author; it can raise anything
            raise CalibrationError(f"chat template: {type(e).__name__}: {e}") from e
        for role, content in messages:
            if role != "assistant" and content.strip() not in text:
                raise CalibrationError(f"chat template: the {role} message {content[:40]!r} is missing in its output")
        return text


class TemplateProcess:
    """A ChatRenderer in a child process, started by the first conversation. A limit that was met once holds for good."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._template, self._special_tokens = template, dict(special_tokens)
        self._child: LimitedProcess | None = None
        self._reason = ""  # why it cannot render anything

    def compile(self) -> None:
        """Starts the process, once. Raises CalibrationError, and does so for good, if the template cannot be compiled."""
        if self._reason:
            raise CalibrationError(self._reason)
        if self._child is None:
            self._child = LimitedProcess("template")
            start = {"op": "compile", "special_tokens": self._special_tokens}
            self._ask(start, [self._template.encode("utf-8", "replace")], COMPILE_SECONDS, needed=True)

    def render(self, conversation: Conversation, reply: bool = False) -> str:
        """As ``ChatRenderer.render``; raises CalibrationError for a limit as well."""
        self.compile()
        most = CHARACTERS + CHARACTERS_PER_CHARACTER * sum(len(content) for _, content in conversation.messages)
        request = {"op": "render", "messages": conversation.messages, "reply": reply, "characters": most}
        return self._ask(request, [], RENDER_SECONDS)[0].decode("utf-8")

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._reason = self._reason or "chat template: its process was closed"

    def _ask(
        self, request: Mapping[str, Any], blobs: Sequence[bytes], seconds: float, needed: bool = False
    ) -> list[bytes]:
        """needed: nothing can be asked any more if this fails."""
        assert self._child is not None
        try:
            return self._child.ask(request, blobs, cpu_seconds=seconds, memory_bytes=MEMORY_BYTES)[1]
        except ChildError as e:
            reason = e.reason.removeprefix("CalibrationError: chat template: ")
            limit = e.ended or reason.startswith("used more")
            message = f"the chat template {reason}" if limit else f"chat template: {reason}"
            if limit or needed:
                self._reason = message
                self.close()
            raise CalibrationError(message) from e


class ChatText:
    """Conversations to text, never failing: what the template cannot render becomes plain text, and ``notes`` says so.

    A template that cannot render ``sample`` is not used at all (``templated`` is False).
    """

    def __init__(self, renderer: TemplateProcess | ChatRenderer | None, sample: Conversation) -> None:
        self._renderer: TemplateProcess | ChatRenderer | None = None
        self._failed = 0
        self._reason = ""
        if renderer is None:
            return
        try:
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


def _generation_tag() -> type[Extension]:
    """``{% generation %}`` ... ``{% endgeneration %}`` marks what is trained on. As in transformers it is a block like
    others: line ends beside it, and names that are set in it, go where they go there."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes for HTML, which no chat format wants. The arguments are those that transformers gives it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
