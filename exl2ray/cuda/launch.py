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
import threading
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
    """Runs ``kernel`` once, on torch's current stream of the device of its tensors.

    Parameters of the same types are filled in again, by each thread in its own: to make them takes 70 us, and a layer of 128
    experts has five thousand such launches.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    tensor = next((t for t in tensors if t.is_cuda), tensors[0])
    key = (kernel, block, tensor.device.index, tuple(map(_kind_of, args)))
    known: dict[Any, Launch] = _made.__dict__.setdefault("launches", {})
    found = known.get(key)
    if found is None:
        found = Launch(kernel, grid, block, *args)
        if found.direct:
            known[key] = found
    else:
        found.fill(grid, args)
    try:
        found(stream_of(tensor))
    finally:
        found.let_go()


_made = threading.local()


class Launch:
    """A kernel with its arguments: tensors, numbers, and ``VARY`` for integers that change from launch to launch.

    The tensors are kept alive. Launching raises RuntimeError with the driver's code, as torch does for its own kernels.
    """

    def __init__(self, kernel: Any, grid: Grid, block: int, *args: Any) -> None:
        self._kernel, self._grid, self._block, self._args = kernel, grid, block, list(args)
        self._shape = _shape(grid, block)
        self._device = next((a.device.index for a in args if isinstance(a, Tensor) and a.is_cuda), None)
        self._function = 0 if self._device is None else _function(kernel, tuple(map(_kind_of, args)), self._device)
        if self._function:
            self._prepare()

    @property
    def direct(self) -> bool:
        """Whether it goes around Numba's dispatcher."""
        return bool(self._function)

    def _prepare(self) -> None:
        self._cells = [[_cell(a)(v) for v in _fields(a)] for a in self._args]
        self._varying = [cells[0] for cells, a in zip(self._cells, self._args, strict=True) if a is VARY]
        flat = [cell for cells in self._cells for cell in cells]
        self._parameters = (ctypes.c_void_p * len(flat))(*map(ctypes.addressof, flat))

    def fill(self, grid: Grid, args: Sequence[Any]) -> None:
        """Another grid, and other arguments of the same kinds (`_kind_of`)."""
        self._grid, self._shape, self._args = grid, _shape(grid, self._block), list(args)
        for cells, a in zip(self._cells, args, strict=True):
            for cell, value in zip(cells, _fields(a), strict=True):
                cell.value = value

    def let_go(self) -> None:
        """Of the tensors, which a launch that is filled anew does not need."""
        self._args = []

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
            self._cells[place][_ADDRESS].value = tensor.data_ptr()
        else:
            self._args[place] = tensor

    def _call_numba(self, stream: int, values: Sequence[int]) -> None:
        given = iter(values)
        args = [wrap(a) if isinstance(a, Tensor) else next(given) if a is VARY else a for a in self._args]
        self._kernel[self._grid, self._block, cuda.external_stream(stream) if stream else 0](*args)


_ADDRESS = 4  # its place among the fields of an array


def _fields(a: Any) -> tuple[Any, ...]:
    """The parameters that an argument becomes."""
    if isinstance(a, Tensor):
        size = a.element_size()
        return (0, 0, a.numel(), size, a.data_ptr(), *a.shape, *(s * size for s in a.stride()))
    return (float(a) if isinstance(a, np.float32) else 0 if a is VARY else a,)


def _cell(a: Any) -> Any:
    """The C type of its fields."""
    return ctypes.c_uint8 if isinstance(a, bool) else ctypes.c_float if isinstance(a, np.float32) else ctypes.c_int64


def _shape(grid: Grid, block: int) -> tuple[int, ...]:
    """Blocks in three dimensions, threads of a block in three."""
    grid = (grid,) if isinstance(grid, int) else grid
    return (*grid, *(1,) * (3 - len(grid)), block, 1, 1)


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
