"""Recognises files that were moved and edited in the same commit.

Each removed and each added file is reduced to a *sketch*: the smallest 128
hash values among its shingles of three consecutive lines. The share of values
that two sketches have in common estimates how much the files have in common,
and an inverted index from value to file finds likely pairs without comparing
everything with everything. Only the likely pairs are then read in full.
"""

import heapq
import zlib
from collections import Counter, defaultdict
from itertools import islice

from brindle.ui import progress
from brindle.vfs import ReadError

SKETCH_SIZE = 128
MAX_BYTES = 4 * 1024 * 1024

# Values found in more files than this are licence headers and the like.
COMMON = 40


def shingles(text):
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 3]
    if len(lines) < 3:
        yield b"\n".join(lines)
        return
    for triple in zip(lines, islice(lines, 1, None), islice(lines, 2, None)):
        yield b"\n".join(triple)


def sketch(text):
    return frozenset(heapq.nsmallest(SKETCH_SIZE, {zlib.crc32(s) for s in shingles(text)}))


def similarity(old, new):
    """Share of the bytes of the larger text that sit in lines both texts have.

    Order does not count: a function moved to the end of its file is no edit.
    """
    a, b = Counter(old.splitlines(True)), Counter(new.splitlines(True))
    shared = sum(len(line) * n for line, n in (a & b).items())
    return shared / max(len(old), len(new), 1)


class MoveFinder:
    """
    :param read: function from a path and a side (``"old"`` or ``"new"``) to bytes
    :param threshold: least similarity for a pair, from 0 to 1
    """

    def __init__(self, read, threshold=0.6):
        if not 0 < threshold <= 1:
            raise ValueError("threshold must be above 0 and at most 1")
        self.read = read
        self.threshold = threshold

    def find(self, removed, added):
        """Pair up paths; each occurs at most once.

        :returns: list of ``(old, new, similarity)``, best first
        """
        old = self._texts(removed, "old")
        new = self._texts(added, "new")

        pairs = list(self._identical(old, new))
        for a, b, _ in pairs:
            del old[a], new[b]
        if self.threshold < 1:
            pairs += self._edited(old, new)
        return pairs

    def _texts(self, paths, side):
        texts = {}
        for path in progress(paths, f"reading {side} files"):
            try:
                text = self.read(path, side)
            except ReadError:
                continue            # a submodule, or beyond the sparse checkout
            if text:
                texts[path] = text
        return texts

    def _identical(self, old, new):
        homes = defaultdict(list)
        for path, text in old.items():
            homes[text].append(path)
        for path in sorted(new):
            candidates = homes.get(new[path])
            if candidates:
                best = max(candidates, key=lambda c: (tail_in_common(c, path), c))
                candidates.remove(best)
                yield best, path, 1.0

    def _edited(self, old, new):
        index = defaultdict(list)
        for path, text in old.items():
            if self._textual(text):
                for value in sketch(text):
                    index[value].append(path)

        scored = []
        for path, text in progress(new.items(), "comparing"):
            if not self._textual(text):
                continue
            votes = Counter()
            for value in sketch(text):
                owners = index.get(value, ())
                if len(owners) <= COMMON:
                    votes.update(owners)
            for candidate, _ in votes.most_common(5):
                s = similarity(old[candidate], text)
                if s >= self.threshold:
                    scored.append((s, tail_in_common(candidate, path), candidate, path))

        scored.sort(key=lambda t: (-t[0], -t[1], t[2], t[3]))
        used = set()
        for s, _, a, b in scored:
            if ("old", a) not in used and ("new", b) not in used:
                used |= {("old", a), ("new", b)}
                yield a, b, s

    @staticmethod
    def _textual(text):
        return len(text) <= MAX_BYTES and b"\0" not in text[:8000]


def tail_in_common(a, b):
    """How many trailing path components agree: ``src/x/a.c`` and ``lib/x/a.c`` give 2."""
    n = 0
    for x, y in zip(a.split("/")[::-1], b.split("/")[::-1]):
        if x != y:
            break
        n += 1
    return n
