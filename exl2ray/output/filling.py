"""Filling the shards of a job while its modules are being quantised; why so: `exl2ray.store.assembly`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from exl2ray.allocation.planning import Plan
from exl2ray.beneath import existing_parent
from exl2ray.errors import StoreError
from exl2ray.formats.files import write_error
from exl2ray.formats.shards import Shard, check_names, check_place, remove_stale
from exl2ray.output.contents import Contents, packed_names
from exl2ray.store.assembly import Assembly, linkable
from exl2ray.store.copies import Copies
from exl2ray.store.file_names import quant_kind
from exl2ray.store.records import FileRef, Record, hash_inputs
from exl2ray.store.tensors import get_tensors
from exl2ray.store.workdir import WorkDir

FILLED = 1  # how shards are filled; another number when what is in a work directory could not be gone on with


@dataclass
class _Shards:
    """Of one bitrate, open. placed: files of the modules that are in them, as their records have them, by index. others: the
    tensors that no record has.
    """

    assembly: Assembly
    placed: dict[int, tuple[FileRef, ...]] = field(default_factory=dict)
    others: FileRef | None = None


@dataclass
class Filling:
    """The shards of all bitrates of a job. fingerprint: of the source. Modules may be placed by several threads."""

    contents: Contents
    work: WorkDir
    fingerprint: str
    shard_bytes: int
    _known: dict[float, Assembly] = field(default_factory=dict)
    _open: dict[float, _Shards] = field(default_factory=dict)

    def assembly(self, plan: Plan, target: Path) -> Assembly:
        """Shards of a bitrate, for an output. Raises FormatError for two tensors of one name."""
        if plan.bits not in self._known:
            spec, kind, store = self.contents.spec, quant_kind(plan.bits), self.work.store
            inputs = hash_inputs(filled=FILLED, source=self.fingerprint, modules=list(plan.hashes), **spec.rotation_entry)
            entries = self.contents.entries(plan)
            check_names(target, entries)
            made = Assembly(store, kind, inputs, entries, self.shard_bytes)
            made.like = linkable(store, kind, existing_parent(target))
            if made.like is None and store.is_local:
                made = Copies(store, kind, inputs, entries, self.shard_bytes, target)
            self._known[plan.bits] = made
        return self._known[plan.bits]

    @property
    def possible(self) -> bool:
        """Whether shards can be filled in the background: not from an object store, which would be read as it is written."""
        return self.work.store.is_local

    def begin(self, plan: Plan, target: Path) -> None:
        """Makes the shards of a bitrate, to be filled, or goes on with those of an earlier run. Raises StoreError for a disk
        that has no room for them.
        """
        if plan.bits not in self._open and self.possible:
            self.assembly(plan, target).open()
            self._open[plan.bits] = _Shards(self.assembly(plan, target))

    def place(self, plan: Plan, index: int) -> None:
        """Puts a quantised module into the shards, if they are open. Where these are of the work directory its own files are
        deleted when that is durable.

        Raises StoreError for files that are not what their record says, or whose record is another module's.
        """
        shards, store = self._open.get(plan.bits), self.work.store
        if shards is None:
            return
        module = self.contents.spec.modules[index]
        names, kind = packed_names(plan, module), quant_kind(plan.bits)
        record = self.work.records.required(kind, module.profile_key, plan.hashes[index])
        if shards.placed.get(index) == record.files:
            return
        if not shards.assembly.holds(record.files, names):
            found = [(f, get_tensors(store, f.rel, expect=f)) for f in record.files]
            whole = {name: t for _, tensors in found for name, t in tensors.items()}
            for linear in module.linears:
                self.contents.check(plan, linear, record, whole)
            files = tuple(shards.assembly.put_file(f, tensors) for f, tensors in found)
            shards.assembly.sync()
            if shards.assembly.keeps:
                record = replace(record, files=files)
                self.work.records.commit(record)
        for file in record.files if shards.assembly.keeps else ():
            store.delete(file.rel)
        shards.placed[index] = record.files

    def place_others(self, plan: Plan) -> None:
        """Puts what is not quantised into the shards, if they are open."""
        shards = self._open.get(plan.bits)
        if shards is not None:
            self._placed_others(shards)

    def _placed_others(self, shards: _Shards) -> FileRef:
        if shards.others is None:
            shards.others = shards.assembly.put_others(self.contents.others())
        return shards.others

    def link(
        self, plan: Plan, records: Mapping[int, Record], target: Path, ours: Collection[str], others: str | None,
        begin: Callable[[], None],
    ) -> tuple[list[Shard], str]:  # fmt: skip
        """Puts into the shards what they lack and makes them files of ``target``; with them, the hash of what no record has.

        others: this hash, if the shards were finished by an earlier run. ours, begin: as `write_shards` has them.
        """
        assembly = self.assembly(plan, target)
        if plan.bits in self._open or others is None or not self._is_whole(plan, records, target, others):
            others = self._fill(plan, records, target)
        check_place(target, {*assembly.names, *ours}, assembly.temporary)
        begin()
        try:
            made = assembly.link(target)
        except OSError as e:
            raise write_error(target, e) from e
        remove_stale(target, {*ours} - {*assembly.names})
        return made, others

    def _is_whole(self, plan: Plan, records: Mapping[int, Record], target: Path, others: str) -> bool:
        """Whether nothing has to be put into the shards. Records have been checked, when the run began."""
        refs, files = self._refs(plan, records, target, others), [f for r in records.values() for f in r.files]
        return refs[:-1] == files and self.assembly(plan, target).same(None, refs, refs[-1:])

    def _fill(self, plan: Plan, records: Mapping[int, Record], target: Path) -> str:
        self.begin(plan, target)
        shards = self._open[plan.bits]
        for index, record in records.items():
            if shards.placed.get(index) != record.files:
                self.place(plan, index)
        return self._placed_others(shards).sha256

    def same(self, plan: Plan, records: Mapping[int, Record], target: Path, others: str) -> bool:
        """Whether the shards of ``target``, which were filled here, have the content that they had then. Hashes them."""
        try:
            return self.assembly(plan, target).same(target, self._refs(plan, records, target, others))
        except StoreError:
            return False

    def _refs(self, plan: Plan, records: Mapping[int, Record], target: Path, others: str) -> list[FileRef]:
        """Where everything is in whole shards: the files of all records, then what no record has."""
        assembly, out = self.assembly(plan, target), []
        for file in (f for r in records.values() for f in r.files):
            names = [p.name for p in file.pieces] or get_tensors(self.work.store, file.rel, expect=file, deep=False)
            out.append(assembly.placed(file, names))
        return [*out, assembly.others(self.contents.others(), others)]

    def finish(self, plan: Plan) -> None:
        """When a bitrate is written: deletes shards of other plans that no record needs any more."""
        shards = self._open.pop(plan.bits, None)
        if shards is not None:
            shards.assembly.close()
            with suppress(StoreError):  # the model is finished; a record that is damaged keeps what it may need
                shards.assembly.remove_others(self.work.records)

    def close(self) -> None:
        """Lets go of shards that are not finished."""
        while self._open:
            self._open.popitem()[1].assembly.close()
