"""Reads the lines of knitting patterns and counts stitches.

    row 3: k2, *yo, k2tog; rep from * to last 3 sts, k3
    row 4: [p1, (k1, p1) 3 times] twice, p to end

A row eats the stitches on the left needle and leaves others on the right one. The program finds the rows of a pattern
that cannot be knitted with the stitches at hand, which is the usual misprint.
"""
import re
from dataclasses import dataclass
from typing import Iterator, Union

# name -> (stitches used, stitches made)
STITCHES = {
    "k": (1, 1), "p": (1, 1), "sl": (1, 1), "yo": (0, 1), "m1": (0, 1), "kfb": (1, 2), "k2tog": (2, 1), "p2tog": (2, 1),
    "ssk": (2, 1), "skpo": (2, 1), "s2kp": (3, 1), "k3tog": (3, 1), "c4f": (4, 4), "c4b": (4, 4), "c6f": (6, 6), "tw2": (2, 2),
}
TIMES = {"once": 1, "twice": 2, "thrice": 3}
TOKEN = re.compile(r"\s*(?:(?P<word>[a-z]\w*)|(?P<num>\d+)|(?P<sym>[][(),;*]))", re.I)


class PatternError(ValueError):
    pass


@dataclass(frozen=True)
class Stitch:
    used: int
    made: int
    count: int | None          # None: to the end (or to `leave` before it)
    leave: int = 0


@dataclass(frozen=True)
class Group:
    body: tuple["Node", ...]
    times: int | None
    leave: int = 0


Node = Union[Stitch, Group]


class Reader:
    def __init__(self, text: str):
        self.tokens = list(self._split(text.strip().rstrip(".")))
        self.at = 0

    @staticmethod
    def _split(text: str) -> Iterator[str]:
        pos = 0
        while pos < len(text):
            m = TOKEN.match(text, pos)
            if not m:
                raise PatternError(f"cannot read {text[pos:pos + 12]!r}")
            yield m.group().strip().lower()
            pos = m.end()

    def peek(self, n: int = 0) -> str:
        return self.tokens[self.at + n] if self.at + n < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        tok = self.peek()
        if expected and tok not in expected:
            raise PatternError(f"{' or '.join(expected)} expected, {tok or 'end of row'!r} found")
        self.at += 1
        return tok

    def sequence(self, closers: tuple[str, ...]) -> tuple[Node, ...]:
        out: list[Node] = []
        while self.peek() not in closers:
            if self.peek() == "*":
                self.take()
                body = self.sequence((";",))
                self.take(";")
                self.take("rep")
                self.take("from")
                self.take("*")
                out.append(Group(body, None, self.tail()))
            else:
                out.append(self.item())
            if self.peek() == ",":
                self.take()
            elif self.peek() not in closers:
                raise PatternError(f"a comma is missing before {self.peek()!r}")
        return tuple(out)

    def item(self) -> Node:
        tok = self.take()
        if tok in ("(", "["):
            close = ")" if tok == "(" else "]"
            body = self.sequence((close,))
            self.take(close)
            return Group(body, self.times())
        m = re.fullmatch(r"([a-z]+)(\d*)", tok)
        if tok in STITCHES:
            name, count = tok, 1
        elif m and m[1] in STITCHES:
            name, count = m[1], int(m[2] or 1)
        else:
            raise PatternError(f"no such stitch: {tok!r}")
        if self.peek() == "to":
            return Stitch(*STITCHES[name], None, self.tail())
        return Stitch(*STITCHES[name], count)

    def times(self) -> int:
        if self.peek() in TIMES:
            return TIMES[self.take()]
        if self.peek().isdigit():
            n = int(self.take())
            self.take("times")
            return n
        return 1

    def tail(self) -> int:
        """`to end` or `to last N sts`: how many stitches stay."""
        self.take("to")
        if self.take("end", "last") == "end":
            return 0
        n = int(self.take()) if self.peek().isdigit() else 1
        self.take("st", "sts")
        return n


def work(nodes: tuple[Node, ...], have: int) -> tuple[int, int]:
    """Returns stitches left over and stitches made."""
    made = 0
    for node in nodes:
        if isinstance(node, Stitch):
            n = node.count if node.count is not None else (have - node.leave) // max(node.used, 1)
            have -= n * node.used
            made += n * node.made
        elif node.times is not None:
            for _ in range(node.times):
                have, m = work(node.body, have)
                made += m
        else:
            used = -work(node.body, 0)[0]
            if used <= 0:
                raise PatternError("the repeat uses no stitches and would never end")
            n, rest = divmod(have - node.leave, used)
            if rest:
                raise PatternError(f"the repeat of {used} leaves {rest} over: {have - node.leave} stitches before the last {node.leave}")
            have, m = have - n * used, n * work(node.body, 0)[1]
            made += m
    return have, made


def check(pattern: str, cast_on: int) -> list[tuple[int, int | str]]:
    report: list[tuple[int, int | str]] = []
    stitches = cast_on
    for line in pattern.splitlines():
        m = re.match(r"\s*row (\d+)\s*:\s*(.+)", line, re.I)
        if not m:
            continue
        try:
            left, made = work(Reader(m[2]).sequence(("",)), stitches)
            if left:
                raise PatternError(f"{abs(left)} stitches {'are left over' if left > 0 else 'too few on the needle'}")
        except PatternError as e:
            report.append((int(m[1]), str(e)))
            break
        report.append((int(m[1]), made))
        stitches = made
    return report
