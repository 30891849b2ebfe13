"""Which model a measurement was made of: hashes of its weights and its config, the same wherever the files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from exl2ray.formats.hf import SourceModel
from exl2ray.formats.json_file import as_json
from exl2ray.formats.measurement import Measurement

# Settings that change nothing of what a measurement sees: bookkeeping of libraries, and what only generation uses.
NOT_MEASURED = frozenset({
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "eos_token_id", "pad_token_id",
    "model_type", "auto_map", "_attn_implementation",
})  # fmt: skip


def source_identity(source: SourceModel, rope: str = "") -> dict[str, str]:
    """What measurement.json remembers of the model: SHA-256 (hex) of its tensors, sampled, and of the config that matters;
    and the flags that change what the model says, if there were any (`rope_flags`)."""
    known = {"weights": source.weights_fingerprint(), "config": _config_hash(source.config)}
    return {**known, "rope": rope} if rope else known


def rope_flags(scale: float | None, alpha: float | None) -> str:
    """-rs and -ra as they were given; empty without."""
    return " ".join(f"{flag} {value:g}" for flag, value in (("-rs", scale), ("-ra", alpha)) if value is not None)


def _config_hash(config: Mapping[str, Any]) -> str:
    def kept(level: Mapping[str, Any]) -> dict[str, Any]:
        some = {k: v for k, v in level.items() if k not in NOT_MEASURED and v is not None}
        return {k: kept(v) if isinstance(v, Mapping) else v for k, v in some.items()}

    return hashlib.sha256(as_json(kept(config), sort_keys=True).encode()).hexdigest()


def origin_findings(
    measurement: Measurement, source: SourceModel, rope: str | None = None
) -> tuple[list[str], list[str]]:
    """(warnings, notes) on whether a measurement is of ``source``, with the flags ``rope`` (None: whatever they were).

    Shapes are compared elsewhere; models of one family and size have the same, and that an allocation follows another model's
    errors shows nowhere else.
    """
    found = measurement.source
    if found is None:
        return [], ["-m does not say of which model it is (another program or an earlier version made it); is it this one's?"]
    own = source_identity(source)
    if found.get("weights") != own["weights"]:
        return ["-m is a measurement of another model, or of other weights of it: the allocation follows errors that this "
                "model does not have; measure again without -m"], []  # fmt: skip
    if found.get("config") != own["config"]:
        return ["-m was measured with another config.json than the model has now (RoPE, heads, eps, ...); measure again "
                "without -m, unless the change concerns generation alone"], []  # fmt: skip
    before = str(found.get("rope") or "")[:40]
    if rope is not None and before != rope:
        there, here = (flags or "neither -rs nor -ra" for flags in (before, rope))
        return [f"-m was measured with {there}, and this is with {here}: the allocation follows errors of another model; "
                "measure again without -m"], []  # fmt: skip
    return [], []
