"""What travels between the driver and its workers: a worker's part in a pass, what it tells while it goes through it, and
what can go wrong with it, as exceptions that cross process boundaries.

A pass is one call. The worker is a loop over modules that says what it begins (`Begun`) and what is finished (`ItemResult`,
after the commit). So the driver knows at any moment what each worker has in hand, and a loss costs no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from exl2ray.errors import ClusterError, is_out_of_host_memory
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
    score_rows: int | None = None  # of the measurement rows, for the scores of option tables; None: all
    numerics: Numerics = PLAIN
    gradients: bool = False  # backward passes will come
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
class Choices:
    """What one bitrate quantises with. params: linear key -> option; hashes: inputs hash of every module, by index."""

    bits: float
    params: Mapping[str, QParams]
    hashes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A worker's part in a pass. shrink: profile key -> divisor of batch sizes, of modules that ran out of memory. another: a
    pass follows that begins at the start of the model.
    """

    meeting: Meeting = Meeting()
    shrink: Mapping[str, int] = field(default_factory=dict)
    another: bool = False


@dataclass(frozen=True, kw_only=True)
class SourcePass(Pass):
    """Work on modules of the source model. They need nothing from each other but the states at their entry.

    modules: indices, ascending. stretches: those of all members by rank, if they are to run the source model to their first
    ones together (`exl2ray.team.source_forward`); else every worker finds its own way. keep_from: checkpoints that a
    module from here on may need are kept.
    """

    modules: tuple[int, ...]
    stretches: tuple[tuple[int, ...], ...] = ()
    keep_from: int = 0


@dataclass(frozen=True, kw_only=True)
class MeasurePass(SourcePass):
    """Scores all options of each module. hashes: index -> inputs hash of its record."""

    hashes: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class ReferencePass(SourcePass):
    """Quantises modules on the states of the source model. choices: of all bitrates; wanted: index -> which of them."""

    choices: tuple[Choices, ...]
    wanted: Mapping[int, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class ChainPass(Pass):
    """Quantises one bitrate, module after module, as a group, on what the quantised modules before produce.

    modules: indices of those without a record, ascending.
    """

    choices: Choices
    modules: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SensitivityPass(Pass):
    """Backward passes of the source model, each over some shares of the measurement rows.

    hands: index -> number of a share -> its rows; ``tokens`` of each row. inputs_hash: of the shares' records.
    """

    hands: Mapping[int, Mapping[int, tuple[int, ...]]]
    tokens: int
    inputs_hash: str


@dataclass(frozen=True, kw_only=True)
class PerplexityPass(Pass):
    """Perplexity of a model that was quantised on the states of the source model, from its records, by a group."""

    choices: Choices


def hand_key(hand: Mapping[int, tuple[int, ...]]) -> str:
    """What a backward pass is called in messages."""
    return "gradients of rows " + ", ".join(str(r) for rows in hand.values() for r in rows)


@dataclass(frozen=True)
class Begun:
    """A worker begins something. ``key`` names it for people and for counting losses.

    method: "measure", "quantize", "sensitivity", "perplexity"; in groups "sweep", "join", "chain". index: of the module, or
    of the item in its pass. passed: modules that it has to run first to get there. together: members of the group wait for
    each other in it.
    """

    method: str
    index: int
    key: str
    bits: float | None = None
    passed: int = 0
    together: bool = False


@dataclass(frozen=True)
class ItemResult:
    """Something is finished and committed; the result itself is in the record."""

    index: int
    key: str
    seconds: float
    detail: str
    payload: dict[str, Any]
    bits: float | None = None
    notes: tuple[str, ...] = ()
    worker: str = ""  # host:pid; of a group "host:pid + host:pid"
    received: int = 0  # bytes of tensors that came from other workers; of a group, all members together


@dataclass(frozen=True)
class Ready:
    """What all members of a group began is behind them: forming it, running the source model. received: as above."""

    method: str
    seconds: float
    received: int = 0


class WorkerOutOfMemory(ClusterError):
    """The host or the GPU ran out of memory; the worker lives on."""


class DeviceFailed(ClusterError):
    """A CUDA error: the process cannot use its GPU any more and must be replaced."""


class GroupBroken(ClusterError):
    """Another member of the group is gone; this one is well and keeps its states."""


_DEVICE_ERRORS = ("AcceleratorError", "CudaAPIError", "CudaDriverError", "LinkerError")


def translate(error: Exception) -> Exception:
    """torch's, Numba's and Python's errors that call for a reaction, as one of the classes above; others as they are."""
    name = type(error).__name__
    text = str(error).strip().splitlines()[0] if str(error).strip() else name
    if is_out_of_host_memory(error) or name == "OutOfMemoryError":
        where = "host" if is_out_of_host_memory(error) else "GPU"
        return WorkerOutOfMemory(
            f"the {where} ran out of memory: {text}",
            "close other programs, use a device with more memory, shorter rows (-l, -ml), or --quality reference",
        )
    if name in _DEVICE_ERRORS or "CUDA error" in text or "CUBLAS_STATUS" in text:
        return DeviceFailed(f"{name}: {text}", "see dmesg and nvidia-smi on that machine")
    return error
