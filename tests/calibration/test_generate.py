"""Generated text: deterministic, diverse, and right where it claims something."""

from __future__ import annotations

import ast
import csv
import io
import json
import random
import re
from itertools import islice
from xml.etree import ElementTree

import numpy as np
import pytest
from calibration_helpers import train_bpe

from exl2ray.calibration import generate
from exl2ray.calibration.chat_text import plain_chat
from exl2ray.calibration.generate import code, dialogue, maths, prose, structured


def characters(row_set: str, size: int) -> list[str]:
    source = map(plain_chat, generate.conversations(1)) if row_set == "chat" else generate.texts(row_set, 1)
    texts: list[str] = []
    while sum(map(len, texts)) < size:
        texts.append(next(source))
    return texts


def test_texts_depend_on_seed_set_and_index_only() -> None:
    first = list(islice(generate.texts("web", 3), 5))
    assert first == list(islice(generate.texts("web", 3), 5))
    assert len({*first, *islice(generate.texts("web", 4), 5), *islice(generate.texts("articles", 3), 5)}) == 15
    assert list(islice(generate.conversations(3), 2)) == list(islice(generate.conversations(3), 2))


@pytest.mark.parametrize("row_set", [*generate.WRITERS, "chat"])
def test_repetition_is_bounded(row_set: str) -> None:
    """Each set alone, tokens of a small vocabulary: 8-grams nearly all distinct, no 64 tokens twice.

    A conversion takes at most about 100,000 characters of generated text per set, of the multilingual one far less.
    """
    texts = characters(row_set, 60_000 if row_set == "multilingual" else 200_000)
    bpe = train_bpe(texts, 2048)
    ids = np.concatenate([e.ids for e in bpe.encode_batch(texts)]).astype(np.int32)
    for n, least in ((8, 0.9), (64, 1.0)):
        grams = [w.tobytes() for w in np.lib.stride_tricks.sliding_window_view(ids, n)]
        assert len(set(grams)) / len(grams) >= least


@pytest.mark.parametrize("seed", range(20))
def test_arithmetic_is_true(seed: int) -> None:
    """Each equation between plain integer expressions holds."""
    rng = random.Random(seed)
    checked = 0
    for task in maths.TASKS:
        question, answer = task(rng)
        for line in re.split(r"[;\n]", answer):
            sides = line.strip().replace(" x ", " * ").split(" = ")
            if len(sides) == 2 and all(re.fullmatch(r"[\d +*-]+", side) for side in sides):
                checked += 1
                assert eval(sides[0]) == eval(sides[1]), (question, line)
    assert checked > 5


def test_equations_are_solved() -> None:
    rng = random.Random(1)
    for _ in range(50):
        question, answer = maths.linear_equation(rng)
        solution = re.search(r"= (\S+) \(about", answer)
        sides = re.fullmatch(r"(-?\d+)([a-z]) ([+-]\d+) = (-?\d+)\2 \+ \((\S+)\)", question)
        assert solution
        assert sides
        x, a, b, c, d = (_fraction(t) for t in (solution[1], sides[1], sides[3], sides[4], sides[5]))
        assert a * x + b == pytest.approx(c * x + d)
        quadratic, roots = maths.quadratic(rng)
        p, q, r = (int(t) for t in re.fullmatch(r"(\d+)x\^2 ([+-]\d+)x ([+-]\d+) = 0", quadratic).groups())  # type: ignore[union-attr]
        for root in re.findall(r"/\d+ = (-?\d+)", roots):
            assert p * int(root) ** 2 + q * int(root) + r == 0


def _fraction(text: str) -> float:
    top, _, bottom = text.partition("/")
    return int(top) / int(bottom or 1)


def test_python_programs_parse() -> None:
    for seed in range(30):
        writer = code.ProgramWriter(random.Random(seed), code.PYTHON)
        writer.function()
        ast.parse("\n".join(writer.lines))


@pytest.mark.parametrize("syntax", [s for s in code.SYNTAXES if s.end])
def test_blocks_are_closed(syntax: code.Syntax) -> None:
    writer = code.ProgramWriter(random.Random(2), syntax)
    for _ in range(20):
        writer.function()
    text = "\n".join(writer.lines)
    assert text.count("{") == text.count("}") > 0
    assert text.count("(") == text.count(")")


def test_variables_are_in_scope() -> None:
    """Run the Python programs' straight-line cousins: every name read was assigned on the way."""
    for seed in range(30):
        writer = code.ProgramWriter(random.Random(seed), code.PYTHON)
        writer.function()
        tree = ast.parse("\n".join(writer.lines))
        known = {a.arg for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for a in n.args.args}
        known |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert read <= known | {"range"}


@pytest.mark.parametrize("seed", range(20))
def test_data_files_are_well_formed(seed: int) -> None:
    rng = random.Random(seed)
    json.loads(structured.as_json(rng))
    ElementTree.fromstring(structured.as_xml(rng))
    text = structured.as_csv(rng)
    delimiter = next(c for c in ",;\t" if len({len(r) for r in csv.reader(io.StringIO(text), delimiter=c)}) == 1)
    assert len(list(csv.reader(io.StringIO(text), delimiter=delimiter))) >= 7
    table = structured.as_markdown(rng).splitlines()
    assert len({line.count("|") for line in table}) == 1
    stamps = [line[:8] for line in structured.as_log(rng).splitlines()]
    assert stamps == sorted(stamps)


def test_conversations_answer_correctly() -> None:
    rng = random.Random(4)
    for _ in range(20):
        question, answer = dialogue.order_words(rng)
        items = re.split(r", |\n- ", answer)
        assert items == sorted(items, key=str.lower)
        assert all(item in question for item in items)
        question, answer = dialogue.write_code(rng)
        body = question.split("```\n")[1].removesuffix("```")
        assert answer.startswith(f"{len(body.splitlines())}, ")
        json.loads(dialogue.to_json(rng)[1])


def test_prose_leaves_no_slot_open() -> None:
    rng = random.Random(0)
    for make in (prose.letter, prose.instructions, prose.report):
        for _ in range(30):
            text = make(rng)
            assert "{" not in text
            assert not re.search(r"\b[Aa] [aeiou]", text)
