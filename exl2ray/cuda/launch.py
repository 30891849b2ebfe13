"""Launching Numba kernels on torch tensors without Numba's dispatcher.

``kernel[grid, block, stream](*args)`` finds out the type of every argument and packs all of them anew: 40 to 100 us with the
ten or more arrays of our kernels, several times what a kernel itself takes. Here types and parameters are worked out once
per `Launch`, and a launch is a single call of the CUDA driver. A kernel still comes from Numba, with its cache on disk.

How Numba passes arguments (its calling convention for device arrays, the same in all versions that pyproject allows): an
array as null, null, its number of elements, the size of one, the address, the shape, the strides in bytes, eight bytes
each; integers as int64, floats as float32, booleans as one byte. Where a version of numba-cuda has moved the handle of a
compiled kernel, and under the simulator, the ordinary launch is used.

Measured: 138 us for a launch with three arrays through the dispatcher, 7 us from here. That made CUDA graphs needless for
large batches. Since it relies on how Numba passes arrays, numba-cuda is bounded in pyproject, and a test on GPUs compares
it with the ordinary launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda, types
from torch import Tensor

NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
Grid = int | tuple[int, ...]
NUMBA_TYPES = {
    torch.float16: types.float16,
    torch.float32: types.float32,
    torch.uint8: types.uint8,
    torch.int16: types.int16,
    torch.int32: types.int32,
    torch.int64: types.int64,
}


class _Vary:
    """Stands for an integer that is given at every launch."""


VARY = _Vary()


def wrap(t: Tensor) -> Any:
    """A Numba view of a tensor: the device array, or the NumPy array under the simulator."""
    return cuda.as_cuda_array(t) if t.is_cuda else t.numpy()


def stream_of(t: Tensor) -> int:
    """Handle of torch's current stream on the tensor's device; 0 under the simulator."""
    return int(torch.cuda.current_stream(t.device).cuda_stream) if t.is_cuda else 0


def launch(kernel: Any, grid: Grid, block: int, *args: Any) -> None:
    """Runs ``kernel`` once, on torch's current stream of the device of its tensors."""
    tensor = next(a for a in args if isinstance(a, Tensor))
    Launch(kernel, grid, block, *args)(stream_of(tensor))


class Launch:
    """A kernel with its arguments: tensors, numbers, and ``VARY`` for integers that change from launch to launch.

    The tensors are kept alive. Launching raises RuntimeError with the driver's code, as torch does for its own kernels.
    """

    def __init__(self, kernel: Any, grid: Grid, block: int, *args: Any) -> None:
        self._kernel, self._grid, self._block, self._args = kernel, grid, block, list(args)
        grid = (grid,) if isinstance(grid, int) else grid
        self._shape = (*grid, *(1,) * (3 - len(grid)), block, 1, 1)
        self._device = next((a.device.index for a in args if isinstance(a, Tensor) and a.is_cuda), None)
        self._function = 0 if self._device is None else _function(kernel, tuple(map(_kind_of, args)), self._device)
        if self._function:
            self._prepare()

    def _prepare(self) -> None:
        cells: list[Any] = []
        self._varying: list[Any] = []
        self._addresses: dict[int, Any] = {}
        for place, a in enumerate(self._args):
            if isinstance(a, Tensor):
                size = a.element_size()
                fields = (0, 0, a.numel(), size, a.data_ptr(), *a.shape, *(s * size for s in a.stride()))
                cells.extend(map(ctypes.c_int64, fields))
                self._addresses[place] = cells[len(cells) - len(fields) + 4]
            elif isinstance(a, bool):
                cells.append(ctypes.c_uint8(a))
            elif isinstance(a, np.float32):
                cells.append(ctypes.c_float(float(a)))
            else:
                cells.append(ctypes.c_int64(0 if a is VARY else a))
                if a is VARY:
                    self._varying.append(cells[-1])
        self._cells = cells
        self._parameters = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))

    def __call__(self, stream: int, *values: int) -> None:
        """Launches on the stream of this handle, with the values of the arguments that vary, in order."""
        if 0 in self._shape:  # no elements
            return
        if self._device is not None and self._device != torch.cuda.current_device():
            with torch.cuda.device(self._device):  # a model may lie on several GPUs; the driver launches on the current one
                self(stream, *values)
            return
        if not self._function:
            self._call_numba(stream, values)
            return
        for cell, value in zip(self._varying, values, strict=True):
            cell.value = value
        status = _driver().cuLaunchKernel(self._function, *self._shape, 0, stream, self._parameters, None)
        if status == NO_CONTEXT:  # a thread that did nothing with CUDA yet
            torch.cuda.mem_get_info(self._device)
            status = _driver().cuLaunchKernel(self._function, *self._shape, 0, stream, self._parameters, None)
        if status:
            raise RuntimeError(f"CUDA error {status} at the launch of {self._kernel.py_func.__name__}")

    def point(self, place: int, tensor: Tensor) -> None:
        """Another tensor for the argument at this place, of the same dtype, device, row length and contiguity.

        Its number of rows is not handed over, and the caller keeps it alive until the launch.
        """
        if self._function:
            self._addresses[place].value = tensor.data_ptr()
        else:
            self._args[place] = tensor

    def _call_numba(self, stream: int, values: Sequence[int]) -> None:
        given = iter(values)
        args = [wrap(a) if isinstance(a, Tensor) else next(given) if a is VARY else a for a in self._args]
        self._kernel[self._grid, self._block, cuda.external_stream(stream) if stream else 0](*args)


Kind = tuple[torch.dtype, int, bool] | type  # what Numba's type of an argument depends on


def _kind_of(a: Any) -> Kind:
    return (a.dtype, a.ndim, a.is_contiguous()) if isinstance(a, Tensor) else type(a)


def _numba_type(kind: Kind) -> Any:
    if isinstance(kind, tuple):
        dtype, dimensions, contiguous = kind
        return types.Array(NUMBA_TYPES[dtype], dimensions, "C" if contiguous else "A")
    if kind is bool:
        return types.boolean
    return types.float32 if kind is np.float32 else types.int64


@cache
def _function(kernel: Any, kinds: tuple[Kind, ...], device: int) -> int:
    """Handle of the compiled kernel on this GPU for the driver; 0 if this version of numba-cuda hides it."""
    with torch.cuda.device(device):  # Numba loads kernels into the current one
        return _loaded(kernel, tuple(map(_numba_type, kinds)))


def _loaded(kernel: Any, argument_types: tuple[Any, ...]) -> int:
    compiled = kernel.overloads.get(argument_types) or kernel.compile(argument_types)
    try:
        compiled.bind()
        found = compiled._codelibrary.get_cufunc()
        handle = getattr(found, "kernel", found)  # a cuda.core kernel, or the wrapper of earlier versions
        return int(getattr(handle, "_handle", None) or handle.handle)
    except (AttributeError, TypeError, ValueError):
        return 0


@cache
def _driver() -> Any:
    """The CUDA driver's library."""
    library = ctypes.CDLL("libcuda.so.1")
    integers = [ctypes.c_uint] * 7
    library.cuLaunchKernel.argtypes = [ctypes.c_void_p, *integers, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.cuLaunchKernel.restype = ctypes.c_int
    return library
