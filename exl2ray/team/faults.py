"""What can go wrong with a worker, as exceptions that cross process boundaries."""

from __future__ import annotations

from exl2ray.errors import ClusterError


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
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        where = "host" if isinstance(error, MemoryError) else "GPU"
        return WorkerOutOfMemory(
            f"the {where} ran out of memory: {text}",
            "close other programs, use a device with more memory, shorter rows (-l, -ml), or --quality reference",
        )
    if name in _DEVICE_ERRORS or "CUDA error" in text or "CUBLAS_STATUS" in text:
        return DeviceFailed(f"{name}: {text}", "see dmesg and nvidia-smi on that machine")
    return error
