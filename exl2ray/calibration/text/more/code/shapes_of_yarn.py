"""Knitting charts as Python objects.

A stitch knows what it takes from the needle and what it leaves there, so a chart can be checked
before anybody casts on two hundred stitches of lace.
"""

from abc import ABC, abstractmethod
from functools import total_ordering


class ChartError(Exception):
    def __init__(self, row, message):
        super().__init__(f"row {row}: {message}")
        self.row = row


class Stitch(ABC):
    """Base class of everything that can stand in a chart square."""

    registry = {}
    symbol = None
    takes = 1
    leaves = 1

    def __init_subclass__(cls, symbol=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if symbol is not None:
            if symbol in Stitch.registry:
                raise TypeError(f"symbol {symbol!r} is used by {Stitch.registry[symbol].__name__} already")
            cls.symbol = symbol
            Stitch.registry[symbol] = cls

    @abstractmethod
    def words(self, wrong_side=False):
        """The pattern abbreviation, as seen from the side that is being worked."""

    def __repr__(self):
        return f"{type(self).__name__}()"

    def __eq__(self, other):
        return type(self) is type(other)

    def __hash__(self):
        return hash(type(self))


class Knit(Stitch, symbol="|"):
    def words(self, wrong_side=False):
        return "p" if wrong_side else "k"


class Purl(Stitch, symbol="-"):
    def words(self, wrong_side=False):
        return "k" if wrong_side else "p"


class YarnOver(Stitch, symbol="o"):
    takes = 0

    def words(self, wrong_side=False):
        return "yo"


class Decrease(Stitch):
    """Several stitches into one. Subclasses say how it leans."""

    takes = 2
    right, wrong = None, None

    def words(self, wrong_side=False):
        word = self.wrong if wrong_side else self.right
        if word is None:
            raise NotImplementedError(f"nobody works {type(self).__name__} on the wrong side")
        return word


class RightLeaning(Decrease, symbol="/"):
    right, wrong = "k2tog", "p2tog"


class LeftLeaning(Decrease, symbol="\\"):
    right, wrong = "ssk", "ssp"


class Centred(Decrease, symbol="^"):
    takes = 3
    right = "s2kp"


class NoStitch(Stitch, symbol="#"):
    """The grey square: keeps the chart rectangular and is skipped by the needles."""

    takes = leaves = 0

    def words(self, wrong_side=False):
        return ""


@total_ordering
class Row:
    def __init__(self, number, stitches):
        self.number = number
        self.stitches = list(stitches)

    @classmethod
    def parse(cls, number, squares):
        try:
            return cls(number, (Stitch.registry[s]() for s in squares))
        except KeyError as unknown:
            raise ChartError(number, f"no stitch is drawn as {unknown}") from None

    takes = property(lambda self: sum(s.takes for s in self.stitches))
    leaves = property(lambda self: sum(s.leaves for s in self.stitches))

    @property
    def wrong_side(self):
        return self.number % 2 == 0

    def __lt__(self, other):
        return self.number < other.number

    def __eq__(self, other):
        return isinstance(other, Row) and self.number == other.number

    def instructions(self):
        # charts are read from the right on the right side, from the left on the wrong side
        order = self.stitches if self.wrong_side else self.stitches[::-1]
        words = [w for w in (s.words(self.wrong_side) for s in order) if w]
        out, i = [], 0
        while i < len(words):
            run = 1
            while i + run < len(words) and words[i + run] == words[i]:
                run += 1
            if words[i] in ("k", "p"):
                out.append(f"{words[i]}{run}")
            else:
                out.append(words[i] if run == 1 else f"({words[i]}) {run} times")
            i += run
        return f"Row {self.number} ({'WS' if self.wrong_side else 'RS'}): " + ", ".join(out) + "."


class Chart:
    def __init__(self, text):
        lines = [line for line in text.strip().splitlines() if line.strip()]
        # row 1 is the bottom line, as on paper
        self.rows = [Row.parse(i, line.strip()) for i, line in enumerate(reversed(lines), start=1)]
        self.check()

    def check(self):
        for below, above in zip(self.rows, self.rows[1:]):
            if below.leaves != above.takes:
                raise ChartError(above.number, f"wants {above.takes} stitches, the needle holds {below.leaves}")

    @property
    def repeatable(self):
        return self.rows[-1].leaves == self.rows[0].takes

    def __str__(self):
        return "\n".join(row.instructions() for row in self.rows)


FERN = Chart(r"""
    |||||||||
    |/o|||o\|
    |||||||||
    ||/o|o\||
    |||||||||
    |||o^o|||
""")

if __name__ == "__main__":
    print(FERN)
    print("repeats" if FERN.repeatable else "does not repeat")
