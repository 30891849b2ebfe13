"""``exl2ray chat``: a source and what was made from it answer the same questions side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from exl2ray.commands import engines
from exl2ray.errors import CalibrationError, UsageError
from exl2ray.evaluate.chat import MOST_PROMPT_TOKENS, Answer, Messages, Panel
from exl2ray.evaluate.forward import RunOptions
from exl2ray.formats.elsewhere import named
from exl2ray.formats.json_file import read_bounded
from exl2ray.remote.source import local
from exl2ray.terminal.console import clean, clean_lines, is_terminal, json_line

PROMPTS_BYTES = 1 << 20  # of a file
PROMPT_BYTES = 1 << 18  # of one question
MARK = " || "  # where an answer leaves the first model's, on a screen without colours


def chat(
    models: Sequence[str], prompts: Sequence[str], prompts_file: str | None, system: str | None, max_tokens: int, device: str,
    options: RunOptions, engine: str, out: TextIO | None,
) -> None:  # fmt: skip
    """Asks ``models`` everything in ``prompts`` and ``prompts_file``; without any, what the user types until the input ends.

    ``out``: gets one line of JSON per question, in place of what people read.
    """
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: at least one token is needed")
    if max_tokens > MOST_PROMPT_TOKENS:
        raise UsageError(f"--max-tokens {max_tokens}: at most {MOST_PROMPT_TOKENS} can be asked for", "give fewer")
    questions = [*prompts, *(read_prompts(Path(prompts_file)) if prompts_file is not None else [])]
    if not questions and (out is not None or not is_terminal(sys.stdin)):
        raise UsageError("there is nothing to ask", "give --prompt TEXT, --prompts FILE, or --prompts - for standard input")
    for question in (*questions, *([system] if system is not None else [])):
        _check_text(question)
    models = [local(m, flag="MODEL") for m in models]
    panel = Panel(models, device, options, partial(engines.engine, engine))
    opening: Messages = (("system", system),) if system is not None else ()
    if system is not None and not panel.templated:
        raise UsageError("--system: the model has no chat template", "leave it out; the prompt is continued as it is")
    if questions:
        for question in questions:
            _exchange(panel, [(*opening, ("user", question))] * len(models), max_tokens, out)
        return
    histories = [opening] * len(models)
    print("One question a line; end with Ctrl-D." if panel.templated else "No chat template: your text is continued.")
    for question in _typed():
        _check_text(question)
        asked = ("user", question)
        histories = [(*h, asked) if panel.templated else (asked,) for h in histories]
        answers = _exchange(panel, histories, max_tokens, None)
        histories = [(*h, ("assistant", a.text)) for h, a in zip(histories, answers, strict=True)]


def _check_text(text: str) -> None:
    """UsageError for a prompt that is none: of half characters, or longer than a chat can be."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as e:
        text = f"a prompt holds bytes that are not UTF-8 (at character {e.start})"
        raise UsageError(text, "write it to a file as UTF-8, and give it with --prompts") from e
    if size > PROMPT_BYTES:
        raise UsageError(f"a prompt has {size} bytes; at most {PROMPT_BYTES} are taken", "eval --text takes long texts")


def read_prompts(path: Path) -> list[str]:
    """Questions of a file, or of standard input for "-": a JSON array of strings, or one on each line that is not empty."""
    hint = "give a text file with a question a line"
    try:
        data = _piped(hint) if str(path) == "-" else read_bounded(path, PROMPTS_BYTES, UsageError, hint)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UsageError(f"--prompts {path}: not UTF-8 text (byte {e.start})", hint) from e
    if not text.lstrip().startswith("["):
        found = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UsageError(f"--prompts {path}: not a JSON array of strings: {e}", hint) from e
        if not isinstance(found, list) or not all(isinstance(x, str) and x.strip() for x in found):
            raise UsageError(f"--prompts {path}: not a JSON array of strings", hint)
    if not found:
        raise UsageError(f"--prompts {path}: holds no question", hint)
    return found


def _piped(hint: str) -> bytes:
    """What standard input has; UsageError if it is closed, or has more than questions."""
    if sys.stdin is None:
        raise UsageError("--prompts -: standard input is closed", hint)
    data = sys.stdin.buffer.read(PROMPTS_BYTES + 1)
    if len(data) > PROMPTS_BYTES:
        raise UsageError(f"--prompts -: more than {PROMPTS_BYTES >> 20} MiB come from standard input", hint)
    return data


def _typed() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _exchange(panel: Panel, conversations: Sequence[Messages], most: int, out: TextIO | None) -> list[Answer]:
    """One question to all models, shown while they answer."""
    question = conversations[0][-1][1]
    answers: list[Answer] = []
    if out is not None:
        *_, answers = panel.ask(conversations, most)
        line: dict[str, Any] = {"prompt": question, "answers": [a.to_json() for a in answers]}
        print(json_line(line), file=out, flush=True)
    elif is_terminal(sys.stdout):
        console = Console()
        with Live(console=console, refresh_per_second=8, vertical_overflow="visible") as live:
            for answers in panel.ask(conversations, most):
                live.update(side_by_side(question, answers))
    else:
        *_, answers = panel.ask(conversations, most)
        print("\n".join(plain_lines(question, answers)), flush=True)
    if not answers:
        raise CalibrationError("the models did not answer")
    return answers


def side_by_side(question: str, answers: Sequence[Answer]) -> Group:
    """A column for each model; what is not the first one's answer stands out."""
    table = Table(show_edge=False, expand=True, padding=(0, 1))
    for answer in answers:
        table.add_column(clean(_short(answer.model)), ratio=1, overflow="fold")
    texts = []
    for answer in answers:
        same = answer.common if answer.parts is not None else len(answer.text)
        text = Text(clean_lines(answer.text[:same]))
        text.append(clean_lines(answer.text[same:]), style="bold yellow")
        texts.append(text)
    table.add_row(*texts)
    table.add_row(*(Text(summary(a), style="dim") for a in answers))
    return Group(Text(f"\n{clean_lines(question)}\n", style="bold"), table)


def plain_lines(question: str, answers: Sequence[Answer]) -> list[str]:
    """As `side_by_side`, one model below the other."""
    lines = [f"? {clean_lines(question)}"]
    for answer in answers:
        text = answer.text
        if answer.parts is not None:
            text = text[: answer.common] + MARK + text[answer.common :]
        lines += ["", f"{clean(answer.model)}  ({summary(answer)})", *(clean(line) for line in text.strip().splitlines())]
    return [*lines, ""]


def summary(answer: Answer) -> str:
    """Length, speed and end of an answer, and where it leaves the first model's."""
    pace = f", {len(answer.tokens) / answer.seconds:.1f} a second" if answer.seconds else ""
    parts = "" if answer.parts is None else f", differs from token {answer.parts + 1} on"
    cut = ", cut off" if answer.finished == "length" else ""
    return f"{len(answer.tokens)} tokens{pace}{parts}{cut}"


def _short(name: str) -> str:
    return Path(named(name)).name or name
