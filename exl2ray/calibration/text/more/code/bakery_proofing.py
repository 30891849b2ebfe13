#!/usr/bin/env python3
"""Work backwards from the oven to the alarm clock.

A small bakery wants bread on the shelf at a fixed hour.  Each dough has a chain
of steps, some of which slow down when the room is cold, and a single deck oven
that takes one batch at a time.  This script prints when somebody has to get up.

    $ bakery_proofing.py --shelf 07:00 --room 19.5 rye ciabatta bun
"""

import argparse
import datetime as dt
import sys
from typing import NamedTuple

REFERENCE_TEMP = 24.0


class Step(NamedTuple):
    name: str
    minutes: int
    q10: float = 1.0        # 1.0 means: does not care about temperature
    hands: bool = False     # somebody has to be present

    def duration(self, room):
        factor = self.q10 ** ((REFERENCE_TEMP - room) / 10.0)
        return dt.timedelta(minutes=round(self.minutes * factor))


DOUGHS = {
    "rye": [
        Step("feed the sour", 10, hands=True),
        Step("sour ripens", 900, q10=1.9),
        Step("mix and scrape down", 20, hands=True),
        Step("bulk rest", 45, q10=2.1),
        Step("into tins", 15, hands=True),
        Step("proof", 70, q10=2.1),
        Step("bake", 55, hands=True),
        Step("cool on racks", 60),
    ],
    "ciabatta": [
        Step("poolish", 720, q10=2.3),
        Step("mix", 18, hands=True),
        Step("three folds, half an hour apart", 90, hands=True),
        Step("bulk rest", 60, q10=2.2),
        Step("cut and stretch", 12, hands=True),
        Step("proof on cloth", 40, q10=2.2),
        Step("bake", 22, hands=True),
        Step("cool on racks", 20),
    ],
    "bun": [
        Step("mix", 15, hands=True),
        Step("bulk rest", 80, q10=2.4),
        Step("shape and egg-wash", 25, hands=True),
        Step("proof", 50, q10=2.4),
        Step("bake", 14, hands=True),
        Step("cool on racks", 10),
    ],
}


def backwards(steps, ready, room):
    """Yield (start, step) pairs in order, the last one ending at `ready`."""
    plan = []
    for step in reversed(steps):
        ready -= step.duration(room)
        plan.append((ready, step))
    return plan[::-1]


def bake_interval(plan, room):
    for start, step in plan:
        if step.name == "bake":
            return start, start + step.duration(room)
    raise LookupError("dough is never baked")


def schedule(names, shelf, room):
    """Place the doughs so that no two of them need the oven at once.

    The dough with the longest cooling goes first into the oven; every other
    one is pulled earlier until its baking slot is free.  Greedy, but there are
    five doughs in the book and the oven is the only thing they fight over.
    """
    def tail(name):
        return sum((s.duration(room) for s in DOUGHS[name][-1:]), dt.timedelta())

    taken, result = [], {}
    for name in sorted(names, key=tail):
        ready = shelf
        while True:
            plan = backwards(DOUGHS[name], ready, room)
            begin, end = bake_interval(plan, room)
            clash = [b for b, e in taken if begin < e and b < end]
            if not clash:
                break
            ready -= end - min(clash)
        taken.append((begin, end))
        result[name] = plan
    return result


def clock(text):
    try:
        hour, minute = map(int, text.split(":"))
        return dt.time(hour, minute)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 06:30")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dough", nargs="+", choices=sorted(DOUGHS))
    parser.add_argument("--shelf", type=clock, default=dt.time(7, 0))
    parser.add_argument("--room", type=float, default=21.0, metavar="CELSIUS")
    args = parser.parse_args(argv)

    if not 10 <= args.room <= 35:
        parser.error("nobody bakes at %.1f degrees" % args.room)

    shelf = dt.datetime.combine(dt.date.today() + dt.timedelta(days=1), args.shelf)
    plans = schedule(set(args.dough), shelf, args.room)
    rows = sorted((start, name, step) for name, plan in plans.items() for start, step in plan)
    for start, name, step in rows:
        mark = "*" if step.hands else " "
        print(f"{start:%a %H:%M} {mark} {name:<9} {step.name}")
    early = min(start for start, _, step in rows if step.hands and start.date() == shelf.date())
    print(f"\nfirst one in: {early:%H:%M}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
