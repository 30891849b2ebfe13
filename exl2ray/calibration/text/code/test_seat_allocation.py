"""Highest-averages seat allocation, with the tests that pin down its corner cases."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest

Divisor = Callable[[int], Fraction]


def dhondt(seats: int) -> Fraction:
    return Fraction(seats + 1)


def sainte_lague(seats: int) -> Fraction:
    return Fraction(2 * seats + 1)


def swedish(seats: int) -> Fraction:
    """Sainte-Lague with a first divisor of 1.2, which makes the first seat a little dearer."""
    return Fraction(6, 5) if seats == 0 else sainte_lague(seats)


class TiedSeat(Exception):
    """Two parties have exactly the same claim to the last seat; the law asks for a drawing of lots."""

    def __init__(self, parties: list[str]):
        super().__init__("tie for the last seat between " + " and ".join(sorted(parties)))
        self.parties = frozenset(parties)


@dataclass(frozen=True)
class Rules:
    seats: int
    divisor: Divisor = dhondt
    threshold: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if self.seats < 1:
            raise ValueError(f"an assembly needs at least one seat, not {self.seats}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold {self.threshold} is not a share of the votes")


def allocate(votes: Mapping[str, int], rules: Rules) -> dict[str, int]:
    """Hand out seats one at a time to the party with the highest quotient.

    Fractions rather than floats: with eight-digit vote counts the quotients of two parties can
    agree to fifteen decimals without being equal, and a tie must never be a rounding accident.
    """
    total = sum(votes.values())
    running = {p: v for p, v in votes.items() if v > 0 and Fraction(v, total) >= rules.threshold}
    if not running:
        raise ValueError("no party passes the threshold")
    seats = dict.fromkeys(votes, 0)
    remaining = rules.seats
    while remaining:
        quotient = {p: v / rules.divisor(seats[p]) for p, v in running.items()}
        best = max(quotient.values())
        leaders = [p for p, q in quotient.items() if q == best]
        # Equal claims only matter when there are fewer seats left than claimants.
        if len(leaders) > remaining:
            raise TiedSeat(leaders)
        for party in leaders:
            seats[party] += 1
        remaining -= len(leaders)
    return seats


@pytest.fixture
def votes() -> dict[str, int]:
    return {"Harbour": 53_000, "Orchard": 24_000, "Lantern": 23_000}


@pytest.mark.parametrize(
    ("divisor", "expected"),
    [
        (dhondt, {"Harbour": 4, "Orchard": 2, "Lantern": 1}),
        (sainte_lague, {"Harbour": 3, "Orchard": 2, "Lantern": 2}),
        (swedish, {"Harbour": 3, "Orchard": 2, "Lantern": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_divisor_decides_who_gets_the_seventh_seat(votes, divisor, expected):
    assert allocate(votes, Rules(seats=7, divisor=divisor)) == expected


@pytest.mark.parametrize("seats", range(1, 60))
def test_every_seat_is_given_exactly_once(votes, seats):
    result = allocate(votes, Rules(seats=seats))
    assert sum(result.values()) == seats


def test_a_larger_house_never_costs_a_party_a_seat(votes):
    """Unlike largest-remainder methods, divisor methods avoid the Alabama paradox."""
    rules = Rules(seats=5)
    before = allocate(votes, rules)
    for size in range(6, 40):
        after = allocate(votes, replace(rules, seats=size))
        assert all(after[p] >= before[p] for p in votes), f"someone lost a seat at size {size}"
        before = after


def test_threshold_is_inclusive():
    votes = {"Mill": 95, "Weir": 5}
    assert allocate(votes, Rules(seats=20, threshold=Fraction(5, 100)))["Weir"] == 1
    assert allocate(votes, Rules(seats=20, threshold=Fraction(6, 100)))["Weir"] == 0


def test_equal_votes_with_room_for_all_is_no_tie():
    assert allocate({"Oak": 10, "Elm": 10}, Rules(seats=4)) == {"Oak": 2, "Elm": 2}


def test_tie_names_the_parties_concerned():
    with pytest.raises(TiedSeat, match="Elm and Oak") as caught:
        allocate({"Oak": 10, "Elm": 10, "Fir": 1}, Rules(seats=3))
    assert caught.value.parties == {"Oak", "Elm"}


def test_a_party_without_votes_stays_in_the_result():
    assert allocate({"Oak": 3, "Ash": 0}, Rules(seats=2)) == {"Oak": 2, "Ash": 0}


@pytest.mark.parametrize("kwargs", [{"seats": 0}, {"seats": 3, "threshold": Fraction(1)}])
def test_contradictory_rules_are_refused_early(kwargs):
    with pytest.raises(ValueError, match=r"seat|threshold"):
        Rules(**kwargs)
