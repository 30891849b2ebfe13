"""In the child: what the columns of Parquet and Arrow files hold, and their cells as Python has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from exl2ray.calibration.data.columns import CONTENT_KEYS, ROLE_KEYS, Choice, Kind
from exl2ray.calibration.data.problem import DataError

KINDS: tuple[Kind, ...] = ("text", "messages", "binary", "lists", "number", "other", "null")
MAX_NESTING = 32  # of a column's type
BROKEN = (OSError, pa.ArrowException, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)


class Columns:
    """``kinds``: of the columns, less a stored index of pandas; of columns of one name, that which is nearest to text.
    ``twice``: names of several columns, and whether all of them are of that kind.
    """

    def __init__(self, schema: pa.Schema) -> None:
        index = pandas_index(schema)
        found: dict[str, list[Kind]] = {}
        for f in schema:
            if f.name not in index:
                found.setdefault(f.name, []).append(kind_of(f.type))
        self.kinds: Mapping[str, Kind] = {name: min(kinds, key=KINDS.index) for name, kinds in found.items()}
        self.twice = {n: set(kinds) <= {self.kinds[n], "null"} for n, kinds in found.items() if len(kinds) > 1}

    def check(self, choice: Choice) -> None:
        """Raises DataError for columns of one name, unless they are all of text that is joined, as it stands."""
        for name in choice.columns:
            if name in self.twice and not (self.twice[name] and choice.form == "text"):
                raise DataError(f"several columns are called {name!r}", "rename all but one, or name another: -c FILE:COLUMN")


def kind_of(kind: pa.DataType, depth: int = 0) -> Kind:
    """What a column of this type holds."""
    types = pa.types
    if depth > MAX_NESTING:
        return "other"
    if isinstance(kind, pa.BaseExtensionType):
        return kind_of(kind.storage_type, depth + 1)
    if types.is_dictionary(kind):
        return kind_of(kind.value_type, depth + 1)
    if types.is_null(kind):
        return "null"
    if _is_text(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    if _is_list(kind):
        inner = kind_of(kind.value_type, depth + 1)
        if types.is_struct(kind.value_type) and _says(kind.value_type):
            return "messages"
        return "lists" if inner in ("text", "lists") else "other"
    if types.is_struct(kind):
        return "messages" if _says(kind) and all(_is_list(f.type) for f in kind if f.name in ROLE_KEYS) else "other"
    if types.is_nested(kind) or types.is_fixed_size_binary(kind) or "view" in str(kind):
        return "other"
    return "number"


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind)) or str(kind) == "string_view"


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _says(kind: pa.DataType) -> bool:
    names = {field.name for field in kind}
    return bool(names & set(ROLE_KEYS)) and bool(names & set(CONTENT_KEYS))


def cell(scalar: Any) -> Any:
    """Text without a copy: a cell may have hundreds of megabytes."""
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.ExtensionScalar):
        scalar = scalar.value
    as_buffer = getattr(scalar, "as_buffer", None)
    if as_buffer is not None:
        buffer = as_buffer()
        return b"" if buffer is None else memoryview(buffer)
    return scalar.as_py()


def pandas_index(schema: pa.Schema) -> set[str]:
    """Names of columns that pandas stored an index in; none if what it stored beside them makes no sense."""
    try:
        found = schema.pandas_metadata
        names = found.get("index_columns", []) if isinstance(found, dict) else []
        return {n for n in names if isinstance(n, str)} if isinstance(names, list) else set()
    except BROKEN:
        return set()


def short(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


