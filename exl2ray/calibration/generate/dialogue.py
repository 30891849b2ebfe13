"""Generated conversations: small tasks with correct answers (arithmetic, lists, data, code)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from exl2ray.calibration.generate import code, maths, prose, structured, words
from exl2ray.calibration.text import Conversation

Turn = tuple[str, str]  # question, answer


def calculate(rng: random.Random) -> Turn:
    question, answer = rng.choice(maths.TASKS)(rng)
    ask = rng.choice(("Work out {q}", "Please show the steps for {q}", "{q}?", "How do I get {q}?", "{q}, by hand"))
    return ask.format(q=question), answer


def order_words(rng: random.Random) -> Turn:
    items = rng.sample(rng.choice((words.NOUNS, words.GIVEN, words.SUBJECTS, words.ADJECTIVES)), rng.randint(5, 11))
    ask = rng.choice(("Sort alphabetically: {x}", "{x} - in dictionary order please", "Put these in order: {x}"))
    return ask.format(x=", ".join(items)), rng.choice((", ", "\n- ")).join(sorted(items, key=str.lower))


def to_json(rng: random.Random) -> Turn:
    record = structured.table(rng, 1)[0]
    listed = "; ".join(f"{k}: {v}" for k, v in record.items())
    return f"As JSON, with nothing else: {listed}", json.dumps(record, indent=rng.choice((None, 2)))


def read_table(rng: random.Random) -> Turn:
    rows = structured.table(rng, rng.randint(3, 6), flat=True)
    column = rng.choice(list(rows[0]))
    lines = [",".join(rows[0]), *(",".join(str(v) for v in r.values()) for r in rows)]
    return f"What does the column {column} hold?\n\n" + "\n".join(lines), "; ".join(str(r[column]) for r in rows)


def write_code(rng: random.Random) -> Turn:
    program = code.program(rng)
    lines = program.splitlines()
    ask = rng.choice(("How many lines has this?", "Count the lines:", "Lines and blank lines of this, please."))
    return f"{ask}\n\n```\n{program}```", f"{len(lines)}, of which {lines.count('')} blank."


def retell(rng: random.Random) -> Turn:
    sentence = prose.Writer(rng).paragraph(rng.randint(2, 4))
    n = len(sentence.split())
    longest = max(sentence.split(), key=len).strip('.,:;?!"')
    return f"Count the words and name the longest one: {sentence}", f"{n} words; the longest is {longest!r}."


TURNS: tuple[Callable[[random.Random], Turn], ...] = (
    calculate, calculate, order_words, to_json, read_table, write_code, retell,
)  # fmt: skip


def conversation(rng: random.Random) -> Conversation:
    """Two to six questions and answers, sometimes with a system message."""
    messages: list[tuple[str, str]] = []
    if rng.random() < 0.3:
        role = f"You help {words.person(rng)} with {rng.choice(words.SUBJECTS)} and {rng.choice(words.SUBJECTS)}"
        messages.append(("system", f"{role}. Be {rng.choice(words.ADJECTIVES)}."))
    for _ in range(rng.randint(2, 6)):
        question, answer = rng.choice(TURNS)(rng)
        messages += [("user", question.strip()), ("assistant", answer.strip())]
    return Conversation(f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}", tuple(messages))
