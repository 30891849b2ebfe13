"""The YAML block at the top of a model card, between two lines ``---``.

A card comes with a model, from anybody. It is composed into nodes and no further: nothing is constructed, no alias is
expanded, and values stay the text that they are written as (``no`` is Norwegian, not false).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TypeAlias

import yaml

Value: TypeAlias = "str | list[str]"

TAG = "tag:yaml.org,2002:"
TEXT_TAGS = {TAG + kind for kind in ("str", "bool", "int", "float", "timestamp")}
MAX_BLOCK = 32_768  # characters; PyYAML is slow, and real blocks have a few hundred
BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def split_card(text: str) -> tuple[str, str]:
    """(YAML text, "" if there is none; the card below it)."""
    found = BLOCK.match(text)
    return (found["yaml"], text[found.end() :]) if found else ("", text)


def read_fields(block: str) -> dict[str, Value]:
    """Top-level fields of a YAML block that are a text or a list of texts. {} for what is no mapping, or not YAML."""
    if len(block) > MAX_BLOCK:
        return {}
    try:
        root = yaml.compose(block, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):  # the last two: escapes beyond Unicode
        return {}
    if not isinstance(root, yaml.MappingNode):
        return {}
    out: dict[str, Value] = {}
    for key, value in root.value:
        if not _is_text(key):
            continue
        if _is_text(value):
            out[key.value] = value.value
        elif isinstance(value, yaml.SequenceNode) and value.tag == f"{TAG}seq" and value.value:
            if all(_is_text(item) for item in value.value):
                out[key.value] = [item.value for item in value.value]
    return out


def _is_text(node: yaml.Node) -> bool:
    """Whether a node is written as a text that is not empty; what looks like a number or a truth value counts."""
    return isinstance(node, yaml.ScalarNode) and node.tag in TEXT_TAGS and bool(node.value)


def write_block(fields: Mapping[str, Value]) -> str:
    """The block with its two lines ``---``; fields in their order, those without a value left out."""
    filled = {name: value for name, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(filled, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def with_fields(card: str, fields: Mapping[str, Value]) -> str:
    """``card`` with these fields replaced or added; the rest of its block stays as it is written."""
    block, body = split_card(card)
    new = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{new}{_without(block, fields)}---\n{body}"


def _without(block: str, names: Container[str]) -> str:
    """``block`` without the fields ``names``: a field is its line and the indented or listed lines below."""
    kept, dropping = [], False
    for line in block.splitlines(keepends=True):
        if line.strip() and line[0] not in " \t-":
            dropping = line.partition(":")[0].strip(" \t'\"") in names
        if not dropping:
            kept.append(line)
    return "".join(kept)
