"""Which bag for which patient.

>>> str(BloodType.parse("ab-"))
'AB-'
>>> BloodType.parse("O-").red_cells_go_to(BloodType.parse("A+"))
True
>>> BloodType.parse("O-").plasma_goes_to(BloodType.parse("A+"))
False
"""

from __future__ import annotations

import enum
import heapq
import re
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Iterable, Iterator


class Antigen(enum.Flag):
    NONE = 0
    A = enum.auto()
    B = enum.auto()
    D = enum.auto()     # "Rh positive"


@dataclass(frozen=True, slots=True)
class BloodType:
    antigens: Antigen

    _PATTERN = re.compile(r"(AB|A|B|O|0)\s*([+-])", re.IGNORECASE)

    @classmethod
    def parse(cls, text: str) -> BloodType:
        match = cls._PATTERN.fullmatch(text.strip())
        if not match:
            raise ValueError(f"not a blood type: {text!r}")
        letters, sign = match[1].upper(), match[2]
        antigens = Antigen.D if sign == "+" else Antigen.NONE
        for letter in letters:
            if letter in "AB":
                antigens |= Antigen[letter]
        return cls(antigens)

    def __str__(self) -> str:
        letters = "".join(x for x in "AB" if Antigen[x] in self.antigens)
        return (letters or "O") + ("+" if Antigen.D in self.antigens else "-")

    def red_cells_go_to(self, patient: BloodType) -> bool:
        """The patient must know every antigen on the donor's cells."""
        return self.antigens & ~patient.antigens == Antigen.NONE

    def plasma_goes_to(self, patient: BloodType) -> bool:
        """Plasma carries antibodies against what the donor lacks; Rh does not count here."""
        missing = (Antigen.A | Antigen.B) & ~self.antigens
        return missing & patient.antigens == Antigen.NONE


BloodType.ALL = tuple(BloodType.parse(t) for t in "O- O+ A- A+ B- B+ AB- AB+".split())


@dataclass(frozen=True)
class Bag:
    code: str
    type: BloodType
    drawn: date
    shelf_life: timedelta = timedelta(days=42)

    @property
    def expires(self) -> date:
        return self.drawn + self.shelf_life


class OutOfBlood(LookupError):
    def __init__(self, patient: BloodType, wanted: int, found: int):
        super().__init__(f"{wanted} bags for {patient} wanted, {found} found")
        self.patient, self.wanted, self.found = patient, wanted, found


class Fridge:
    """Stock of red cells, one heap per type, oldest bag on top."""

    def __init__(self, bags: Iterable[Bag] = ()):
        self._heaps: dict[BloodType, list[tuple[date, str, Bag]]] = {t: [] for t in BloodType.ALL}
        for bag in bags:
            self.put(bag)

    def put(self, bag: Bag) -> None:
        heapq.heappush(self._heaps[bag.type], (bag.expires, bag.code, bag))

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def discard_expired(self, today: date) -> Iterator[Bag]:
        for heap in self._heaps.values():
            while heap and heap[0][0] < today:
                yield heapq.heappop(heap)[2]

    def issue(self, patient: BloodType, count: int, today: date) -> list[Bag]:
        """Take ``count`` bags for ``patient`` out of the fridge, or none at all.

        Identical type is preferred.  Beyond that, a donor type is the better the fewer other
        patients could have used it, so that O- is spent last.
        """
        list(self.discard_expired(today))
        order = sorted(
            (t for t in BloodType.ALL if t.red_cells_go_to(patient)),
            key=lambda t: (t != patient, sum(t.red_cells_go_to(p) for p in BloodType.ALL)),
        )
        picked: list[Bag] = []
        for t in order:
            heap = self._heaps[t]
            while heap and len(picked) < count:
                picked.append(heapq.heappop(heap)[2])
        if len(picked) < count:
            for bag in picked:
                self.put(bag)
            raise OutOfBlood(patient, count, len(picked))
        return picked

    def shortages(self, minimum: dict[BloodType, int]) -> dict[BloodType, int]:
        return {
            t: need - len(self._heaps[t])
            for t, need in minimum.items()
            if len(self._heaps[t]) < need
        }
