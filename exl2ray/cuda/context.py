"""The context of the first GPU, made by the driver alone while torch is imported, which will use the same one.

Making it takes some tenths of a second in which Python is not needed; importing torch takes seconds of little else.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress

from exl2ray.timeline import step


def begin(name: str) -> Callable[[], None]:
    """Makes it in a thread of this ``name``. What comes back is to be called where it is not used after all: it waits for the
    thread, and lets the context go. Nothing is raised: whoever uses the GPU hears what is wrong with it."""
    made: list[tuple[ctypes.CDLL, ctypes.c_int]] = []

    def make() -> None:
        with suppress(OSError, AttributeError), step("context of the GPU"):
            os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, and the driver reads it when it is begun
            driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
            if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
                return
            if not driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
                made.append((driver, device))

    def let_go() -> None:
        thread.join()
        while made:
            driver, device = made.pop()
            driver.cuDevicePrimaryCtxRelease_v2(device)

    thread = threading.Thread(target=make, name=name)
    thread.start()
    return let_go
