"""In the child: data rows of a Parquet file, a few at a time, since a few kilobytes of it can hold gigabytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from exl2ray.calibration.data.columns import CONTENT_KEYS, ROLE_KEYS, Choice, Kind
from exl2ray.calibration.data.plain import MIB
from exl2ray.calibration.data.problem import DataError

BATCH_ROWS, BATCH_BYTES = 64, 4 * MIB  # of a read, by what the file says; a row may be a whole book
THRIFT_STRING_BYTES, THRIFT_ITEMS = 64 * MIB, 1_000_000  # of the file's own description
KINDS: tuple[Kind, ...] = ("text", "messages", "binary", "lists", "number", "other", "null")
MAX_NESTING = 32  # of a column's type
BROKEN = (OSError, pa.ArrowException, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)


class ParquetTable:
    """``kinds``: of the columns, less a stored index of pandas; of columns of one name, that which is nearest to text.
    ``twice``: names of several columns, and whether all of them are of that kind. Raises DataError.
    """

    def __init__(self, file: BinaryIO) -> None:
        pa.set_cpu_count(1)
        try:
            self._file = pq.ParquetFile(
                pa.PythonFile(file, "r"), pre_buffer=False, buffer_size=MIB, memory_map=False,
                thrift_string_size_limit=THRIFT_STRING_BYTES, thrift_container_size_limit=THRIFT_ITEMS,
            )  # fmt: skip
            schema = self._file.schema_arrow
            index = _pandas_index(schema)
            found: dict[str, list[Kind]] = {}
            for f in schema:
                if f.name not in index:
                    found.setdefault(f.name, []).append(kind_of(f.type))
            self.kinds: Mapping[str, Kind] = {name: min(kinds, key=KINDS.index) for name, kinds in found.items()}
            self.twice = {n: set(kinds) <= {self.kinds[n], "null"} for n, kinds in found.items() if len(kinds) > 1}
        except BROKEN as e:
            raise DataError(f"not a readable Parquet file: {_short(e)}", "is the download complete?") from e

    def rows(self, choice: Choice) -> Iterator[tuple[str, list[Any]]]:
        """(where, cells) of every data row; cells of text are bytes or memoryview, others as Python has them; None: null."""
        number = 0
        try:
            leaves = self._leaves(choice.columns)
            groups = self._file.num_row_groups
        except BROKEN as e:
            raise DataError(f"reading failed: {_short(e)}", "is the download complete?") from e
        for group in range(groups):
            size, done = self._batch_rows(group, leaves), 0
            while True:
                try:
                    for cells in self._group(group, choice, size, done):
                        done += 1
                        number += 1
                        yield f"data row {number - 1}", cells
                    break
                except MemoryError:
                    if size == 1:
                        raise
                    size = 1  # once more from where it was
                except BROKEN as e:
                    raise DataError(f"reading failed at data row {number}: {_short(e)}", "fetch the file again") from e

    def check(self, choice: Choice) -> None:
        """Raises DataError for columns of one name, unless they are all of text that is joined, as it stands."""
        for name in choice.columns:
            if name in self.twice and not (self.twice[name] and choice.form == "text"):
                raise DataError(f"several columns are called {name!r}", "rename all but one, or name another: -c FILE:COLUMN")

    def _group(self, group: int, choice: Choice, size: int, skip: int) -> Iterator[list[Any]]:
        names = list(choice.columns)
        seen = 0
        batches = self._file.iter_batches(batch_size=size, row_groups=[group], columns=names, use_threads=False)
        for batch in batches:
            columns = [batch.column(i) for i in range(batch.num_columns)]
            for i in range(batch.num_rows):
                seen += 1
                if seen > skip:
                    yield [_cell(column[i]) for column in columns]

    def _leaves(self, names: tuple[str, ...]) -> list[int]:
        schema = self._file.metadata.schema
        paths = [schema.column(i).path for i in range(self._file.metadata.num_columns)]
        return [i for i, path in enumerate(paths) if any(path == n or path.startswith(n + ".") for n in names)]

    def _batch_rows(self, group: int, leaves: list[int]) -> int:
        """Rows that a read may take at once, by what the file says: it may not be true."""
        try:
            found = self._file.metadata.row_group(group)
            declared: int = sum(max(0, found.column(i).total_uncompressed_size) for i in leaves)
            rows: int = max(1, found.num_rows)
        except BROKEN as e:
            raise DataError(f"row group {group} cannot be read: {_short(e)}", "fetch the file again") from e
        return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, declared)))


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


def _cell(scalar: Any) -> Any:
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


def _pandas_index(schema: pa.Schema) -> set[str]:
    """Names of columns that pandas stored an index in; none if what it stored beside them makes no sense."""
    try:
        found = schema.pandas_metadata
        names = found.get("index_columns", []) if isinstance(found, dict) else []
        return {n for n in names if isinstance(n, str)} if isinstance(names, list) else set()
    except BROKEN:
        return set()


def _short(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


