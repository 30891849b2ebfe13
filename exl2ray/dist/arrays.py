"""Hidden states on their way through Ray's object store.

A 2-byte tensor travels as an int16 NumPy array: it is written with one copy and read without any, which is several times
faster than pickling the tensor. What arrives is shared memory and must not be written to.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Shipped:
    """(states as an array, name of their dtype). A class, so that Ray treats the array inside as a buffer of its own."""

    def __init__(self, array: Any, dtype: str) -> None:
        self.array, self.dtype = array, dtype


def to_shipped(t: Tensor) -> Shipped:
    """Copy of a tensor, from any device."""
    host = t.detach()
    if host.is_cuda:
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
        pinned.copy_(host)
        host = pinned
    host = host.contiguous()
    name = str(host.dtype).removeprefix("torch.")
    return Shipped((host.view(torch.int16) if host.element_size() == 2 else host).numpy(), name)


def from_shipped(s: Shipped, device: torch.device) -> Tensor:
    """A tensor of one's own on ``device``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array is read-only, and so is what we do with the view
        view = torch.from_numpy(s.array)
    t = view.view(_DTYPES[s.dtype])
    return t.to(device) if device.type != "cpu" else t.clone()
