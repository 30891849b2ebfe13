"""What travels between driver and workers: small frozen descriptions of work, and small results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from exl2ray.formats.layout import QParams


@dataclass(frozen=True)
class WorkerSetup:
    """Everything a worker needs to start; the same on every node."""

    in_dir: str
    work_root: str
    device: str  # "cpu" or "cuda"
    rope_scale: float | None
    rope_alpha: float | None
    damping: float
    checkpoint_seconds: float
    calibration: str  # work directory name of the rows of tokens
    calibration_sha256: str
    perplexity_rows: int  # leading rows of the quantisation set whose perplexity is reported
    threads: int | None = None  # torch threads on CPU; None: torch's choice
    nonce: tuple[str, str] | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasureItem:
    """Measure module ``index`` on reference states; ``inputs_hash`` names the record."""

    index: int
    inputs_hash: str
    kind: Literal["measure"] = "measure"


@dataclass(frozen=True)
class QuantizeItem:
    """Quantise module ``index`` of one bitrate. ``hashes`` are the inputs hashes of modules 0 .. index.

    ``params``: linear key -> option. The states entering the module are the outputs of the modules before it, all of which
    must have been quantised (their packed tensors are in the work directory).
    """

    index: int
    bits: float
    params: dict[str, QParams]
    hashes: tuple[str, ...]
    propagate: Literal["quantized", "reference"] = "quantized"
    kind: Literal["quantize"] = "quantize"


@dataclass(frozen=True)
class ItemResult:
    """What the driver learns of a finished item; the result itself is in the record."""

    key: str
    seconds: float
    detail: str
    payload: dict[str, Any]
    notes: tuple[str, ...] = ()
