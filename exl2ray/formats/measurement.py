"""measurement.json: how much each quantisation option of each module costs and how well it does.

The schema is that of ExLlamaV2, so files can be exchanged in both directions:

    { "measurement": { "<module key>.<mode>": [option, ...] | {"attn": [...], "mlp": [...]} | null, ... },
      "last_module_idx": <int>,
      "exl2ray": { "<module key>.<mode>": {...}, ... } }         ours, only when not empty; the reference ignores it

Ours: "notes"; "experts", their share of the tokens; "linears", losses of single linears (`exl2ray.quant.measure`); and after
a measurement for --allocation linear "sensitivity": {"<role>": [KL, squared error] (`exl2ray.quant.sensitivity`)}.
Beside the entries of modules stand "source": hashes of what was measured (`exl2ray.formats.origin`), and of a rotated model
(--rotate) "rotation": what identifies the rotation; and "scores": {"rows": n} if accuracies are of n calibration rows alone.

An option is ``{"accuracy": float, "total_bits": int, "<role>": {quantisation parameters}, ...}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from exl2ray.errors import FormatError
from exl2ray.formats.files import atomic_file
from exl2ray.formats.json_file import parse_json_object, read_bounded
from exl2ray.formats.layout import LinearShape, QParams
from exl2ray.formats.measurement_rules import MAX_OPTIONS, refuse_meaningless

MEASURED_MODES = ("self_attn", "mlp", "block_sparse_moe", "parallel_decoder")
UNMEASURED_MODES = ("norm", "linear", "pos_emb")
ROTATION, SOURCE, SCORES = "rotation", "source", "scores"  # no entries of modules: those have a dot
MAX_MEASUREMENT_BYTES = 32 << 20  # of the largest published models 10


@dataclass(frozen=True)
class OptionProfile:
    """One measured option of a module: the same parameters for all experts, one entry per role."""

    accuracy: float  # 1 - mean relative Frobenius error of the block output, 1e-6 .. 1
    total_bits: int  # storage of all linears of the module, in bits
    params: Mapping[str, QParams]  # role ("q_proj", "w1", ...) -> parameters

    def to_json(self) -> dict[str, Any]:
        roles = {role: p.to_json() for role, p in self.params.items()}
        return {"accuracy": self.accuracy, "total_bits": self.total_bits, **roles}

    def to_tree(self) -> dict[str, Any]:
        """As `to_json`, with the parameters as they are."""
        return {"accuracy": self.accuracy, "total_bits": self.total_bits, **self.params}


@dataclass(frozen=True)
class ModuleProfile:
    """One entry of measurement.json.

    ``options`` holds the measured options in option order; None for modules that are not measured and for
    ``parallel_decoder``, whose halves are in ``attn`` and ``mlp``. ``extra`` is free JSON data that the reference
    ignores.
    """

    key: str  # module key, e.g. model.layers.0
    mode: str  # one of MEASURED_MODES or UNMEASURED_MODES
    options: tuple[OptionProfile, ...] | None = None
    attn: tuple[OptionProfile, ...] | None = None
    mlp: tuple[OptionProfile, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry_key(self) -> str:
        return f"{self.key}.{self.mode}"

    def slots(self) -> list[tuple[OptionProfile, ...]]:
        """The option lists from which one option each is chosen: none, one, or two (attn, mlp)."""
        return [options for options in (self.options, self.attn, self.mlp) if options is not None]

    def to_json(
        self, of: Callable[[OptionProfile], dict[str, Any]] = OptionProfile.to_json
    ) -> list[Any] | dict[str, Any] | None:
        """The entry's value in measurement.json, without ``extra``. of: what stands for an option."""
        if self.attn is not None and self.mlp is not None:
            return {"attn": [of(o) for o in self.attn], "mlp": [of(o) for o in self.mlp]}
        return None if self.options is None else [of(o) for o in self.options]

    @staticmethod
    def from_json(
        entry_key: str, value: Any, extra: Mapping[str, Any] | None = None, where: str = "measurement"
    ) -> ModuleProfile:
        """Parse one entry; raises FormatError naming ``where`` (the file), the entry and the field."""
        key, _, mode = entry_key.rpartition(".")
        place = f"{where}: {entry_key!r}"
        if not key or mode not in MEASURED_MODES + UNMEASURED_MODES:
            raise FormatError(f"{place}: the mode is not one of {', '.join(MEASURED_MODES + UNMEASURED_MODES)}")
        if mode in UNMEASURED_MODES:
            if value is not None:
                raise FormatError(f"{place}: must be null, is a {type(value).__name__}")
            return ModuleProfile(key, mode, extra=dict(extra or {}))
        if mode == "parallel_decoder":
            if not isinstance(value, dict) or set(value) != {"attn", "mlp"}:
                raise FormatError(f"{place}: must be an object with the lists attn and mlp")
            attn, mlp = (_options(value[half], f"{place}.{half}") for half in ("attn", "mlp"))
            return ModuleProfile(key, mode, attn=attn, mlp=mlp, extra=dict(extra or {}))
        return ModuleProfile(key, mode, _options(value, place), extra=dict(extra or {}))


@dataclass(frozen=True)
class Measurement:
    """All entries in file order. ``last_module_idx`` is the index of the last module measured.

    ``rotation`` identifies the rotation of a model that was rotated; None: it was not. ``source`` identifies the model; None:
    not known (other programs and earlier versions do not say). ``scores``: {"rows": how many calibration rows the accuracies
    were measured on}; None: on all of them.
    """

    profiles: tuple[ModuleProfile, ...]
    last_module_idx: int
    rotation: Mapping[str, Any] | None = None
    source: Mapping[str, Any] | None = None
    scores: Mapping[str, Any] | None = None

    def __getitem__(self, entry_key: str) -> ModuleProfile:
        if entry_key not in self._by_key:
            raise FormatError(f"measurement: no entry {entry_key!r}")
        return self._by_key[entry_key]

    @cached_property
    def _by_key(self) -> dict[str, ModuleProfile]:
        return {p.entry_key: p for p in reversed(self.profiles)}

    def to_json(self, of: Callable[[OptionProfile], dict[str, Any]] = OptionProfile.to_json) -> dict[str, Any]:
        out: dict[str, Any] = {
            "measurement": {p.entry_key: p.to_json(of) for p in self.profiles},
            "last_module_idx": self.last_module_idx,
        }
        beside = {ROTATION: self.rotation, SOURCE: self.source, SCORES: self.scores}
        extra = {name: dict(value) for name, value in beside.items() if value is not None}
        extra.update({p.entry_key: dict(p.extra) for p in self.profiles if p.extra})
        return {**out, "exl2ray": extra} if extra else out

    def to_bytes(self) -> bytes:
        """The file's content: 4-space indent, ASCII, the same bytes for the same measurement."""
        try:
            return _indented(self.to_json(OptionProfile.to_tree), "\n").encode("ascii")
        except ValueError as e:
            raise FormatError(f"measurement: a NaN or infinite number cannot be written: {e}") from e


# ``json.dumps(indent=4)`` is written in Python and looks at every number by itself: 0.1 s for 224 linears, while a GPU waits.
# Here C writes what holds no containers, and the parameters of an option, of which there are few, are written once.


def _indented(value: Any, line: str) -> str:
    """``value`` as ``json.dumps(indent=4)`` has it; line: a newline and the indentation of where it stands. Keys are text."""
    if isinstance(value, QParams):
        return _indented_params(value, line)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)
    inner, a_list = f"{line}    ", isinstance(value, (list, tuple))
    if not a_list and not isinstance(value, dict):
        return _encode(line)(value)
    if not value:
        return "[]" if a_list else "{}"
    if _SCALARS.issuperset(map(type, value if a_list else value.values())):
        text = _encode(inner)(value)
        return f"{text[0]}{inner}{text[1:-1]}{line}{text[-1]}"
    if a_list:
        return f"[{inner}{f',{inner}'.join([_indented(v, inner) for v in value])}{line}]"
    members = [f"{_name(k)}: {_indented(v, inner)}" for k, v in value.items()]
    return f"{{{inner}{f',{inner}'.join(members)}{line}}}"


_SCALARS = {float, int, str, bool, type(None)}


@lru_cache(maxsize=4096)
def _indented_params(params: QParams, line: str) -> str:
    return _indented(params.to_json(), line)


@lru_cache(maxsize=4096)
def _name(text: str) -> str:
    return json.dumps(text)


@cache
def _encode(line: str) -> Callable[[Any], str]:
    """JSON with a new line between members."""
    return json.JSONEncoder(allow_nan=False, separators=(f",{line}", ": ")).encode


def read_measurement(path: str | Path) -> Measurement:
    """Read measurement.json. Raises FormatError naming the file, the entry and the field."""
    path = Path(path)
    raw = read_bounded(path, MAX_MEASUREMENT_BYTES, FormatError, "give the measurement.json of an earlier conversion")
    try:
        return parse_measurement(raw, str(path))
    except FormatError as e:
        raise FormatError(e.message, e.hint or "measure again: `exl2ray measure`, or convert with -om") from e


def parse_measurement(raw: bytes, where: str) -> Measurement:
    """``read_measurement`` for bytes; ``where`` names their origin in messages."""
    obj = parse_json_object(raw, where, FormatError, unique=True)
    entries, extra = obj.get("measurement"), obj.get("exl2ray", {})
    if not isinstance(entries, dict) or not entries:
        raise FormatError(f"{where}: 'measurement' is missing or not a non-empty object", "is this a measurement.json?")
    if not isinstance(extra, dict) or not all(isinstance(v, dict) for v in extra.values()):
        raise FormatError(f"{where}: 'exl2ray' must map entry keys to objects")
    index = obj.get("last_module_idx")
    if type(index) is not int or index < 0:
        raise FormatError(f"{where}: 'last_module_idx' is {str(index)[:40]}, not a module index")
    profiles = tuple(ModuleProfile.from_json(k, v, extra.get(k), where) for k, v in entries.items())
    return Measurement(profiles, index, extra.get(ROTATION), extra.get(SOURCE), extra.get(SCORES))


def write_measurement(path: str | Path, measurement: Measurement) -> None:
    """Write measurement.json atomically. Raises StoreError if it cannot be written."""
    data = measurement.to_bytes()
    with atomic_file(Path(path)) as f:
        f.write(data)


def check_against(
    measurement: Measurement,
    entry_keys: Sequence[str],  # "<module key>.<mode>" of every module of the model, without the embedding
    shapes: Mapping[str, Mapping[str, Sequence[LinearShape]]],  # entry -> role -> linears (several for experts)
) -> None:
    """Raise FormatError unless ``measurement`` is a complete measurement of the model described.

    The bit counts of every option are recomputed from the shapes, which tells models apart that share module names.
    """
    hint = "this measurement belongs to another model, or is not complete; measure again without -m"
    have = {p.entry_key: p for p in measurement.profiles}
    missing, foreign = [k for k in entry_keys if k not in have], sorted(set(have) - set(entry_keys))
    if missing or foreign:
        text = [f"{len(missing)} modules are missing, first {missing[0]!r}"] if missing else []
        text += [f"{len(foreign)} entries are not modules of the model, first {foreign[0]!r}"] if foreign else []
        raise FormatError(f"measurement: {'; '.join(text)}", hint)
    for entry_key, roles in shapes.items():
        profile = have[entry_key]
        found = {role for options in profile.slots() for role in options[0].params}
        if found != set(roles):
            raise FormatError(
                f"measurement: {entry_key!r} has the linears {', '.join(sorted(found)) or 'none'}; "
                f"the model has {', '.join(sorted(roles))}",
                hint,
            )
        for options in profile.slots():
            for i, option in enumerate(options):
                _check_bits(f"measurement: {entry_key!r}, option {i}", option, roles, hint)
    refuse_meaningless(
        [[o.accuracy for o in options] for p in measurement.profiles for options in p.slots()],
        [p.extra for p in measurement.profiles],
    )


def _check_bits(place: str, option: OptionProfile, roles: Mapping[str, Sequence[LinearShape]], hint: str) -> None:
    linears = [(p, shape) for role, p in option.params.items() for shape in roles[role]]
    bits = sum(p.bits_of(s) for p, s in linears)
    if bits != option.total_bits:
        raise FormatError(f"{place}: total_bits is {option.total_bits}; the model's shapes give {bits}", hint)


def _options(value: Any, place: str) -> tuple[OptionProfile, ...]:
    if not isinstance(value, list) or not value:
        raise FormatError(f"{place}: must be a non-empty list of options, is {str(value)[:40]}")
    if len(value) > MAX_OPTIONS:
        raise FormatError(f"{place}: {len(value)} options; a module has at most {MAX_OPTIONS}", "is this a measurement.json?")
    options = tuple(_option(o, f"{place}, option {i}") for i, o in enumerate(value))
    roles = set(options[0].params)
    for i, option in enumerate(options):
        if set(option.params) != roles:
            raise FormatError(f"{place}, option {i}: has the linears {sorted(option.params)}, option 0 {sorted(roles)}")
    return options


def _option(value: Any, place: str) -> OptionProfile:
    if not isinstance(value, dict):
        raise FormatError(f"{place}: must be an object, is a {type(value).__name__}")
    accuracy, bits = value.get("accuracy"), value.get("total_bits")
    if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
        raise FormatError(f"{place}: accuracy is {str(accuracy)[:40]}, not a number from 0 to 1")
    if type(bits) is not int or bits <= 0:
        raise FormatError(f"{place}: total_bits is {str(bits)[:40]}, not a positive integer")
    params: dict[str, QParams] = {}
    for role, p in value.items():
        if role in ("accuracy", "total_bits"):
            continue
        try:
            params[role] = QParams.from_json(p)
        except FormatError as e:
            raise FormatError(f"{place}, {role}: {e.message}") from e
    if not params:
        raise FormatError(f"{place}: holds no quantisation parameters")
    return OptionProfile(float(accuracy), bits, params)
