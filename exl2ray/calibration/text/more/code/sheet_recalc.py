"""Dependency tracking and recalculation order.

The engine keeps two maps.  ``_reads`` says which cells and areas a formula
cell looks at, ``_watchers`` is its inverse for single cells.  Areas are not
expanded (a sum over ``A:A`` would put a million entries in the map) but held
in an :class:`AreaIndex`, which answers "who looks at this cell?" by bisection
over column strips.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import logging
from collections import defaultdict
from typing import Callable, Iterable, Iterator, NamedTuple

from .errors import CellError, CircularReference
from .values import Value

log = logging.getLogger(__name__)


class Ref(NamedTuple):
    sheet: int
    row: int
    col: int


class Area(NamedTuple):
    sheet: int
    top: int
    left: int
    bottom: int
    right: int

    def __contains__(self, ref: object) -> bool:
        if not isinstance(ref, Ref):
            return NotImplemented
        return (
            ref.sheet == self.sheet
            and self.top <= ref.row <= self.bottom
            and self.left <= ref.col <= self.right
        )


class State(enum.Enum):
    CLEAN = "clean"
    DIRTY = "dirty"
    RUNNING = "running"


STRIP = 16


class AreaIndex:
    """Areas by strips of sixteen columns, each strip sorted by top row."""

    def __init__(self) -> None:
        self._strips: dict[tuple[int, int], list[tuple[int, int, Area, Ref]]] = defaultdict(list)
        self._serial = itertools.count()

    def add(self, area: Area, owner: Ref) -> None:
        for strip in range(area.left // STRIP, area.right // STRIP + 1):
            entry = (area.top, next(self._serial), area, owner)
            heap = self._strips[area.sheet, strip]
            heap.append(entry)
            heap.sort()

    def discard_owner(self, owner: Ref) -> None:
        for key in list(self._strips):
            kept = [e for e in self._strips[key] if e[3] != owner]
            if kept:
                self._strips[key] = kept
            else:
                del self._strips[key]

    def owners_of(self, ref: Ref) -> Iterator[Ref]:
        for top, _, area, owner in self._strips.get((ref.sheet, ref.col // STRIP), ()):
            if top > ref.row:
                return
            if ref in area:
                yield owner


class Recalculator:
    """Brings dirty cells up to date, precedents before dependants.

    :param evaluate: called with a formula cell; returns its new value.  While
        it runs it may ask for other cells through :meth:`value_of`, which
        recurses into them when they are dirty.
    :param max_depth: recursion limit; beyond it the cell is put back in the
        queue behind the one it was waiting for.
    """

    def __init__(self, evaluate: Callable[[Ref], Value], max_depth: int = 200) -> None:
        self._evaluate = evaluate
        self._max_depth = max_depth
        self._depth = 0
        self._values: dict[Ref, Value] = {}
        self._state: dict[Ref, State] = {}
        self._reads: dict[Ref, tuple[Ref | Area, ...]] = {}
        self._watchers: dict[Ref, set[Ref]] = defaultdict(set)
        self._areas = AreaIndex()
        self._volatile: set[Ref] = set()

    def set_constant(self, ref: Ref, value: Value) -> None:
        self._forget_reads(ref)
        self._values[ref] = value
        self._state[ref] = State.CLEAN
        self.invalidate(ref, include_self=False)

    def set_formula(self, ref: Ref, reads: Iterable[Ref | Area], volatile: bool = False) -> None:
        self._forget_reads(ref)
        self._reads[ref] = tuple(reads)
        for item in self._reads[ref]:
            if isinstance(item, Area):
                self._areas.add(item, ref)
            else:
                self._watchers[item].add(ref)
        (self._volatile.add if volatile else self._volatile.discard)(ref)
        self.invalidate(ref)

    def invalidate(self, ref: Ref, include_self: bool = True) -> None:
        """Mark everything downstream of *ref*.  Stops at cells already dirty."""
        todo = [ref]
        first = True
        while todo:
            cell = todo.pop()
            if not first or include_self:
                if self._state.get(cell) is State.DIRTY:
                    continue
                self._state[cell] = State.DIRTY
            first = False
            todo.extend(self._watchers.get(cell, ()))
            todo.extend(self._areas.owners_of(cell))

    def value_of(self, ref: Ref) -> Value:
        state = self._state.get(ref)
        if state is None:
            return None
        if state is State.RUNNING:
            raise CircularReference(ref)
        if state is State.DIRTY:
            self._run(ref)
        return self._values[ref]

    def recalculate(self) -> int:
        """Evaluate all dirty cells and return how many were evaluated."""
        for ref in self._volatile:
            self.invalidate(ref)
        dirty = [ref for ref, state in self._state.items() if state is State.DIRTY]
        heapq.heapify(dirty)
        done = 0
        while dirty:
            ref = heapq.heappop(dirty)
            if self._state[ref] is State.DIRTY:
                self._run(ref)
                done += 1
        log.debug("recalculated %d cells", done)
        return done

    def _run(self, ref: Ref) -> None:
        if self._depth >= self._max_depth:
            raise RecursionError(f"formula chain too deep at {ref}")
        self._state[ref] = State.RUNNING
        self._depth += 1
        try:
            self._values[ref] = self._evaluate(ref)
        except CellError as error:
            # An error is a value like any other: it flows into the dependants.
            self._values[ref] = error
        finally:
            self._depth -= 1
            self._state[ref] = State.CLEAN

    def _forget_reads(self, ref: Ref) -> None:
        had_area = False
        for item in self._reads.pop(ref, ()):
            if isinstance(item, Area):
                had_area = True
            else:
                self._watchers[item].discard(ref)
        if had_area:
            self._areas.discard_owner(ref)
