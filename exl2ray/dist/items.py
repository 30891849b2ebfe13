"""What travels between driver and workers: small frozen descriptions of work, and small results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from exl2ray.formats.layout import QParams
from exl2ray.quality import PLAIN, Numerics

RowSet = Literal["measure", "quantize"]  # the two sets of calibration rows


@dataclass(frozen=True)
class WorkerSetup:
    """Everything a worker needs to start; the same on every node."""

    in_dir: str  # a path that every node sees, or an address
    work_root: str
    device: str  # "cpu" or "cuda"
    rope_scale: float | None
    rope_alpha: float | None
    damping: float
    checkpoint_seconds: float
    calibration: str  # work directory name of the rows of tokens
    calibration_sha256: str
    perplexity_rows: int  # leading rows of the quantisation set whose perplexity is reported
    moe_all_experts: bool = False  # Hessians of experts from all tokens
    numerics: Numerics = PLAIN
    source_cache: int = 0  # bytes kept of a source that is elsewhere
    rotate: bool = False  # the residual stream
    alone: bool = True  # no other workers are expected
    threads: int | None = None  # torch threads on CPU, the same whatever the number of workers; None: torch's choice
    nonce: tuple[str, str] | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Meeting:
    """A group that a worker belongs to: where its members meet (host, port), its rank, their number. Default: it is alone.

    ``serial`` tells meetings apart: ports are used again.
    """

    place: tuple[str, int] | None = None
    rank: int = 0
    size: int = 1
    serial: int = 0


@dataclass(frozen=True)
class SweepItem:
    """Run the source model with the group, and give its members what their own modules begin with.

    stretches: by rank, indices of the modules that a member will work on, in order. ``shrink`` as in EnterItem.
    """

    rows: RowSet
    stretches: tuple[tuple[int, ...], ...]
    meeting: Meeting
    shrink: int = 1


@dataclass(frozen=True)
class EnterItem:
    """Reference forward of module ``index``, kept in the worker for the items on this module that follow.

    The states that come with the call are those at the entry of module ``start`` (an index up to ``index``); without any
    the worker uses its own, a checkpoint, or the token rows. ``ship``: return the states after the module as well.
    ``keep_from``: checkpoints that a module from here on may need are kept. ``shrink`` divides batch sizes.
    """

    rows: RowSet
    index: int
    start: int
    keep_from: int
    ship: bool
    shrink: int = 1


@dataclass(frozen=True)
class MeasureItem:
    """Score part p of P of the options of module ``index``; ``inputs_hash`` names the record of a whole module."""

    index: int
    inputs_hash: str
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class QuantizeItem:
    """Quantise module ``index`` of one bitrate on reference states. ``params``: linear key -> option."""

    index: int
    bits: float
    params: dict[str, QParams]
    inputs_hash: str


@dataclass(frozen=True)
class SensitivityItem:
    """One backward pass over some shares of the measurement rows.

    ``shares``: number of a share -> its rows; ``tokens``: how many of each row. ``inputs_hash``: of the shares' records.
    """

    shares: dict[int, tuple[int, ...]]
    tokens: int
    inputs_hash: str
    shrink: int = 1

    @property
    def name(self) -> str:
        """What the item is called in messages."""
        return "gradients of rows " + ", ".join(str(r) for rows in self.shares.values() for r in rows)


@dataclass(frozen=True)
class PerplexityItem:
    """Run the perplexity rows through the quantised model of one bitrate. ``hashes``: inputs hashes of all modules."""

    bits: float
    hashes: tuple[str, ...]
    meeting: Meeting = Meeting()
    shrink: int = 1


@dataclass(frozen=True)
class JoinItem:
    """Form a group that quantises one bitrate together and bring its states to the entry of module ``index``."""

    bits: float
    hashes: tuple[str, ...]
    index: int
    meeting: Meeting
    shrink: int = 1


@dataclass(frozen=True)
class ChainItem:
    """Quantise module ``index`` together with the group, on what the quantised modules before it produce."""

    index: int
    bits: float
    params: dict[str, QParams]
    hashes: tuple[str, ...]
    shrink: int = 1


@dataclass(frozen=True)
class ItemResult:
    """What the driver learns of a finished item; the result itself is in the record."""

    key: str
    seconds: float
    detail: str
    payload: dict[str, Any]
    notes: tuple[str, ...] = ()
    worker: str = ""  # host:pid; of a group "host:pid + host:pid"
    received: int = 0  # bytes of tensors that came from other workers; of a group, all members together
