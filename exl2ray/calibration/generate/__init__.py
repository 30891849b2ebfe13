"""Endless seeded text for row sets whose written documents run out (short rows of a large vocabulary need more text).

Templates with random content: names, numbers, records, worked arithmetic, programs. It follows the written text and
never replaces it; ``Rows.notes`` says how much of it was used. Text ``i`` of a set depends on the seed and ``i`` only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count

from exl2ray.calibration.generate import code, dialogue, languages, maths, prose, structured
from exl2ray.calibration.text import Conversation

WRITERS: dict[str, tuple[Callable[[random.Random], str], ...]] = {
    "web": (prose.letter, prose.instructions, prose.letter),
    "articles": (prose.report,),
    "code": (code.program,),
    "formats": (structured.data_file,),
    "technical": (maths.exercises,),
    "stories": (prose.report, prose.letter),
    "multilingual": (languages.passage,),
}


def texts(row_set: str, seed: int) -> Iterator[str]:
    """Endless texts for a row set of ``WRITERS``."""
    writers = WRITERS[row_set]
    for i in count():
        rng = random.Random(f"{seed}/{row_set}/{i}")
        yield rng.choice(writers)(rng)


def conversations(seed: int) -> Iterator[Conversation]:
    """Endless conversations for the chat rows."""
    for i in count():
        yield dialogue.conversation(random.Random(f"{seed}/chat/{i}"))
