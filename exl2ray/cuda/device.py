"""What a GPU offers."""

from __future__ import annotations

import torch


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU in bytes as torch may use it: a per-process fraction counts, what is free at the moment does not."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    total = int(torch.cuda.get_device_properties(index).total_memory)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(index)
    return int(total * float(fraction))
