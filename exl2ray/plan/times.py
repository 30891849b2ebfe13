"""How long a conversion takes: counted work of all modules, scaled by layers that were timed.

Timed layers are those of docs/log.md for the kinds of GPU that were measured, or those of a probe on this machine. Logged
layers are numerics alone: reading, hashing and writing files came on top in the whole conversions of the log, by the
factors below, so an estimate from the log is a range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.plan.memory import RowSizes
from exl2ray.plan.work import Linear, Shape, Work, finishing, measuring, quantizing, seconds, shape_of


@dataclass(frozen=True)
class Timed:
    """Seconds that one module took in a pass. kind: "attention", "mlp" or "head" (of experts and parallel blocks too)."""

    stage: str  # "measure" or "quantize"
    kind: str
    shape: Shape
    rows: int
    tokens: int
    seconds: float

    @property
    def counted(self) -> float:
        return seconds(_work(self.stage, self.kind, self.shape, (self.rows, self.tokens), 0))


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


def _attention(hidden: int, kv: int) -> Shape:
    linears = (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv))
    qkv = tuple(Linear(role, "qkv", hidden, width) for role, width in linears)
    return Shape((*qkv, Linear("o_proj", "o", hidden, hidden)), hidden)


def _mlp(hidden: int, wide: int) -> Shape:
    first = tuple(Linear(role, "gate_up", hidden, wide) for role in ("gate_proj", "up_proj"))
    return Shape((*first, Linear("down_proj", "down", wide, hidden)))


def _head(hidden: int, vocabulary: int) -> Shape:
    return Shape((Linear("lm_head", "head", hidden, vocabulary),))


_7B = {"attention": _attention(4096, 4096), "mlp": _mlp(4096, 11008), "head": _head(4096, 32000)}
_70B = {"attention": _attention(8192, 1024), "mlp": _mlp(8192, 28672), "head": _head(8192, 32000)}


def _logged(stage: str, kind: str, rows: int, seven: float, seventy: float) -> tuple[Timed, Timed]:
    return Timed(stage, kind, _7B[kind], rows, 2048, seven), Timed(stage, kind, _70B[kind], rows, 2048, seventy)


# docs/log.md, 2026-11-22, "One layer on one GPU": GPU -> timed layers, fastest run after compilation and recording.
LOGGED: Mapping[str, tuple[Timed, ...]] = {
    "H200": (
        *_logged("measure", "attention", 19, 0.338, 0.779),
        *_logged("measure", "mlp", 19, 0.622, 3.579),
        *_logged("quantize", "attention", 115, 0.248, 0.619),
        *_logged("quantize", "mlp", 115, 0.481, 2.665),
        *_logged("quantize", "head", 115, 0.145, 0.284),
    ),
}
# docs/log.md, "Whole conversions ..., second round": 8 layers of a 7B shape in 24.2 s with kernels compiled before (30.4 s
# else), of it 11.3 s to measure and 9.4 s to quantise, where the numerics add up to 7.7 s and 6.0 s; 1.9 s to write 1.2 GB.
FILES = {"measure": 1.5, "quantize": 1.6}
START_SECONDS = (2.0, 9.0)
RAY_SECONDS = (15.0, 20.0)
WRITTEN_PER_SECOND = 0.6e9


def estimate(
    spec: ModelSpec,
    rows: RowSizes,
    bitrates: Sequence[str],  # names for the passes to quantise; empty: nothing is quantised
    measure: bool,
    timed: Sequence[Timed],
    device: str,
    basis: str,
    whole: bool,  # timed with files, as a probe does
    written_bytes: int = 0,  # of all outputs
    ray: bool = False,  # whether Ray is started for it
) -> Times:
    """Seconds of all passes on one device. Several devices share the work: docs/scaling.md."""
    scale = _scales(timed)
    decoder = [m for m in spec.modules if m.quantized]
    begin = [a + b * ray for a, b in zip(START_SECONDS, RAY_SECONDS, strict=True)]
    stages = [StageTime("start", 0, *begin)]

    def total(stage: str, modules: Sequence[ModuleSpec]) -> StageTime:
        sizes = rows.measure if stage == "measure" else rows.quantize
        cache: dict[object, float] = {}
        least = 0.0
        for m in modules:
            shape, kind = shape_of(m, spec.hyper), kind_of(m)
            if (kind, shape) not in cache:
                counted = seconds(_work(stage, kind, shape, sizes, rows.reported))
                cache[kind, shape] = counted * scale(stage, kind, counted)
            least += cache[kind, shape]
        return StageTime(stage, len(modules), least, least * (1.0 if whole else FILES[stage]))

    if measure:
        stages.append(total("measure", decoder))
    if bitrates:
        once = total("quantize", [*decoder, spec.modules[-1]])
        stages += [StageTime(f"quantize {b}", once.modules, once.least_seconds, once.most_seconds) for b in bitrates]
        stages.append(StageTime("write", 0, *[written_bytes / WRITTEN_PER_SECOND] * 2))
    return Times(device, basis, tuple(stages))


def far_below(spec: ModelSpec, rows: RowSizes, timed: Sequence[Timed]) -> bool:
    """Whether a layer takes less than a twentieth of the smallest timed one: then launches, which are not counted, decide."""
    first = next(m for m in spec.modules if m.quantized)
    counted = seconds(measuring(shape_of(first, spec.hyper), *rows.measure))
    return counted < 0.05 * min(t.counted for t in timed if t.stage == "measure")


def kind_of(module: ModuleSpec) -> str:
    """Which timed kind a module is like."""
    return {"moe": "mlp", "parallel": "mlp"}.get(module.kind, module.kind)


def _work(stage: str, kind: str, shape: Shape, sizes: tuple[int, int], reported: int) -> Work:
    if kind == "head":
        return finishing(shape, *sizes, reported)
    return measuring(shape, *sizes) if stage == "measure" else quantizing(shape, *sizes, reported)


def _scales(timed: Sequence[Timed]) -> Callable[[str, str, float], float]:
    """Measured over counted seconds of a stage and kind, between timed layers by the logarithm of their size."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for t in timed:
        points.setdefault((t.stage, t.kind), []).append((math.log(t.counted), t.seconds / t.counted))

    def scale(stage: str, kind: str, counted: float) -> float:
        known = points.get((stage, kind)) or [p for (s, _), some in points.items() if s == stage for p in some]
        known = sorted(known)
        x = math.log(counted)
        below, above = [p for p in known if p[0] <= x], [p for p in known if p[0] > x]
        if not below or not above:
            return (below[-1] if below else above[0])[1]
        (x0, y0), (x1, y1) = below[-1], above[0]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    return scale


def logged_for(name: str) -> str | None:
    """The key in `LOGGED` for a GPU as its driver names it ("NVIDIA H200"); None if that kind was not measured."""
    return next((gpu for gpu in LOGGED if gpu in name.replace("-", " ").split()), None)
