"""What the shards of a bitrate hold: every tensor in order, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from exl2ray.allocation.planning import Plan
from exl2ray.errors import FormatError, StoreError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.shards import TensorEntry
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.model.weights import OutputEntry, linear_entries, output_tensors, plain_shape, read_plain
from exl2ray.store.fs import Store
from exl2ray.store.records import Record
from exl2ray.store.tensors import get_tensors


@dataclass(frozen=True)
class Contents:
    """Tensors of quantised modules come from their records in ``store``, all others from the source."""

    spec: ModelSpec
    source: SourceModel
    store: Store

    def entries(self, plan: Plan, records: Mapping[int, Record] | None = None) -> list[TensorEntry]:
        """Every tensor of the output in order, read when its turn comes. records: of all modules, which are compared with the
        plan; None: quantised linears are only announced.
        """
        out = list[TensorEntry]()
        shapes, tensors = (_Tensors(self.store, records or {}, check) for check in (False, True))
        for entry in output_tensors(self.spec):
            if entry.linear is not None and entry.module is not None:
                own, index = packed_entries(plan, entry.linear), entry.module.index
                if records is not None:
                    self.check(plan, entry.linear, records[index], shapes(index))
                    own = [replace(e, load=partial(tensors.one, index, e.name)) for e in own]
                out += own
            else:
                out += self._other(entry)
        return out

    def others(self) -> list[TensorEntry]:
        """Those that no record has."""
        return [e for entry in output_tensors(self.spec) for e in self._other(entry)]

    def _other(self, entry: OutputEntry) -> list[TensorEntry]:
        if entry.plain is not None:
            read = partial(read_plain, self.spec, entry.plain, self.source)
            return [TensorEntry(entry.name, "F16", plain_shape(entry.plain, self.source), read)]
        if entry.copied is not None:
            name, source = entry.copied.source_name, self.source
            return [TensorEntry(entry.name, source.dtype(name), source.shape(name), partial(source.load, name))]
        return []

    def check(self, plan: Plan, linear: LinearSpec, record: Record, tensors: Mapping[str, Tensor]) -> None:
        """Raises StoreError if what a record leads to is another module's or bitrate's. tensors: of its files."""
        expected = plan.params[linear.key].bits_of(linear) // 8
        try:
            packed = PackedLinear.from_tensors(linear.key, tensors.get).tensors()
            problem = f"takes {n} bytes" if (n := sum(t.nbytes for t in packed.values())) != expected else ""
        except FormatError as e:
            problem = e.message
        if problem:
            files = ", ".join(self.store.full_name(f.rel) for f in record.files) or "no file"
            raise StoreError(
                f"the record of {record.key} leads to {files}: {linear.key} {problem}; at {plan.bits:g} bpw: {expected}",
                f"delete {record.kind}/records/{record.key}*: the same command computes it again",
            )


def packed_entries(plan: Plan, linear: LinearSpec) -> list[TensorEntry]:
    """The tensors of a quantised linear, announced."""
    layout = plan.params[linear.key].layout(linear.in_features)
    return linear_entries(linear, layout.packed_rows, len(layout.bits))


def packed_names(plan: Plan, module: ModuleSpec) -> list[str]:
    """Names of the tensors of a module's quantised linears."""
    return [e.name for x in module.linears for e in packed_entries(plan, x)]


class _Tensors:
    """The tensors of one module at a time, mapped from its files; ``check``: hashed when a module is opened."""

    def __init__(self, store: Store, records: Mapping[int, Record], check: bool) -> None:
        self._store, self._records, self._check = store, records, check
        self._index, self._loaded = -1, dict[str, Tensor]()

    def __call__(self, index: int) -> dict[str, Tensor]:
        if index != self._index:
            self._loaded = {}
            for file in self._records[index].files:
                expect = file if self._check or file.pieces else None
                self._loaded.update(get_tensors(self._store, file.rel, expect=expect, deep=self._check))
            self._index = index
        return self._loaded

    def one(self, index: int, name: str) -> Tensor:
        """One tensor of the module with this index."""
        return self(index)[name]
