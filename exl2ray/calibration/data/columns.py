"""Which columns of a table are calibration text, and what a cell is as text.

``convert.py`` joins all columns of a data row with one space, numbers and times included. So a Parquet file that holds
nothing but strings is read exactly like that. Where other columns stand beside them, joining them makes text that nobody
wrote; then the rule is, in this order: a column with an obvious name (``text``), conversations (``messages``), a question and
its answer, all columns of strings joined with one space.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exl2ray.calibration.data.problem import HOW_TO_MAKE_ONE, DataError
from exl2ray.wording import some

Kind = Literal["text", "binary", "number", "null", "messages", "lists", "other"]
Form = Literal["text", "messages", "pair"]
Message = tuple[str, str]  # (role, content)

OBVIOUS = ("text", "content", "raw_content", "raw_text", "document", "article", "body", "passage", "story", "markdown",
           "code", "sentence", "value")  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
SYSTEM, ASKED = ("system", "system_prompt"), ("instruction", "prompt", "question", "query", "problem", "input")
BESIDE, ANSWERED = ("input", "context"), ("output", "response", "answer", "completion", "solution", "target")
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
         "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "ai": "assistant",
         "developer": "system"}  # fmt: skip
ALL = "*"  # FILE:* joins every column, as the reference does
SHOWN, NAME_CHARACTERS = 12, 60  # names in a message


@dataclass(frozen=True)
class Choice:
    """The columns that are text: joined with a space; or one of conversations; or a pair, whose ``roles`` say who speaks."""

    columns: tuple[str, ...]
    form: Form = "text"
    roles: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    note: str = ""


def choose(kinds: Mapping[str, Kind], wanted: str | None, joins_strings: bool) -> Choice:
    """``joins_strings``: the rule for tables that hold strings alone, which Parquet files have. Raises DataError."""
    usable = {name: kind for name, kind in kinds.items() if kind != "null"}
    if not kinds:
        raise DataError("the file has no columns", HOW_TO_MAKE_ONE)
    if wanted is not None:
        return _asked_for(kinds, usable, wanted)
    texts = [name for name, kind in usable.items() if kind == "text"]
    if joins_strings and texts and len(texts) == len(usable):
        note = f"columns {_list(texts)} are joined, as convert.py does; -c FILE:COLUMN takes one"
        note = note if len(texts) > 1 else _not_conversations(texts)
        return Choice(tuple(texts), ignored=tuple(n for n in kinds if n not in usable), note=note)
    found = (
        _named(usable, OBVIOUS, ("text", "binary")) or _conversations(usable) or _pair(usable)
        or (Choice(tuple(texts)) if texts else None) or _lists(usable)
    )  # fmt: skip
    if found is None:
        there = _list(f"{name} ({kind})" for name, kind in kinds.items())
        tokens = "input_ids are numbers of tokens, of whatever tokenizer: give the text that they were made from"
        hint = tokens if "input_ids" in kinds else f"choose one with -c FILE:COLUMN; or {HOW_TO_MAKE_ONE}"
        raise DataError(f"no column holds text: {there}", hint)
    note = _not_conversations(found.columns) if found.form == "text" else ""
    return Choice(found.columns, found.form, found.roles, tuple(n for n in kinds if n not in found.columns), note)


def _not_conversations(columns: Sequence[str]) -> str:
    """A note where texts stand under the name of conversations: CSV has them so, and who wrote JSON into the cells."""
    found = [n for n in columns if n.lower() in CONVERSATIONS]
    return f"column {_list(found)} holds strings, which are taken as text, not as conversations" if found else ""


def _asked_for(kinds: Mapping[str, Kind], usable: Mapping[str, Kind], wanted: str) -> Choice:
    if wanted == ALL:
        plain = [n for n, k in usable.items() if k in ("text", "number")]
        if len(plain) < len(usable):
            odd = next(n for n in usable if n not in plain)
            raise DataError(f"column {odd!r} is {usable[odd]}, which cannot be joined", "name some: -c FILE:A,B", usage=True)
        return Choice(tuple(plain), ignored=tuple(n for n in kinds if n not in plain))
    names = [wanted] if wanted in kinds else [_same_name(kinds, n.strip()) or n.strip() for n in wanted.split(",")]
    if wanted not in kinds and names == ["messages"]:
        pair = _pair(usable)
        if pair is not None:
            return pair
    for name in names:
        if name not in kinds:
            hint = "name one of them: -c FILE:COLUMN"
            raise DataError(f"has no column {name!r}; its columns are {_list(kinds)}", hint, usage=True)
        kind = kinds[name]
        if kind in ("null", "other") or (kind in ("messages", "lists") and len(names) > 1):
            what = "empty" if kind == "null" else f"{kind}, not text"
            raise DataError(f"column {name!r} is {what}; the columns are {_list(kinds)}", "choose another one", usage=True)
    form: Form = "messages" if kinds[names[0]] == "messages" else "text"
    return Choice(tuple(names), form, ignored=tuple(n for n in kinds if n not in names))


def _named(usable: Mapping[str, Kind], names: Sequence[str], kinds: Sequence[Kind]) -> Choice | None:
    for name in names:
        found = _same_name(usable, name)
        if found is not None and usable[found] in kinds:
            return Choice((found,))
    return None


def _conversations(usable: Mapping[str, Kind]) -> Choice | None:
    found = _named(usable, CONVERSATIONS, ("messages",))
    rest = [n for n, kind in usable.items() if kind == "messages"]
    name = found.columns if found is not None else tuple(rest[:1])
    return Choice((*name, *_system(usable)), "messages") if name else None


def _system(usable: Mapping[str, Kind]) -> list[str]:
    """The column of text that stands before every conversation, or question, of a table."""
    found = (_same_name(usable, n) for n in SYSTEM)
    return [n for n in found if n is not None and usable[n] == "text"][:1]


def _pair(usable: Mapping[str, Kind]) -> Choice | None:
    """A question, perhaps with something beside it, and its answer."""

    def first(names: Sequence[str], *taken: str) -> str | None:
        found = (_same_name(usable, n) for n in names)
        return next((f for f in found if f is not None and f not in taken and usable[f] == "text"), None)

    asked, answered = first(ASKED), first(ANSWERED)
    if asked is None or answered is None:
        return None
    beside = first(BESIDE, asked)
    parts = [*(("system", n) for n in _system(usable)), ("user", asked), ("user", beside), ("assistant", answered)]
    return Choice(tuple(n for _, n in parts if n), "pair", tuple(r for r, n in parts if n))


def _lists(usable: Mapping[str, Kind]) -> Choice | None:
    found = [n for n, kind in usable.items() if kind == "lists"]
    return _named(usable, OBVIOUS + CONVERSATIONS, ("lists",)) or (Choice((found[0],)) if found else None)


def _same_name(names: Iterable[str], wanted: str) -> str | None:
    """The column of that name, whatever its case."""
    known = list(names)
    return wanted if wanted in known else next((n for n in known if n.lower() == wanted.lower()), None)


def _list(names: Iterable[str]) -> str:
    return some(names, SHOWN, NAME_CHARACTERS)


# ---- cells --------------------------------------------------------------------------------------------------------------


def kind_of_value(value: Any) -> Kind:
    """Of a value as JSON has it."""
    if value is None or value in ([], {}):
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (bool, int, float)):
        return "number"
    if conversation_of(value):
        return "messages"
    return "lists" if isinstance(value, list) and all(isinstance(v, str) for v in flat(value)) else "other"


def common_kind(kinds: Iterable[Kind]) -> Kind:
    """Of a column whose cells have these kinds; cells that do not fit are left out later."""
    found = set(kinds) - {"null"}
    if len(found) <= 1:
        return found.pop() if found else "null"
    return "text" if found == {"text", "number"} else "messages" if found == {"messages", "other"} else "other"


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists, in order."""
    if not isinstance(value, list):
        return [value]
    out, waiting = [], [iter(value)]
    while waiting:
        for item in waiting[-1]:
            if isinstance(item, list):
                waiting.append(iter(item))
                break
            out.append(item)
        else:
            waiting.pop()
    return out


def conversation_of(value: Any) -> list[Message]:
    """(role, content) of the messages; empty if it is no conversation. A struct of lists is one, too."""
    if isinstance(value, dict):
        role, content = (_first(value, keys) for keys in (ROLE_KEYS, CONTENT_KEYS))
        if not isinstance(role, list) or not isinstance(content, list):
            return []
        value = [{"role": r, "content": c} for r, c in zip(role, content, strict=False)]
    if not isinstance(value, list):
        return []
    out = []
    for message in value:
        if not isinstance(message, dict):
            return []
        role, content = (_first(message, keys) for keys in (ROLE_KEYS, CONTENT_KEYS))
        if not isinstance(role, str):
            return []
        if isinstance(content, list):  # parts of several kinds; those of text count
            content = "\n".join(str(p["text"]) for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
        if isinstance(content, str) and content.strip():
            out.append((ROLES.get(role.lower(), role.lower()), content))
    return out


def _first(value: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((value[k] for k in keys if value.get(k) is not None), None)


def with_system(said: list[Message], text: str | None) -> list[Message]:
    """A conversation that begins with a system message; with its own if it has one."""
    begun = bool(said) and said[0][0] == "system"
    return [("system", text), *said] if said and not begun and text and text.strip() else said


def pair_of(roles: Sequence[str], cells: Sequence[str | None]) -> list[Message]:
    """The conversation of a data row; empty without a question or an answer."""
    said: dict[str, list[str]] = {role: [] for role in roles}
    for role, text in zip(roles, cells, strict=True):
        said[role] += [text] if text else []
    out = [(role, "\n\n".join(texts)) for role, texts in said.items() if "".join(texts).strip()]
    return out if {"user", "assistant"} <= {role for role, _ in out} else []
