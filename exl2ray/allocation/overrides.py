"""``--set``: what the user wants for single linears, whatever the allocation would choose.

``PATTERN=BITS`` keeps every matching linear at BITS or wider in all its groups; ``PATTERN=OPTION`` gives it exactly this
option, written as in `exl2ray.quant.qparams`. The pattern is a glob over linear keys, like ``model.layers.*.v_proj``, or a
regular expression after ``re:``. Of several that match a linear the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING

from exl2ray.calibration.limited import ChildError, LimitedProcess
from exl2ray.errors import UsageError
from exl2ray.formats.layout import WIDTHS, QParams
from exl2ray.quant.qparams import distinct_options, head_option, parse

if TYPE_CHECKING:  # the command line reads --set before anything heavy is loaded
    from exl2ray.model.spec import LinearSpec, ModelSpec

LIKE, LIKE_OPTION = "as in --set 'model.layers.*.v_proj=6'", "as in --set 'model.layers.*.v_proj=0.1:4b_128g/0.9:3b_128g'"

MATCHING_SECONDS, MATCHING_BYTES = 3.0, 512 << 20  # of a regular expression, for all linears: 100,000 take 0.1 s


@dataclass(frozen=True)
class Override:
    """One ``--set``. Exactly one of ``minimum`` (bits) and ``option`` is given. keys: of the linears of a model that it is
    about, once that is known (`parse_overrides`).
    """

    text: str
    pattern: str
    minimum: int | None = None
    option: QParams | None = None
    keys: frozenset[str] = frozenset()


def parse_override(text: str) -> Override:
    """``PATTERN=BITS`` or ``PATTERN=OPTION``; UsageError for anything else."""
    pattern, equals, value = text.rpartition("=")
    if not equals or not pattern or not value:
        raise UsageError(f"--set {text}: PATTERN=BITS or PATTERN=OPTION is needed", LIKE)
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as e:
            raise UsageError(f"--set {text}: {e}", "a regular expression follows re:") from e
    if re.fullmatch(r"[0-9]{1,4}", value):
        if int(value) not in WIDTHS:
            raise UsageError(f"--set {text}: bits are {', '.join(map(str, WIDTHS))}", LIKE)
        return Override(text, pattern, minimum=int(value))
    try:
        option = parse(value)
    except UsageError as e:
        raise UsageError(f"--set {text}: {e.message}", f"or bits, one of {', '.join(map(str, WIDTHS))}") from e
    if any(b not in WIDTHS for b in option.bits) or not min(option.props) > 0 or not abs(sum(option.props) - 1) <= 1e-6:
        raise UsageError(f"--set {text}: widths are {', '.join(map(str, WIDTHS))} and shares add up to 1", LIKE_OPTION)
    if list(option.bits) != sorted(option.bits, reverse=True) or any(s % 32 or s <= 0 for s in option.group_sizes):
        raise UsageError(f"--set {text}: widths fall from part to part, and group sizes are multiples of 32", LIKE_OPTION)
    return Override(text, pattern, option=option)


def parse_overrides(texts: Iterable[str], spec: ModelSpec) -> tuple[Override, ...]:
    """All of them; UsageError for one that matches no linear of the model."""
    keys = tuple(x.key for x in spec.linears)
    found = [replace(o, keys=_matching(o.text, o.pattern, keys)) for o in map(parse_override, texts)]
    for override in found:
        if not override.keys:
            raise UsageError(f"--set {override.text}: matches none of {len(keys)} linears", f"they look like {keys[0]}")
    return tuple(found)


@lru_cache(maxsize=64)  # asked for every bitrate
def _matching(flag: str, pattern: str, keys: tuple[str, ...]) -> frozenset[str]:
    """The keys that a pattern matches. A regular expression may take for ever, so it gets a process and a time of its own.

    Raises UsageError for one that takes longer.
    """
    if not pattern.startswith("re:"):
        return frozenset(key for key in keys if fnmatchcase(key, pattern))
    child = LimitedProcess("pattern")
    try:
        request = {"op": "match", "pattern": pattern[3:], "texts": keys}
        answer, _ = child.ask(request, cpu_seconds=MATCHING_SECONDS, memory_bytes=MATCHING_BYTES)
    except ChildError as e:
        hint = "a repetition inside of a repetition, as in (a+)+, can take for ever: simplify it, or use a glob"
        raise UsageError(f"--set {flag}: the regular expression {e.reason}", hint) from e
    finally:
        child.close()
    return frozenset(answer["matching"])


def counting(overrides: Sequence[Override], linear: LinearSpec) -> Override | None:
    """The override that counts for a linear, if any."""
    return next((o for o in reversed(overrides) if linear.key in o.keys), None)


def overridden(overrides: Sequence[Override], linear: LinearSpec, option: QParams) -> QParams:
    """The option of a linear where the allocation chose ``option``: itself, if no override forbids it."""
    override = counting(overrides, linear)
    if override is None:
        return option
    if override.option is not None:
        return override.option
    wide = override.minimum or 0
    return option if min(option.bits) >= wide else smallest_option(linear, wide)


def smallest_option(linear: LinearSpec, bits: int) -> QParams:
    """The option of the linear's table column that takes the least space with every group at ``bits`` or wider."""
    options = distinct_options(linear.role)
    if not options:
        return head_option(min(b for b in WIDTHS if b >= bits and min(head_option(b).bits) >= bits))
    fitting = [option for option in options if min(option.bits) >= bits]
    return min(fitting, key=lambda q: q.bits_of(linear))
