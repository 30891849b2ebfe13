"""What a tuning takes, and whether the model is on the device as a whole or a module at a time (`exl2ray.tune.shelves`).

Sizes follow from shapes alone, so that `plan` can tell them beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl2ray.errors import UsageError
from exl2ray.host import usable_memory_bytes
from exl2ray.model.spec import ModelSpec
from exl2ray.quant.memory import device_bytes
from exl2ray.wording import file_size

TRAINED_BYTES = 12  # a weight: latent and two moments, float32
WEIGHT_BYTES = 2 + 2 + 2  # as it is computed with, the source's, and the gradient of what is being updated at most
SNAPSHOT_BYTES = 1  # the best integers so far, in main memory
MODULE_BYTES = TRAINED_BYTES + 2 + 4 * 4  # of the module in hand: also its gradients, of up to four shares, float32
LOGITS_BYTES = 3 << 30  # of both models for some positions, and what their divergence takes
STATE_BYTES = 96  # a token and hidden unit: what a module keeps for its way back
STEP_TOKENS, SHARES = 8192, 4
SMALL_STEP_TOKENS, SMALL_WEIGHTS = 4096, 10**9  # a step of fewer weights is launched for longer than it computes
HOME_SHARE = 0.75  # of main memory, for what is trained
SMALLER = 16  # out of memory twice: a module at a time


@dataclass(frozen=True)
class Room:
    """streamed: a module at a time. keeps_graphs: whether there may be memory for what the way back takes. home_bytes: of
    main memory, for what is trained."""

    streamed: bool
    keeps_graphs: bool
    home_bytes: int


def step_tokens(weights: int) -> int:
    """Of a step, if nobody says so, for a model of so many weights (`exl2ray.tune.settings.Settings.for_model`)."""
    return SMALL_STEP_TOKENS if weights < SMALL_WEIGHTS else STEP_TOKENS


def needed_bytes(spec: ModelSpec) -> int:
    """The least memory of a GPU for the model as a whole, without states of a step, which are fitted into what is left."""
    tables = 2 * 2 * spec.hyper.vocab_size * spec.hyper.hidden_size
    return spec.weights * (TRAINED_BYTES + WEIGHT_BYTES) + tables + _logits(spec)


def streamed_bytes(spec: ModelSpec) -> int:
    """The least memory of a GPU for a module at a time."""
    largest = max(m.weights for m in spec.modules)
    return largest * MODULE_BYTES + STATE_BYTES * STEP_TOKENS // SHARES * spec.hyper.hidden_size + _logits(spec)


def host_bytes(spec: ModelSpec) -> int:
    """Main memory and files together for a module at a time: what is trained, the best integers, states of a step."""
    states = 4 * STEP_TOKENS * spec.hyper.hidden_size * len(spec.modules)
    return spec.weights * (TRAINED_BYTES + SNAPSHOT_BYTES) + states


def fits_whole(spec: ModelSpec, gpu_bytes: int) -> bool:
    return needed_bytes(spec) <= gpu_bytes


def check_memory(spec: ModelSpec, device: torch.device, flag: str = "tuning") -> None:
    """UsageError if the memory of a GPU is certainly too small."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    needed, total = streamed_bytes(spec), device_bytes(device)
    if needed > total:
        raise UsageError(
            f"{flag}: {file_size(needed)} of GPU memory are needed, a module at a time; the GPU has {file_size(total)}",
            "use a larger GPU, or leave the model as it was solved",
        )


def room_for(spec: ModelSpec, device: torch.device, streamed: bool | None, shrink: int = 1) -> Room:
    """streamed: what was asked for; None: if the model does not fit as a whole. shrink: more than 1 after it ran out of
    memory. Raises as `check_memory`."""
    check_memory(spec, device)
    memory = usable_memory_bytes()
    if device.type == "cuda":
        whole = fits_whole(spec, device_bytes(device))
    else:
        whole = spec.weights * (TRAINED_BYTES + 3 * 4) <= memory  # weights, the source's, gradients: float32
    streamed = streamed or shrink >= SMALLER or (streamed is None and not whole)
    home = max(0, int(HOME_SHARE * memory) - spec.weights * SNAPSHOT_BYTES)
    return Room(streamed, shrink == 1, home)


def _logits(spec: ModelSpec) -> int:
    return min(LOGITS_BYTES, 64 * 1024 * spec.hyper.vocab_size)
