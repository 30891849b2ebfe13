"""How much to do at once: rows per forward and working memory of the solver, from shapes and the device's size.

The choice depends on the device's *total* memory, never on what is free at the moment, so that two runs on one kind of
device batch alike and give the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from exl2ray.cuda.device import device_bytes
from exl2ray.formats.layout import pad32
from exl2ray.quant.measure import Settings
from exl2ray.quant.qparams import attention_options, mlp_options, unique

CPU_BATCH_TOKENS = 8192
CPU_SOLVER_BYTES = 2 << 30
# Shares of a GPU's memory: candidates of a module, one solver batch, activations of a forward, hidden states. Besides
# these a module needs its weights, Hessians and, at factorisation, two K x K matrices; recorded graphs keep their buffers.
CANDIDATE_SHARE = 0.3
SOLVER_SHARE = 0.2
ACTIVATION_SHARE = 0.2
STATES_SHARE = 0.35
NORM_BYTES_PER_TOKEN = 1 << 17  # the final norm: states in and out in float32, hidden sizes up to 16384


def settings_for(module: Any, rows: int, tokens: int, device: torch.device, damping: float) -> Settings:
    """Batch sizes for one module; ``rows`` calibration rows of ``tokens`` tokens."""
    if device.type != "cuda":
        return Settings(damping, max(1, min(rows, CPU_BATCH_TOKENS // tokens)), CPU_SOLVER_BYTES)
    total = device_bytes(device)
    candidates = _candidate_bytes(module)
    offload = candidates > CANDIDATE_SHARE * total
    solver = int(total * SOLVER_SHARE)
    per_row = max(1, tokens * _bytes_per_token(module))
    batch = max(1, min(rows, int(total * ACTIVATION_SHARE) // per_row))
    return Settings(damping, batch, solver, offload)


def states_on_device(state_bytes: int, device: torch.device) -> bool:
    """Whether hidden states stay on the GPU. A pass holds three sets of them: entry, target and output."""
    return device.type == "cuda" and 3 * state_bytes <= STATES_SHARE * device_bytes(device)


def _candidate_bytes(module: Any) -> int:
    """Reconstructed weights of all distinct options of a module, in half precision."""
    attention = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), (14, 14, 15, 14), strict=True))
    mlp = dict(zip(("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2"), (13, 13, 14, 13, 13, 14), strict=True))
    counts = {**attention, **mlp}
    return sum(2 * counts.get(x.role, 1) * x.in_features * pad32(x.out_features) for x in module.linears)


def _bytes_per_token(module: Any) -> int:
    """Activations of the scoring forward: every distinct option's outputs of the first linears at once, in half precision."""
    widest = 0
    roles = [x.role for x in module.linears]
    if "q_proj" in roles:
        first = [x for x in module.linears if x.role in ("q_proj", "k_proj", "v_proj")]
        counts = [len(unique([r[i] for r in attention_options()])[0]) for i in range(3)]
        widest += sum(c * pad32(x.out_features) for c, x in zip(counts, first, strict=True)) * 2
    gate_up = [x for x in module.linears if x.role in ("gate_proj", "up_proj")]
    if gate_up:
        counts = [len(unique([r[i] for r in mlp_options()])[0]) for i in range(2)]
        widest += sum(c * pad32(x.out_features) for c, x in zip(counts, gate_up, strict=False)) * 2
    if not module.linears:
        return NORM_BYTES_PER_TOKEN
    hidden: int = max(x.in_features for x in module.linears)
    return widest + 16 * hidden + (8 * pad32(module.linears[0].out_features) if module.kind == "head" else 0)
