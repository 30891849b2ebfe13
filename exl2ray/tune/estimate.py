"""What a tuning takes, told before it begins: memory and time, as a whole and a module at a time.

Sizes follow from shapes; times from operations, bytes and launches, at rates that fit what was measured on an H200: 85 s for
4 M tokens of SmolLM2-135M, 200 s for 1 M of a 7B (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from exl2ray.model.spec import ModelSpec
from exl2ray.tune.memory import HOME_SHARE, TRAINED_BYTES, host_bytes, needed_bytes, step_tokens, streamed_bytes

OPERATIONS = 10  # a weight and token: two forward passes, a backward one
FORWARD_AGAIN = 2  # the same, of modules that are computed a second time
BUSY_GPU = 3e14  # operations a second
LAUNCHES = 1.1e-3  # seconds a module and step, whose kernels are short where the model is small
LINK_BYTES = 12e9  # a second, between main memory and a GPU
DISK_BYTES = 2e9  # a second, of files that are read or written
MOVED_BYTES = 2 + 4 + 2 * TRAINED_BYTES  # a weight and step: the source, latents for the way forward, all for the way back


@dataclass(frozen=True)
class Estimate:
    """gpu_bytes: at least. host_bytes: of main memory. file_bytes: of what has no room there."""

    gpu_bytes: int
    host_bytes: int
    file_bytes: int
    seconds: float


def as_a_whole(spec: ModelSpec, tokens: int) -> Estimate:
    """tokens: that are trained on, of all passes together."""
    computing = OPERATIONS * spec.weights * tokens / BUSY_GPU
    return Estimate(needed_bytes(spec), spec.weights, 0, computing + _launching(spec, tokens))


def a_module_at_a_time(spec: ModelSpec, tokens: int, memory: int) -> Estimate:
    """memory: bytes of main memory of the machine."""
    weights, steps = spec.weights, _steps(spec, tokens)
    files = max(0, TRAINED_BYTES * weights - max(0, int(HOME_SHARE * memory) - weights))
    computing = (OPERATIONS + FORWARD_AGAIN) * weights * tokens / BUSY_GPU
    moving = steps * (MOVED_BYTES * weights / LINK_BYTES + 2 * files / DISK_BYTES)
    return Estimate(streamed_bytes(spec), host_bytes(spec) - files, files, computing + moving + _launching(spec, tokens))


def _steps(spec: ModelSpec, tokens: int) -> int:
    return max(1, tokens // step_tokens(spec.weights))


def _launching(spec: ModelSpec, tokens: int) -> float:
    return LAUNCHES * len(spec.modules) * _steps(spec, tokens)
