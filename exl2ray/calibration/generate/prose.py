"""Generated prose: short letters, notes and reports. People and places stay the same within one text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from exl2ray.calibration.generate import words

# Literal runs are kept short: what repeats between texts should be grammar, not sentences.
SENTENCES = """
{A} {verb} the {adj} {noun} near {p}, and {B} {verb} it {adv}.
On {weekday} {a} counted {k} {nouns} in {q}; {k} of them were {adj}.
"{Adj}, but not {adj}," said {B}, who had {verb} the {noun}.
By {clock} the {noun} at {p} was {adj} and the {noun} {adj}.
Nobody in {q} {verb} {anoun} before {date}.
The price of {anoun} rose from {n} to {n} within {n} {unit}.
{A} studied {subject} in {p}, later {subject} in {q}.
Was the {noun} {adj}, or had {a} {adv} {verb} another?
{B} wrote: the {adj} {noun} is {n} {unit} too long.
Between {p} and {q} lie {n} {unit} of {adj} road.
A {noun}, a {adj} {noun} and {k} {nouns} were left.
{Subject} explains part of it; {subject}, according to {b}, the rest.
In {month} the {noun} {verb} by {a} turned {adj}.
When {b} {verb} the {noun}, {a} {verb} the {adj} one.
It cost {n}, which {B} called {adj} for {anoun}.
Not every {noun} is {adj}: {q} has {k} that are {adj}.
{A} asked for {n} {unit}; {b} had only {n}.
The {noun} opens at {clock} and closes at {clock}, except on {weekday}.
{C}, a teacher of {subject}, {verb} both the {noun} and the {noun}.
First they {verb} the {noun}, then {adv} the {adj} {nouns}.
If the {noun} stays {adj}, {c} will need {n} {unit} more.
{Adv}, {a} {verb} {k} {nouns}; {adv}, none.
Records from {date} mention {anoun} of {n} {unit}.
What {b} {verb} in {p} was {adj}, {adj} and {adv} useful.
{K} visitors came to the {noun} of {q} on {weekday}.
Without the {adj} {noun}, {c} {verb} {adv}.
{C} and {b} disagree about {subject}, though not about the {noun}.
There was {anoun} behind the {noun}, {adj} as {subject}.
The {nouns} were counted twice: {k}, then {k}.
{A} kept the {noun}; the {adj} {noun} went to {p}.
Since {date}, {q} has {verb} its {noun} only {adv}.
How {adj} the {noun} looked, and how {adj} it proved!
{B} {adv} {verb} what {c} had {verb} in {month}.
A {adj} {noun} weighs {n} {unit}, {anoun} {n}.
"Who {verb} my {noun}?" asked {c} at {clock}.
Neither {a} nor {b} {verb} the {noun} of {p}.
The committee for {subject} met {adv}, {verb} {k} {nouns} and left at {clock}.
Rain fell over {p}; the {noun} in {q} stayed {adj}.
{K} of {k} {nouns} failed, mostly the {adj} ones.
Every {weekday} {c} {verb} {anoun} and {n} {unit} of wire.
Between {month} and {month} the {noun} was {adj}.
{A} still owes {b} {n} for the {adj} {noun}.
Before {clock}, {q} is {adj}; after it, {adj} and full of {nouns}.
The report on {subject} runs to {k} pages and mentions the {noun} {adv}.
{C} prefers {subject} to {subject} whenever the {noun} is {adj}.
They {adv} {verb} the {noun}, the {noun} and, on {date}, the {adj} {noun}.
One {noun} in {k} turns {adj} within {n} {unit}.
Ask {b} about the {noun}: it is {adj}, {adv} {verb} and {n} {unit} wide.
""".strip().splitlines()

GREETINGS = ("Dear {a},", "Hello {a},", "{a}:", "To {A}", "Good morning {a},", "Hi {a} and {b},")
CLOSINGS = ("Yours, {c}", "Regards, {C}", "{c}", "With thanks, {C}", "Until {weekday}, {c}", "From {q}, {c}")
STEPS = """
{Adv} check the {noun}; {n} {unit} is {adj}.
Set the {adj} {noun} to {n}.
Keep the {noun} {adj} until {clock}.
Remove {n} {unit} from the {noun}, not the {noun}.
Wait {n} {unit}, then turn the {adj} {noun}.
Ask {b} if the {noun} seems {adj}.
Note the {noun}'s number ({k}) and the {unit}.
Never leave {anoun} on a {adj} {noun}.
Weigh the {noun}: {n} {unit}, or {adv} less.
Cover both {nouns} with {anoun}.
""".strip().splitlines()


class Writer:
    """Fills sentence slots; the people a, b, c (capital: full name) and places p, q are fixed for one text."""

    def __init__(self, rng: random.Random) -> None:
        people = {letter: words.person(rng) for letter in "abc"}
        self.rng = rng
        self._fixed = {k: v.split()[0] for k, v in people.items()}
        self._fixed |= {k.upper(): v for k, v in people.items()}
        self._fixed |= {"p": words.place(rng), "q": words.place(rng)}
        self._drawn: dict[str, Callable[[], str]] = {
            "noun": lambda: rng.choice(words.NOUNS),
            "nouns": lambda: words.plural(rng.choice(words.NOUNS)),
            "anoun": lambda: words.article(rng.choice(words.NOUNS)),
            "adj": lambda: rng.choice(words.ADJECTIVES),
            "verb": lambda: rng.choice(words.VERBS),
            "adv": lambda: rng.choice(words.ADVERBS),
            "subject": lambda: rng.choice(words.SUBJECTS),
            "unit": lambda: rng.choice(words.UNITS),
            "weekday": lambda: rng.choice(words.WEEKDAYS),
            "month": lambda: rng.choice(words.MONTHS),
            "n": lambda: words.number(rng),
            "k": lambda: words.count(rng),
            "clock": lambda: words.clock(rng),
            "date": lambda: words.date(rng),
        }

    def fill(self, template: str) -> str:
        text = words.SLOT.sub(lambda m: self._slot(m[1]), template)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def paragraph(self, sentences: int) -> str:
        return " ".join(self.fill(t) for t in self.rng.sample(SENTENCES, sentences))

    def _slot(self, name: str) -> str:
        if name in self._fixed:
            return self._fixed[name]
        if name in self._drawn:
            return self._drawn[name]()
        drawn = self._drawn[name.lower()]()  # {Adj}: the same at the start of a sentence
        return drawn[0].upper() + drawn[1:]


def letter(rng: random.Random) -> str:
    """A letter or note of one to three paragraphs."""
    w = Writer(rng)
    body = "\n\n".join(w.paragraph(rng.randint(3, 6)) for _ in range(rng.randint(1, 3)))
    return f"{w.fill(rng.choice(GREETINGS))}\n\n{body}\n\n{w.fill(rng.choice(CLOSINGS))}\n"


def instructions(rng: random.Random) -> str:
    """Numbered steps between a heading and a remark."""
    w = Writer(rng)
    steps = [w.fill(t) for t in rng.sample(STEPS, rng.randint(4, 8))]
    listed = "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))
    title = w.fill("The {adj} {noun}, with {anoun}")
    return f"{title}\n\n{listed}\n\n{w.paragraph(rng.randint(2, 4))}\n"


def report(rng: random.Random) -> str:
    """A report with a dated heading and some sections."""
    w = Writer(rng)
    title = w.fill(rng.choice(("{Subject} in {p}", "The {nouns} of {q}", "{p}: {adj} {noun}", "{A} and {B}")))
    parts = [f"{title}\n{words.place(rng)}, {words.date(rng)}\n"]
    for _ in range(rng.randint(2, 4)):
        if rng.random() < 0.4:
            parts.append(w.fill("{Adj} {nouns} and {subject}").strip() + "\n")
        parts.append(w.paragraph(rng.randint(4, 8)) + "\n")
    return "\n".join(parts)
