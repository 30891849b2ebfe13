"""Which bitrate fits a card: weights, the key/value cache of a context, and an allowance for the rest.

What is counted: all tensors of the output but the embedding table, which ExLlamaV2 keeps in main memory; a cache for every
layer over the whole context, which it allocates for sliding layers as well; and an allowance that is a formula, not a
measurement: CUDA context and allocator, one decoded copy of the largest linear, activations of a chunk of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from exl2ray.allocation.knapsack import budget, reachable_range
from exl2ray.allocation.planning import reachable_slots, slot_weights
from exl2ray.errors import BudgetError, UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.hyper import Hyper
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.sizes import Freedom, output_entries, size_range
from exl2ray.wording import file_size

CACHE_BITS = {"fp16": 16.0, "q8": 8.5, "q6": 6.5, "q4": 4.5}  # per value; quantised ones with a float16 scale for every 32
CONTEXT_BYTES = 512 << 20  # CUDA context, libraries, fragmentation
CHUNK_TOKENS = 2048  # of a prompt that are processed at once
STEP = 0.01  # of the bitrate that is named


@dataclass(frozen=True)
class Fit:
    """The largest bitrate for a memory, and what the memory goes to. bits: None if even the smallest does not fit.

    cache_bytes: as ExLlamaV2 allocates it; windowed_cache_bytes: for a runtime that keeps only the windows of sliding layers.
    weight_bytes: of the tensors on the GPU at ``bits``, at most; free_bytes: left for weights.
    """

    memory_bytes: int
    context: int
    cache: str
    bits: float | None
    weight_bytes: int
    free_bytes: int
    cache_bytes: int
    windowed_cache_bytes: int
    allowance_bytes: int
    host_bytes: int  # the embedding table


def best_fit(
    spec: ModelSpec,
    source: SourceModel,
    memory_bytes: int,
    context: int,
    cache: str,
    freedom: Freedom,
    limit_bytes: int,
) -> Fit:
    """The largest multiple of STEP bits per weight that fits for certain, whatever the allocation makes of it."""
    if cache not in CACHE_BITS:
        raise UsageError(f"--cache {cache}: one of {', '.join(CACHE_BITS)} is needed")
    if context < 1:
        raise UsageError(f"--context {context}: at least one token is needed")
    low, high = reachable_range(reachable_slots(spec, freedom.overrides))
    host = sum(e.nbytes for e in output_entries(spec, source, {}) if e.name in _embeddings(spec))
    cache_bytes, windowed = (cache_size(spec.hyper, context, cache, w) for w in (False, True))
    allowance = allowance_bytes(spec)
    free = memory_bytes - cache_bytes - allowance

    def on_gpu(bits: float) -> int:
        return size_range(spec, source, bits, freedom, limit_bytes).high_bytes - host

    fixed = on_gpu(low) - budget(slot_weights(spec), low) // 8
    affordable = (free - fixed) * 8 / slot_weights(spec)
    steps = min(int(affordable / STEP + 1e-9), int(high / STEP + 1e-9))
    while steps * STEP >= low and on_gpu(steps * STEP) > free:  # a further file has a header of its own
        steps -= 1
    best = round(steps * STEP, 2) if steps * STEP >= low else None
    weights = on_gpu(best if best is not None else low)
    return Fit(memory_bytes, context, cache, best, weights, free, cache_bytes, windowed, allowance, host)


def check_fit(fit: Fit, low: float) -> None:
    """BudgetError with what the memory would have to be, if nothing fits."""
    if fit.bits is None:
        needed = fit.weight_bytes + fit.cache_bytes + fit.allowance_bytes
        raise BudgetError(
            f"--fit {file_size(fit.memory_bytes, 4)}: the smallest weights ({low:.4f} bits per weight) take "
            f"{file_size(fit.weight_bytes, 4)}, the cache {file_size(fit.cache_bytes, 4)}, {file_size(needed, 4)} with all",
            "a shorter --context, a smaller --cache (q4), a lower -hb, or several GPUs",
        )


def cache_size(hyper: Hyper, context: int, cache: str, windowed: bool = False) -> int:
    """Bytes of keys and values of ``context`` tokens in all layers; ``windowed``: sliding layers keep their window only."""
    positions = 0
    for layer in range(hyper.num_layers):
        window = hyper.layer_window(layer) if windowed else None
        positions += context if window is None else min(window, context)
    return int(2 * positions * hyper.kv_heads * hyper.head_dim * CACHE_BITS[cache] / 8)


def allowance_bytes(spec: ModelSpec) -> int:
    """What is reserved besides weights and cache: see the top of this file."""
    h = spec.hyper
    decoded = max(2 * x.padded_weights for m in spec.modules if m.quantized for x in m.linears)
    wide = max(h.intermediate_size, h.heads * h.head_dim)
    return CONTEXT_BYTES + decoded + CHUNK_TOKENS * 2 * (4 * h.hidden_size + 3 * wide) + 4 * h.vocab_size


def _embeddings(spec: ModelSpec) -> set[str]:
    return {p.output_name for m in spec.modules if m.kind == "embedding" for p in m.plain}


