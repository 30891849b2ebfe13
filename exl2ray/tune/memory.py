"""What a tuning takes: everything that is trained lies on the device from the first step to the last."""

from __future__ import annotations

import torch

from exl2ray.errors import UsageError
from exl2ray.model.spec import ModelSpec

TRAINED_BYTES = 12  # a weight: latent and two moments, float32
WEIGHT_BYTES = 2 + 2 + 2  # as it is computed with, the source's, and the gradient of what is being updated at most
LOGITS_BYTES = 3 << 30  # of both models for some positions, and what their divergence takes


def needed_bytes(spec: ModelSpec) -> int:
    """The least memory of a GPU, without the states of a step, which are fitted into what is left."""
    weights = sum(x.in_features * x.out_features for x in spec.linears)
    tables = 2 * 2 * spec.hyper.vocab_size * spec.hyper.hidden_size
    return weights * (TRAINED_BYTES + WEIGHT_BYTES) + tables + min(LOGITS_BYTES, 64 * 1024 * spec.hyper.vocab_size)


def check_memory(spec: ModelSpec, device: torch.device, flag: str = "tuning") -> None:
    """UsageError if the device's memory is certainly too small."""
    if device.type != "cuda":
        return
    needed, total = needed_bytes(spec), torch.cuda.get_device_properties(device).total_memory
    if needed > total:
        raise UsageError(
            f"{flag}: {needed / 1e9:.1f} GB of GPU memory are needed, the GPU has {total / 1e9:.1f} GB",
            "latents and moments of all weights lie there: use a larger GPU, or leave the model as it was solved",
        )
