"""What a driver and its workers say of a tuning, beside `exl2ray.team.messages`."""

from __future__ import annotations

from dataclasses import dataclass

from exl2ray.team.messages import Pass
from exl2ray.tune.inputs import Begun
from exl2ray.tune.settings import Settings

PIECES = 50  # of a tuning, each told when it is done
WAIT = "wait"  # method: of what is told at once
BITS = 0.0  # the one chain of a tuning


@dataclass(frozen=True, kw_only=True)
class TunePass(Pass):
    """pieces: numbers of those that are not told yet; the one after the last stands for the decision. inputs: what the models
    were like in the beginning."""

    settings: Settings
    identity: str
    held_kinds: tuple[str, ...]
    steps: int
    pieces: tuple[int, ...]
    inputs: Begun


def ends_of(steps: int) -> list[int]:
    """The step that each piece of a tuning ends with."""
    count = min(PIECES, steps)
    return [(k + 1) * steps // count for k in range(count)]
