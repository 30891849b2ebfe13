"""``--set``: what the user wants for single linears, whatever the allocation would choose.

``PATTERN=BITS`` keeps every matching linear at BITS or wider in all its groups; ``PATTERN=OPTION`` gives it exactly this
option, written as in `exl2ray.quant.qparams`. The pattern is a glob over linear keys, like ``model.layers.*.v_proj``, or a
regular expression after ``re:``. Of several that match a linear the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from exl2ray.errors import UsageError
from exl2ray.formats.layout import WIDTHS, QParams, pad32
from exl2ray.quant.qparams import distinct_options, head_option, parse

if TYPE_CHECKING:  # the command line reads --set before anything heavy is loaded
    from exl2ray.model.spec import LinearSpec, ModelSpec

LIKE, LIKE_OPTION = "as in --set 'model.layers.*.v_proj=6'", "as in --set 'model.layers.*.v_proj=0.1:4b_128g/0.9:3b_128g'"


@dataclass(frozen=True)
class Override:
    """One ``--set``. Exactly one of ``minimum`` (bits) and ``option`` is given."""

    text: str
    pattern: str
    minimum: int | None = None
    option: QParams | None = None

    def matches(self, key: str) -> bool:
        """Whether this override is about the linear with this key."""
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], key) is not None
        return fnmatchcase(key, self.pattern)


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
    found = tuple(parse_override(text) for text in texts)
    keys = [x.key for x in spec.linears]
    for override in found:
        if not any(override.matches(key) for key in keys):
            raise UsageError(f"--set {override.text}: matches none of {len(keys)} linears", f"they look like {keys[0]}")
    return found


def counting(overrides: Sequence[Override], linear: LinearSpec) -> Override | None:
    """The override that counts for a linear, if any."""
    return next((o for o in reversed(overrides) if o.matches(linear.key)), None)


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
    return min(fitting, key=lambda q: q.total_bits(linear.in_features, pad32(linear.out_features), linear.has_bias))
