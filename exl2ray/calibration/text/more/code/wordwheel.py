#!/usr/bin/env python3
"""Solve and make word wheels: nine letters, one of them in the hub, every word must use it.

usage: wordwheel.py solve HUB RIM [--words FILE]
       wordwheel.py make [--seed N] [--words FILE] [--min N] [--max N]
"""
import random
import sys
from collections import Counter
from itertools import islice
from textwrap import wrap

WORDS = "/usr/share/dict/words"


def load(path):
    with open(path, encoding="utf-8") as f:
        for line in f:
            w = line.strip()
            if 4 <= len(w) <= 9 and w.isascii() and w.isalpha() and w.islower():
                yield w


def mask(word):
    m = 0
    for c in word:
        m |= 1 << ord(c) - 97
    return m


class Lexicon:
    """Words bucketed by the set of their letters; most wheels touch a few hundred of the buckets."""

    def __init__(self, words):
        self.buckets = {}
        for w in words:
            self.buckets.setdefault(mask(w), []).append(w)
        self.nines = [w for b in self.buckets.values() for w in b if len(w) == 9]

    def solve(self, hub, letters):
        have = Counter(letters)
        full, need = mask(letters), mask(hub)
        out = []
        sub = full
        while sub:                      # every non-empty subset of the bits of `full`
            if sub & need:
                for w in self.buckets.get(sub, ()):
                    if not Counter(w) - have:
                        out.append(w)
            sub = (sub - 1) & full
        return sorted(out, key=lambda w: (-len(w), w))

    def make(self, rnd, lo, hi):
        pool = self.nines[:]
        rnd.shuffle(pool)
        for nine in pool:
            hubs = sorted(set(nine))
            rnd.shuffle(hubs)
            for hub in hubs:
                found = self.solve(hub, nine)
                if lo <= len(found) <= hi:
                    return hub, nine, found
        raise SystemExit(f"no wheel with {lo} to {hi} words in this list")


WHEEL = r"""
      .-----------.
     / {0}   {1}   {2} \
    |    .---.    |
    | {7}  | {hub} |  {3} |
    |    '---'    |
     \ {6}   {5}   {4} /
      '-----------'
"""


def draw(hub, letters, rnd):
    rim = list(letters)
    rim.remove(hub)
    rnd.shuffle(rim)
    return WHEEL.format(*(c.upper() for c in rim), hub=hub.upper())


def show(words):
    for n in range(9, 3, -1):
        row = [w for w in words if len(w) == n]
        if row:
            print(f"{n} letters ({len(row)})")
            print("\n".join(wrap("  ".join(row), 76, initial_indent="  ", subsequent_indent="  ")))


def option(argv, name, default, kind=str):
    if name in argv:
        i = argv.index(name)
        try:
            value = kind(argv[i + 1])
        except (IndexError, ValueError):
            sys.exit(f"{name} wants a value")
        del argv[i:i + 2]
        return value
    return default


def main(argv):
    path = option(argv, "--words", WORDS)
    seed = option(argv, "--seed", None, int)
    lo, hi = option(argv, "--min", 20, int), option(argv, "--max", 60, int)
    try:
        lexicon = Lexicon(load(path))
    except OSError as e:
        sys.exit(f"{path}: {e.strerror}")
    rnd = random.Random(seed)
    match argv:
        case ["solve", hub, rim] if len(hub) == 1 and (hub + rim).isalpha():
            found = lexicon.solve(hub.lower(), (hub + rim).lower())
            show(found)
            print(f"\n{len(found)} words; good {len(found) * 2 // 5}, excellent {len(found) * 7 // 10}")
        case ["make"]:
            hub, nine, found = lexicon.make(rnd, lo, hi)
            print(draw(hub, nine, rnd))
            print(f"{len(found)} words. The first letters of the longest:",
                  " ".join(w[0].upper() + "." for w in islice(found, 3)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
