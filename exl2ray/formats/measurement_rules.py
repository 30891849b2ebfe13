"""Whether a measurement says anything: numbers of which no allocation follows are refused, not allocated by.

A file may hold numbers that are legal one by one and mean nothing together: every option equally good, or no linear of any
consequence. An allocation takes whatever is cheapest then, and the model is far smaller and worse than what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from exl2ray.errors import FormatError

MAX_OPTIONS = 64  # of a module; the tables have 19 and 17
NOTHING = 1e-30  # a sensitivity below is none
MOST = 1e33  # of sensitivities and losses; a loss of 1e30 is that of an option that yields NaN, and experts add up
AGAIN = "measure again without -m"


def refuse_meaningless(accuracies: Sequence[Sequence[float]], extras: Iterable[Mapping[str, Any]]) -> None:
    """FormatError if all options of all modules are equally good, or the sensitivities of all linears are zero.

    accuracies: of the options of each choice; extras: what modules hold that the reference ignores.
    """
    lists = [options for options in accuracies if len(options) > 1]
    if lists and all(accuracy == options[0] for options in lists for accuracy in options):
        raise FormatError("measurement: all options of each module have the same accuracy; none can be chosen by it", AGAIN)
    kl = [pair[0] for extra in extras for pair in _sensitivities(extra)]
    if kl and all(is_amount(v) and v <= NOTHING for v in kl):
        raise FormatError("measurement: the sensitivities of all linears are 0; no option can be chosen by them", AGAIN)


def checked_pair(value: Any, where: str) -> tuple[float, float]:
    """A sensitivity, [KL, squared error], as numbers; FormatError naming ``where`` for anything else."""
    if not isinstance(value, list) or len(value) != 2 or not all(is_amount(v) for v in value):
        raise FormatError(
            f"{where}: the sensitivity is not [KL, squared error], numbers from 0 to {MOST:g}", AGAIN
        )
    kl, error = (float(v) for v in value)
    if kl > 0 and not (error > 0 and is_amount(kl / error)):
        raise FormatError(f"{where}: a sensitivity of KL {kl:g} at a squared error of {error:g}", AGAIN)
    return kl, error


def is_amount(value: Any) -> bool:
    """Whether ``value`` is a number from 0 to `MOST`."""
    return type(value) in (int, float) and 0 <= value <= MOST


def _sensitivities(extra: Mapping[str, Any]) -> Iterator[list[Any]]:
    found = extra.get("sensitivity")
    for pair in found.values() if isinstance(found, Mapping) else ():
        if isinstance(pair, list) and pair:
            yield pair
