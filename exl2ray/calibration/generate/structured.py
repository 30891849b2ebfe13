"""Generated structured data: random record types, printed in one of several notations."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

from exl2ray.calibration.generate import words

Record = dict[str, Any]
Field = Callable[[random.Random], Any]

FIELD_TYPES: tuple[Field, ...] = (
    lambda r: r.randint(1, 99999),
    lambda r: round(r.uniform(-90, 900), r.randint(1, 4)),
    lambda r: r.random() < 0.5,
    words.person,
    words.place,
    words.iso_time,
    lambda r: f"{r.choice(words.ADJECTIVES)} {r.choice(words.NOUNS)}",
    lambda r: f"{r.getrandbits(32):08x}",
    lambda r: r.choice(words.SUBJECTS),
    lambda r: [r.randint(0, 99) for _ in range(r.randint(1, 4))],
    lambda r: None if r.random() < 0.3 else words.clock(r),
)


def table(rng: random.Random, rows: int, flat: bool = False) -> list[Record]:
    """``rows`` records with the same random fields; ``flat`` ones hold no lists."""
    names = rng.sample(words.NOUNS, rng.randint(3, 7))
    types = [t for t in FIELD_TYPES if not flat or t is not FIELD_TYPES[9]]
    fields = [(f"{rng.choice(words.ADJECTIVES)}_{n}" if rng.random() < 0.4 else n, rng.choice(types)) for n in names]
    return [{name: make(rng) for name, make in fields} for _ in range(rows)]


def tree(rng: random.Random, depth: int = 3) -> Record:
    """A nested object with random keys."""
    node: Record = {}
    for key in rng.sample(words.NOUNS, rng.randint(2, 4)):
        nested = depth > 1 and rng.random() < 0.45
        node[key] = tree(rng, depth - 1) if nested else rng.choice(FIELD_TYPES)(rng)
    return node


def as_json(rng: random.Random) -> str:
    data: Any = tree(rng) if rng.random() < 0.5 else table(rng, rng.randint(3, 7))
    return json.dumps(data, indent=rng.choice((None, 2, 4)), sort_keys=rng.random() < 0.3) + "\n"


def as_csv(rng: random.Random) -> str:
    records = table(rng, rng.randint(6, 14), flat=True)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=rng.choice(",;\t"), lineterminator="\n")
    writer.writerow(records[0])
    writer.writerows(r.values() for r in records)
    return out.getvalue()


def as_markdown(rng: random.Random) -> str:
    records = table(rng, rng.randint(4, 9), flat=True)
    lines = [list(records[0]), ["---"] * len(records[0]), *([str(v) for v in r.values()] for r in records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def as_sql(rng: random.Random) -> str:
    records = table(rng, rng.randint(4, 8), flat=True)
    name = f"{rng.choice(words.SUBJECTS)}_{rng.choice(words.NOUNS)}"
    columns = ", ".join(records[0])
    values = ",\n  ".join(f"({', '.join(_sql(v) for v in r.values())})" for r in records)
    first, *_, last = records[0]
    where = f"{first} {rng.choice(('>', '<=', '<>', '='))} {_sql(records[1][first])}"
    query = f"SELECT {last}, COUNT(*) FROM {name} WHERE {where} GROUP BY {last} LIMIT {rng.randint(2, 90)};"
    return f"INSERT INTO {name} ({columns}) VALUES\n  {values};\n{query}\n"


def as_xml(rng: random.Random) -> str:
    root = rng.choice(words.SUBJECTS)
    return f"<{root}>\n{_xml(tree(rng, 4), 1)}</{root}>\n"


def as_yaml(rng: random.Random) -> str:
    return _yaml(tree(rng, 4), 0)


def as_log(rng: random.Random) -> str:
    """Lines of a service's log; time only moves forward."""
    service, second = rng.choice(words.NOUNS), rng.randint(0, 80000)
    lines = []
    for _ in range(rng.randint(8, 16)):
        second = min(second + rng.randint(0, 400), 86399)
        stamp = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}.{rng.randint(0, 999):03d}"
        level = rng.choice(("INFO", "INFO", "DEBUG", "WARN", "ERROR"))
        detail = " ".join(
            f"{rng.choice(words.NOUNS)}={rng.choice(FIELD_TYPES)(rng)}" for _ in range(rng.randint(1, 3))
        )
        lines.append(f"{stamp} {level} [{service}-{rng.randint(1, 40)}] {rng.choice(words.VERBS)} {detail}")
    return "\n".join(lines) + "\n"


def as_ini(rng: random.Random) -> str:
    parts = []
    for section in rng.sample(words.SUBJECTS, rng.randint(2, 4)):
        lines = [f"{k} = {v}" for k, v in table(rng, 1)[0].items()]
        parts.append(f"[{section}]\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_diff(rng: random.Random) -> str:
    """A unified diff of a settings file in which some values changed."""
    old, new = table(rng, 2)
    path = f"{rng.choice(words.SUBJECTS)}/{rng.choice(words.NOUNS)}.toml"
    removed = [f"-{k} = {json.dumps(v)}" for k, v in old.items()]
    added = [f"+{k} = {json.dumps(v)}" for k, v in new.items()]
    start = rng.randint(1, 300)
    kept = [f" # {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}, see {words.person(rng)}"]
    head = f"--- a/{path}\n+++ b/{path}\n@@ -{start},{len(old) + 1} +{start},{len(new) + 1} @@"
    return "\n".join([head, *kept, *removed, *added]) + "\n"


NOTATIONS = (as_json, as_csv, as_markdown, as_sql, as_xml, as_yaml, as_log, as_ini, as_diff)


def data_file(rng: random.Random) -> str:
    return rng.choice(NOTATIONS)(rng)


def _sql(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(value).upper()
    return str(value) if isinstance(value, (int, float)) else f"'{value}'"


def _xml(node: Record, depth: int) -> str:
    pad, out = "  " * depth, ""
    for key, value in node.items():
        if isinstance(value, dict):
            out += f"{pad}<{key}>\n{_xml(value, depth + 1)}{pad}</{key}>\n"
        elif value is None:
            out += f"{pad}<{key}/>\n"
        else:
            out += f"{pad}<{key}>{escape(str(value))}</{key}>\n"
    return out


def _yaml(node: Record, depth: int) -> str:
    pad, out = "  " * depth, ""
    for key, value in node.items():
        shown = f"\n{_yaml(value, depth + 1)}" if isinstance(value, dict) else f" {json.dumps(value)}\n"
        out += f"{pad}{key}:{shown}"
    return out
