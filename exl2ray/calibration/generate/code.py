"""Generated programs: one random statement tree, printed in the syntax of Python, JavaScript, C, Go or Rust.

The programs parse and only use variables in scope; what they compute has no purpose.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from exl2ray.calibration.generate import words


@dataclass(frozen=True)
class Syntax:
    """How a language writes the few statements used here. ``{...}`` are filled with ``str.format``."""

    function: str  # {name}, {params}
    param: str  # {name}
    declare: str  # {name}, {value}
    assign: str
    if_: str  # {cond}
    else_: str
    for_: str  # {name}, {limit}
    while_: str  # {cond}
    end: str  # closes a block; empty in Python
    return_: str  # {value}
    comment: str
    indent: str
    naming: Callable[[list[str]], str]


def _snake(parts: list[str]) -> str:
    return "_".join(parts)


def _camel(parts: list[str]) -> str:
    return parts[0] + "".join(p.capitalize() for p in parts[1:])


PYTHON = Syntax(
    "def {name}({params}):", "{name}", "{name} = {value}", "{name} = {value}", "if {cond}:", "else:",
    "for {name} in range({limit}):", "while {cond}:", "", "return {value}", "#", "    ", _snake,
)  # fmt: skip
JAVASCRIPT = Syntax(
    "function {name}({params}) {{", "{name}", "let {name} = {value};", "{name} = {value};", "if ({cond}) {{",
    "}} else {{", "for (let {name} = 0; {name} < {limit}; {name}++) {{", "while ({cond}) {{", "}", "return {value};",
    "//", "  ", _camel,
)  # fmt: skip
C = Syntax(
    "static long {name}({params})\n{{", "long {name}", "long {name} = {value};", "{name} = {value};",
    "if ({cond}) {{", "}} else {{", "for (long {name} = 0; {name} < {limit}; ++{name}) {{", "while ({cond}) {{", "}",
    "return {value};", "//", "    ", _snake,
)  # fmt: skip
GO = Syntax(
    "func {name}({params}) int {{", "{name} int", "{name} := {value}", "{name} = {value}", "if {cond} {{", "}} else {{",
    "for {name} := 0; {name} < {limit}; {name}++ {{", "for {cond} {{", "}", "return {value}", "//", "\t", _camel,
)  # fmt: skip
RUST = Syntax(
    "fn {name}({params}) -> i64 {{", "{name}: i64", "let mut {name} = {value};", "{name} = {value};", "if {cond} {{",
    "}} else {{", "for {name} in 0..{limit} {{", "while {cond} {{", "}", "return {value};", "//", "    ", _snake,
)  # fmt: skip
SYNTAXES = (PYTHON, JAVASCRIPT, C, GO, RUST)
FLAT = ("declare", "declare", "assign", "assign")
NESTED = ("if", "for", "while")
VARIABLES = [noun for noun in words.NOUNS if noun not in ("map", "switch")]  # keywords of Go and C


class ProgramWriter:
    """Prints random functions of one language; ``lines`` grows as it goes."""

    def __init__(self, rng: random.Random, syntax: Syntax) -> None:
        self.rng = rng
        self.syntax = syntax
        self.lines: list[str] = []

    def function(self) -> None:
        rng, syntax = self.rng, self.syntax
        name = syntax.naming([rng.choice(words.VERBS), rng.choice(words.ADJECTIVES), rng.choice(words.NOUNS)])
        params = rng.sample(VARIABLES, rng.randint(1, 4))
        listed = ", ".join(syntax.param.format(name=p) for p in params)
        note = " ".join((rng.choice(words.ADJECTIVES), rng.choice(words.SUBJECTS), "of", words.place(rng)))
        self.lines.append(f"{syntax.comment} {note}: {', '.join(params)}")
        self.lines.extend(syntax.function.format(name=name, params=listed).split("\n"))
        scope = list(params)
        self._block(scope, depth=1, statements=rng.randint(2, 5))
        self._line(1, syntax.return_.format(value=self._expression(scope, 2)))
        self._close(0)
        self.lines.append("")

    def _block(self, scope: list[str], depth: int, statements: int) -> None:
        """Statements at ``depth``; names declared here leave the scope at its end, except at function level."""
        inner = scope if depth == 1 else list(scope)
        kinds = FLAT + NESTED if depth < 3 else FLAT
        for _ in range(statements):
            self._statement(self.rng.choice(kinds), inner, depth)

    def _statement(self, kind: str, scope: list[str], depth: int) -> None:
        rng, syntax = self.rng, self.syntax
        if kind == "declare":
            name = self._fresh(scope)
            self._line(depth, syntax.declare.format(name=name, value=self._expression(scope, 3)))
            scope.append(name)
        elif kind == "assign":
            name = rng.choice(scope)
            self._line(depth, syntax.assign.format(name=name, value=self._expression(scope, 3)))
        elif kind == "if":
            self._line(depth, syntax.if_.format(cond=self._condition(scope)))
            self._block(scope, depth + 1, rng.randint(1, 2))
            if rng.random() < 0.5:
                self._line(depth, syntax.else_.format())
                self._block(scope, depth + 1, rng.randint(1, 2))
            self._close(depth)
        elif kind == "for":
            name = self._fresh(scope)
            self._line(depth, syntax.for_.format(name=name, limit=rng.randint(2, 500)))
            self._block([*scope, name], depth + 1, rng.randint(1, 3))
            self._close(depth)
        else:
            self._line(depth, syntax.while_.format(cond=self._condition(scope)))
            self._block(scope, depth + 1, rng.randint(1, 2))
            self._close(depth)

    def _expression(self, scope: list[str], depth: int) -> str:
        rng = self.rng
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(scope) if rng.random() < 0.65 else str(rng.randint(0, 1000))
        op = rng.choice(("+", "+", "-", "*", "%", "&", "^"))
        left = self._expression(scope, depth - 1)
        right = str(rng.randint(2, 97)) if op == "%" else self._expression(scope, depth - 1)
        return f"({left} {op} {right})" if rng.random() < 0.7 or op in "%&^" else f"{left} {op} {right}"

    def _condition(self, scope: list[str]) -> str:
        rng = self.rng
        op = rng.choice(("<", ">", "<=", ">=", "==", "!="))
        return f"{rng.choice(scope)} {op} {self._expression(scope, 1)}"

    def _fresh(self, scope: list[str]) -> str:
        return self.rng.choice([v for v in VARIABLES if v not in scope])

    def _line(self, depth: int, text: str) -> None:
        self.lines.append(self.syntax.indent * depth + text)

    def _close(self, depth: int) -> None:
        if self.syntax.end:
            self._line(depth, self.syntax.end)


def program(rng: random.Random) -> str:
    """Two to five functions in one language."""
    writer = ProgramWriter(rng, rng.choice(SYNTAXES))
    for _ in range(rng.randint(2, 5)):
        writer.function()
    return "\n".join(writer.lines)
