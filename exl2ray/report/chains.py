"""The quantised modules of every bitrate, from the records of a work directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from exl2ray.errors import StoreError
from exl2ray.formats.json_file import as_number
from exl2ray.report.values import layer_of, mapping, module_order, texts, token_counts
from exl2ray.store.file_names import NOT_MODULES, OUTPUT, PERPLEXITY, quant_kind
from exl2ray.store.fs import Store
from exl2ray.store.records import FileRef, Record, Records

_WIDEST_BITS = 16.0


@dataclass(frozen=True)
class ModuleResult:
    """One module at one bitrate. error: relative Frobenius error of its output in the chain, of the calibration rows that
    `exl2ray.quant.module.QuantizedModule` says; None for the head."""

    key: str
    layer: int | None
    error: float | None
    options: Mapping[str, str]  # linear key -> description of the option
    experts: tuple[int, ...]  # calibration tokens per expert
    notes: tuple[str, ...]
    files: tuple[FileRef, ...]


@dataclass(frozen=True)
class Chain:
    """One bitrate. Perplexities are of calibration rows; None where not known (yet) or not finite."""

    bits: float
    modules: tuple[ModuleResult, ...]
    perplexity: float | None
    reference_perplexity: float | None
    superseded: int  # older records of the same modules, left out
    file_bytes: int = 0  # of the written model, 0 if none is

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised tensors so far."""
        return sum(int(as_number(f.size) or 0) for m in self.modules for f in m.files)

    @property
    def options(self) -> dict[str, str]:
        return {linear: text for m in self.modules for linear, text in m.options.items()}


def read_records(store: Store, kind: str, problems: list[str]) -> list[Record]:
    """Usable records of a kind; a damaged one becomes a problem and does not hide the others."""
    records = Records(store)
    try:
        found = list(records.scan(kind).values())
    except StoreError:
        found = []
        for name in store.list(f"{kind}/records"):
            try:
                found += records.scan(kind, name.rpartition("/")[2]).values()
            except StoreError as e:
                problems.append(e.message)
    problems += records.notes
    return [r for r in found if isinstance(r.key, str) and isinstance(r.payload, dict)]


def recorded_bitrates(store: Store) -> list[float]:
    """Bitrates of which the directory holds records, lowest first."""
    found = set()
    for name in store.list("quant"):
        kind = name.partition("/records/")[0]
        try:
            bits = float(kind.partition("/")[2])
        except ValueError:
            continue  # "quant/reference": checkpoints
        if 0 < bits <= _WIDEST_BITS and quant_kind(bits) == kind:
            found.add(bits)
    return sorted(found)


def read_chain(store: Store, bits: float, problems: list[str], written: Collection[str] = (), file_bytes: int = 0) -> Chain:
    """The quantised modules of one bitrate. Of several records of a module, from other settings or a patch, that of the model
    that was written last (``written``: what hashes of its modules begin with; ``file_bytes``: its size), else the newest.
    """
    best: dict[str, Record] = {}
    separate: list[Record] = []
    superseded, known = 0, file_bytes
    records = read_records(store, quant_kind(bits), problems)
    for record in sorted(records, key=lambda r: (r.inputs_hash[:16] in written, created(r))):
        if record.key == PERPLEXITY:
            separate.append(record)
        elif record.key == OUTPUT:
            shards = record.payload.get("shards")
            sizes = [as_number(mapping(s).get("size")) for s in shards] if isinstance(shards, list) else []
            file_bytes = known or int(sum(size or 0 for size in sizes))
        elif not NOT_MODULES.fullmatch(record.key):
            superseded += record.key in best
            best[record.key] = record
    modules = tuple(_result(best[key]) for key in sorted(best, key=module_order))
    payloads = [r.payload for r in [*best.values(), *separate]]
    after, before = _last(payloads, "perplexity"), _last(payloads, "reference_perplexity")
    return Chain(bits, modules, after, before, superseded, file_bytes)


def created(record: Record) -> float:
    """When the record was written, in seconds since 1970; 0 if it does not say."""
    return as_number(record.created) or 0.0


def _last(payloads: Sequence[Mapping[str, object]], name: str) -> float | None:
    found = [value for p in payloads if (value := as_number(p.get(name))) is not None]
    return found[-1] if found else None


def _result(record: Record) -> ModuleResult:
    payload = record.payload
    experts, notes = token_counts(payload.get("experts")), texts(payload.get("notes"))
    return ModuleResult(
        key=record.key,
        layer=layer_of(record.key),
        error=as_number(payload.get("error")),
        options={k: v for k, v in mapping(payload.get("options")).items() if isinstance(v, str)},
        experts=experts,
        notes=notes[1:] if experts else notes,  # the first one is the coverage in words
        files=record.files,
    )
