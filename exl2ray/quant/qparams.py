"""The option tables: which mixtures of bit widths are measured for each kind of projection.

A table row names one option per projection. Text form: ``share:widthb_groupsizeg`` joined by ``/``, as in
``0.05:3b_64g/0.95:2b_64g``: the most active 5 % of the rows in 3 bits, the rest in 2, both in groups of 64 rows.
The tables are those of ExLlamaV2 0.3.2, so that measurement files are interchangeable.
Rows repeat options; `unique` reduces a column to what has to be computed.

Bitrates that no row reaches have `low_options`: pure 2 bits, in groups of up to 512 rows. Groups may be larger (the loader
keeps their rows in 16 bits), but at 512 scales take 0.008 bits per weight, and larger ones would not fit the solver's panels.
They are for these bitrates alone and never measured, so all other bitrates and measurement files stay as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

from exl2ray.errors import UsageError
from exl2ray.formats import roles
from exl2ray.formats.layout import QParams

# q | k | v | o
_ATTENTION = """
0.05:3b_64g/0.95:2b_64g | 0.05:3b_64g/0.95:2b_64g | 0.05:3b_64g/0.95:2b_64g | 0.05:3b_64g/0.95:2b_64g
0.1:3b_64g/0.9:2b_64g | 0.1:3b_64g/0.9:2b_64g | 0.25:3b_64g/0.75:2b_64g | 0.1:3b_64g/0.9:2b_64g
0.1:3b_64g/0.9:2b_64g | 0.1:3b_64g/0.9:2b_64g | 0.1:4b_128g/0.9:3b_128g | 0.1:3b_64g/0.9:2b_64g
0.1:3b_64g/0.9:2b_64g | 0.1:3b_64g/0.9:2b_64g | 0.1:4b_128g/0.9:3b_128g | 0.1:4b_128g/0.9:3b_128g
0.1:4b_128g/0.9:3b_128g | 0.1:4b_128g/0.9:3b_128g | 0.1:4b_128g/0.9:3b_128g | 0.1:4b_128g/0.9:3b_128g
0.1:4b_128g/0.9:3b_128g | 0.1:4b_128g/0.9:3b_128g | 0.1:4b_64g/0.9:3b_64g | 0.1:4b_128g/0.9:3b_128g
1:4b_128g | 1:4b_128g | 1:4b_128g | 1:4b_128g
1:4b_128g | 1:4b_128g | 1:4b_64g | 1:4b_128g
1:4b_64g | 1:4b_64g | 1:4b_32g | 1:4b_64g
1:4b_32g | 1:4b_32g | 1:4b_32g | 1:4b_32g
0.1:5b_128g/0.9:4b_128g | 0.1:5b_128g/0.9:4b_128g | 0.1:5b_64g/0.9:4b_64g | 0.1:5b_128g/0.9:4b_128g
0.1:5b_64g/0.9:4b_64g | 0.1:5b_64g/0.9:4b_64g | 0.1:5b_32g/0.9:4b_32g | 0.1:5b_64g/0.9:4b_64g
0.1:5b_64g/0.9:4b_64g | 0.1:5b_64g/0.9:4b_64g | 1:5b_64g | 0.1:5b_64g/0.9:4b_64g
0.1:5b_32g/0.9:4b_32g | 0.1:5b_32g/0.9:4b_32g | 1:5b_32g | 0.1:5b_32g/0.9:4b_32g
0.1:6b_128g/0.9:5b_128g | 0.1:6b_128g/0.9:5b_128g | 1:6b_128g | 0.1:6b_128g/0.9:5b_128g
0.1:6b_32g/0.9:5b_32g | 0.1:6b_32g/0.9:5b_32g | 1:6b_32g | 0.1:6b_32g/0.9:5b_32g
1:6b_128g | 1:6b_128g | 1:6b_128g | 1:6b_128g
1:6b_32g | 1:6b_32g | 1:8b_32g | 1:6b_32g
1:8b_128g | 1:8b_128g | 1:8b_128g | 1:8b_128g
"""

# gate | up | down
_MLP = """
0.05:3b_64g/0.95:2b_64g | 0.05:3b_64g/0.95:2b_64g | 0.05:6b_32g/0.2:3b_64g/0.75:2b_64g
0.1:3b_64g/0.9:2b_64g | 0.25:3b_64g/0.75:2b_64g | 0.05:6b_32g/0.2:3b_64g/0.75:2b_64g
0.1:3b_64g/0.9:2b_64g | 0.3:3b_64g/0.7:2b_64g | 0.05:5b_32g/0.95:3b_32g
0.1:3b_64g/0.9:2b_64g | 0.3:3b_64g/0.7:2b_64g | 0.05:5b_32g/0.95:4b_32g
0.1:4b_128g/0.9:3b_128g | 0.25:4b_128g/0.75:3b_128g | 0.05:8b_32g/0.1:4b_128g/0.85:3b_128g
0.1:4b_32g/0.9:3b_32g | 0.25:4b_32g/0.75:3b_32g | 0.05:8b_32g/0.1:4b_32g/0.85:3b_32g
0.1:4b_32g/0.9:3b_32g | 0.25:4b_32g/0.75:3b_32g | 0.05:8b_32g/0.95:4b_128g
1:4b_128g | 1:4b_32g | 0.05:8b_32g/0.95:4b_128g
1:4b_32g | 1:4b_32g | 0.05:8b_32g/0.95:4b_32g
0.1:5b_128g/0.9:4b_128g | 0.25:5b_128g/0.75:4b_128g | 0.05:8b_32g/0.1:5b_128g/0.85:4b_128g
0.1:5b_32g/0.9:4b_32g | 0.25:5b_32g/0.75:4b_32g | 0.05:8b_32g/0.1:5b_32g/0.85:4b_32g
0.1:6b_128g/0.9:5b_128g | 0.25:6b_128g/0.75:5b_128g | 0.05:8b_32g/0.1:6b_128g/0.85:5b_128g
0.1:6b_32g/0.9:5b_32g | 0.25:6b_32g/0.75:5b_32g | 0.05:8b_32g/0.1:6b_32g/0.85:5b_32g
1:6b_128g | 1:6b_128g | 0.05:8b_32g/0.95:6b_128g
0.1:8b_128g/0.9:6b_128g | 0.1:8b_128g/0.9:6b_128g | 0.15:8b_128g/0.85:6b_128g
0.1:8b_128g/0.9:6b_128g | 0.1:8b_128g/0.9:6b_128g | 1:8b_128g
1:8b_128g | 1:8b_128g | 1:8b_128g
"""

LOW_GROUPS = (64, 128, 256, 512)

_HEAD = {
    2: "0.3:4b_32g/0.7:2b_32g",
    3: "0.15:4b_32g/0.85:3b_32g",
    4: "0.15:6b_32g/0.85:4b_32g",
    5: "0.15:6b_128g/0.85:5b_128g",
    6: "0.15:8b_128g/0.85:6b_128g",
    8: "1:8b_128g",
}


def parse(text: str) -> QParams:
    """``share:widthb_groupsizeg/...`` to QParams; raises UsageError for anything else."""
    bits, props, sizes = [], [], []
    try:
        for part in text.removesuffix(" s4").split("/"):
            share, rest = part.split(":")
            width, size = rest.split("b_")
            props.append(float(share))
            bits.append(int(width))
            sizes.append(int(size.removesuffix("g")))
    except ValueError as e:
        raise UsageError(f"quantisation option {text!r} is not of the form 0.1:4b_128g/0.9:3b_128g") from e
    return QParams(tuple(bits), tuple(props), tuple(sizes))


def _table(text: str) -> tuple[tuple[QParams, ...], ...]:
    return tuple(tuple(parse(cell.strip()) for cell in line.split("|")) for line in text.split("\n") if line)


@cache
def attention_options() -> tuple[tuple[QParams, ...], ...]:
    """19 rows of (q, k, v, o)."""
    return _table(_ATTENTION)


@cache
def mlp_options(gated: bool = True) -> tuple[tuple[QParams, ...], ...]:
    """17 rows of (gate, up, down); without a gate the first column is dropped and 17 rows of (up, down) remain."""
    rows = _table(_MLP)
    return rows if gated else tuple(row[1:] for row in rows)


@dataclass(frozen=True)
class OptionTable:
    """Options of one half of a module: ``rows[i][j]`` is the option of ``roles[j]`` in table row i."""

    roles: tuple[str, ...]
    rows: tuple[tuple[QParams, ...], ...]

    def columns(self) -> dict[str, tuple[list[QParams], list[int]]]:
        """Per role: distinct options, and for each table row the index of its option among them."""
        return {role: unique([row[j] for row in self.rows]) for j, role in enumerate(self.roles)}


@cache
def _tables() -> tuple[OptionTable, ...]:
    mlp = (OptionTable(roles.MLP, mlp_options()), OptionTable(roles.MLP[1:], mlp_options(gated=False)))
    return OptionTable(roles.ATTENTION, attention_options()), *mlp, MOE_TABLE


MOE_TABLE = OptionTable(roles.EXPERT, mlp_options())


def option_tables(of: Collection[str]) -> list[OptionTable]:
    """The tables of a module whose linears have these roles; two for a parallel block, none for the head."""
    ungated = "gate_proj" not in of
    return [t for t in _tables() if set(t.roles) <= set(of) and (ungated or t.roles != roles.MLP[1:])]


@cache
def distinct_options(role: str) -> tuple[QParams, ...]:
    """The options that the tables have for a role; none for the head."""
    return next((tuple(t.columns()[role][0]) for t in _tables() if role in t.roles), ())


@cache
def low_options() -> tuple[QParams, ...]:
    """What a linear may get beside the options of the tables where these take more than the bitrate, largest first."""
    return tuple(parse(f"1:2b_{g}g") for g in LOW_GROUPS)


@cache
def head_option(bits: int) -> QParams:
    """Option of lm_head for ``-hb bits``; raises UsageError for a width without one."""
    if bits not in _HEAD:
        raise UsageError(f"-hb {bits}: the head can have {', '.join(map(str, _HEAD))} bits")
    return parse(_HEAD[bits])


def unique(column: Sequence[QParams]) -> tuple[list[QParams], list[int]]:
    """Distinct options of one table column, and for each table row the index of its option among them."""
    seen: dict[QParams, int] = {}
    index = [seen.setdefault(option, len(seen)) for option in column]
    return list(seen), index
