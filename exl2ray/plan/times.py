"""How long a conversion takes: seconds per weight that somebody measured, times the weights of this model.

They come from a probe on this machine, or from docs/log.md for the kinds of GPU that were measured there. Operations are
not counted: of a 7B and a 70B shape in the log the seconds per weight differ by 7 %, far less than what files, other rows and
other cards make of them. So an estimate from the log is a range, and there is none for a card that nobody measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.plan.worker_memory import RowSizes


@dataclass(frozen=True)
class Timed:
    """What ``weights`` weights took in a pass; kind: "attention", "mlp" (experts and parallel blocks too) or "head"."""

    stage: str  # "measure" or "quantize"
    kind: str
    weights: int
    rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class StageTime:
    """One pass: ``least_seconds`` for the numerics alone, ``most_seconds`` with all that came on top where it was timed."""

    stage: str
    modules: int
    least_seconds: float
    most_seconds: float


@dataclass(frozen=True)
class Times:
    """An estimate for one device; ``basis`` says where it comes from."""

    device: str
    basis: str
    stages: tuple[StageTime, ...]

    @property
    def least_seconds(self) -> float:
        return sum(s.least_seconds for s in self.stages)

    @property
    def most_seconds(self) -> float:
        return sum(s.most_seconds for s in self.stages)


# docs/log.md, 2026-11-22, "One layer on one GPU": GPU -> timed layers of a 70B shape, the fastest run of each.
LOGGED: Mapping[str, tuple[Timed, ...]] = {
    "H200": (
        Timed("measure", "attention", 150_994_944, 19, 2048, 0.779),
        Timed("measure", "mlp", 704_643_072, 19, 2048, 3.579),
        Timed("quantize", "attention", 150_994_944, 115, 2048, 0.619),
        Timed("quantize", "mlp", 704_643_072, 115, 2048, 2.665),
        Timed("quantize", "head", 262_144_000, 115, 2048, 0.284),
    ),
}
# docs/log.md, "Whole conversions ..., second round": 8 layers of a 7B shape in 24.2 s with kernels compiled before (30.4 s
# else), of it 11.3 s to measure and 9.4 s to quantise, where the numerics add up to 7.7 s and 6.0 s; 1.9 s to write 1.2 GB.
FILES = {"measure": 1.5, "quantize": 1.6}
START_SECONDS = (2.0, 9.0)
RAY_SECONDS = (15.0, 20.0)
WRITTEN_PER_SECOND = 0.6e9
SMALL_LAYER = 10_000_000  # weights below which launches, not weights, decide: a twentieth of a 7B layer


def estimate(
    spec: ModelSpec,
    rows: RowSizes,
    bitrates: Sequence[str],
    measure: bool,
    timed: Sequence[Timed],
    device: str,
    basis: str,
    whole: bool,
    written_bytes: int = 0,
    ray: bool = False,
) -> Times:
    """Seconds of all passes on one device. Several devices share the work: docs/scaling.md.

    ``bitrates``: names for the passes to quantise, none if empty; ``whole``: ``timed`` was timed with files, as a probe does;
    ``written_bytes``: of all outputs; ``ray``: whether Ray is started for it. Where fewer rows were timed than will be used,
    the pass takes as long at least, and as much longer as there are more rows at most.
    """
    decoder = [m for m in spec.modules if m.quantized]
    begin = [a + b * ray for a, b in zip(START_SECONDS, RAY_SECONDS, strict=True)]

    def total(stage: str, modules: Sequence[ModuleSpec]) -> StageTime:
        wanted, least, most = (rows.measure if stage == "measure" else rows.quantize)[0], 0.0, 0.0
        for m in modules:
            like = _like(timed, stage, m)
            took = like.seconds * m.weights / like.weights
            least += took
            most += took * (max(1.0, wanted / like.rows) if whole else FILES[stage])
        return StageTime(stage, len(modules), least, most)

    stages = [StageTime("start", 0, *begin)]
    if measure:
        stages.append(total("measure", decoder))
    if bitrates:
        once = total("quantize", [*decoder, spec.modules[-1]])
        stages += [StageTime(f"quantize {b}", once.modules, once.least_seconds, once.most_seconds) for b in bitrates]
        stages.append(StageTime("write", 0, *[written_bytes / WRITTEN_PER_SECOND] * 2))
    return Times(device, basis, tuple(stages))


def _like(timed: Sequence[Timed], stage: str, module: ModuleSpec) -> Timed:
    """What was timed of this kind in this pass, or of any kind."""
    known = [t for t in timed if t.stage == stage]
    return next((t for t in known if t.kind == kind_of(module)), known[-1])


def far_below(spec: ModelSpec) -> bool:
    """Whether the first layer is so small that starting kernels, not weights, decides about the time."""
    first = next(m for m in spec.modules if m.quantized).layer
    return sum(m.weights for m in spec.modules if m.quantized and m.layer == first) < SMALL_LAYER


def kind_of(module: ModuleSpec) -> str:
    """Which timed kind a module is like."""
    return {"moe": "mlp", "parallel": "mlp"}.get(module.kind, module.kind)


def logged_for(name: str) -> str | None:
    """The key in `LOGGED` for a GPU as its driver names it ("NVIDIA H200"); None if that kind was not measured."""
    return next((gpu for gpu in LOGGED if gpu in name.replace("-", " ").split()), None)
