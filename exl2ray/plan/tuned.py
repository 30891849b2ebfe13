"""What `plan` says of --tune: memory and time, as a whole and a module at a time."""

from __future__ import annotations

import torch

from exl2ray.host import usable_memory_bytes
from exl2ray.model.spec import ModelSpec
from exl2ray.quant.memory import device_bytes
from exl2ray.tune.estimate import a_module_at_a_time, as_a_whole
from exl2ray.tune.memory import fits_whole
from exl2ray.tune.settings import passes_over_text
from exl2ray.units import parse_count
from exl2ray.wording import duration, file_size


def of_tuning(tokens: str, spec: ModelSpec, bitrates: int, device: torch.device | None) -> str:
    """A sentence. ``tokens``: of --tune, for each of ``bitrates``. device: that it will run on; None: not known."""
    count = parse_count(tokens, "--tune") * passes_over_text(spec.weights) * bitrates
    memory = usable_memory_bytes()
    whole, streamed = as_a_whole(spec, count), a_module_at_a_time(spec, count, memory)
    one = f"as a whole {file_size(whole.gpu_bytes)} of GPU memory and {duration(whole.seconds)}"
    other = f"a module at a time {file_size(streamed.gpu_bytes)} of it, {file_size(streamed.host_bytes)} of main memory"
    other += f", {file_size(streamed.file_bytes)} in files" if streamed.file_bytes else ""
    words = f"the time leaves out --tune {tokens}, which takes {one}, or {other} and {duration(streamed.seconds)}"
    if device is not None and device.type == "cuda" and torch.cuda.is_available():
        fits = fits_whole(spec, device_bytes(device))
        words += f"; here it is {'as a whole' if fits else 'a module at a time'}"
    return f"{words} (expected of an H200; smaller GPUs take longer)"
