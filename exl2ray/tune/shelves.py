"""Modules that are loaded when their turn comes, and where latents and moments are meanwhile.

A step goes through the modules one after another, forward and back, so the device need not hold more than one: its weights,
what is trained of it, its gradients. Source and start are read from their files again; what changes (12 bytes for a weight)
lies in main memory as far as it has room, and beyond in files that are mapped into it. On a CPU Adam moves the tensors where
they lie. The numbers are those of a model that is on the device as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, overload

import torch
from torch import Tensor

from exl2ray.store.faults import translated
from exl2ray.store.fs import temp_name
from exl2ray.tune.module import TunedModule

T = TypeVar("T")
BLOCK = 1 << 29  # numbers in a block of memory at most: 2 GiB, a dozen matrices of a 7B model
NOW, LATENTS = "now/", ".latents"  # begin and end the names of latents in `TunedModule.state`


class Shelf(Sequence[T], Generic[T]):
    """``count`` items, each made by ``make`` when it is asked for; the last one is kept."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make
        self._index = -1
        self._item: T | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            numbers = range(self._count)[index]
            return Shelf(len(numbers), lambda i: self[numbers[i]])
        index = range(self._count)[index]
        if index != self._index or self._item is None:
            self._item = None  # before the next one takes memory
            self._item, self._index = self._make(index), index
        return self._item

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(self._count))


class Homes:
    """What is trained of each module (`TunedModule.state`), and what other workers have made of the rest of it, while the
    module is not there.

    memory_bytes: of main memory that may be used; what is beyond lies in ``folder``, in files without a name, which go with
    this process.
    """

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._folder, self._room = folder, memory_bytes
        self._states: dict[str, dict[str, Tensor]] = {}
        self._others: dict[str, dict[str, Tensor]] = {}
        self._block, self._largest = torch.empty(0), 0
        self.file_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._states

    @torch.no_grad()
    def keep(self, module: TunedModule) -> None:
        """Takes up what a module has come to."""
        state = module.state()
        mine = self._states.get(module.key)
        if mine is None:
            mine = self._states[module.key] = self._allocated(state)
        for name, tensor in state.items():
            mine[name].copy_(tensor, non_blocking=mine[name].is_pinned())
        self._others[module.key] = {name: leaf.detach().cpu().clone() for name, leaf in module.of_others().items()}

    @torch.no_grad()
    def back(self, module: TunedModule, steps: int) -> None:
        """Gives a module that has its latents the rest of what was kept of it after ``steps`` steps, and keeps what comes of
        it. Moments are two thirds of that and come when there is a step to take: the way forward needs none."""
        state = self._states[module.key]
        deltas = {n: t for n, t in state.items() if n.startswith(NOW) and not _is_latent(n)}
        module.take(deltas, self._others[module.key], steps)
        module.updating, module.updated = self._with_moments, self.keep

    def _with_moments(self, module: TunedModule) -> None:
        kept = self._states[module.key]
        for name, tensor in module.state().items():
            if not name.startswith(NOW):
                tensor.copy_(kept[name], non_blocking=True)

    def state(self, key: str) -> dict[str, Tensor]:
        """What was kept of a module, for the host to read."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory are not waited for
        return self._states[key]

    def latents(self, key: str) -> dict[str, Tensor]:
        """Of the linears of a module that this worker owns, by linear."""
        return {n[len(NOW) : -len(LATENTS)]: t for n, t in self._states[key].items() if _is_latent(n)}

    def _allocated(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._place(t.numel()).view(t.shape) for name, t in state.items()}

    def _place(self, count: int) -> Tensor:
        """Room for ``count`` numbers, in the block in hand, in a new one or in a file."""
        if count > len(self._block):
            size = next((n for n in (self._next_block(count), _power_of_two(count)) if 4 * n <= self._room), 0)
            if not size:
                return self._mapped(count)
            self._room -= 4 * size
            self._block, self._largest = torch.empty(size, pin_memory=torch.cuda.is_available()), size
        found, self._block = self._block[:count], self._block[count:]
        return found

    def _next_block(self, count: int) -> int:
        """Numbers in the next one: torch rounds page-locked memory up to powers of two, and what is larger wastes less."""
        return max(_power_of_two(count), min(2 * self._largest, BLOCK))

    def _mapped(self, count: int) -> Tensor:
        self.file_bytes += 4 * count
        with translated("write", str(self._folder)), self._nameless() as file:
            os.posix_fallocate(file.fileno(), 0, 4 * count)  # a full disk is told now, and not by a signal later
            return torch.from_file(file.name, shared=True, size=count, dtype=torch.float32)

    @contextmanager
    def _nameless(self) -> Iterator[BinaryIO]:
        """A file that has a name while somebody maps it; what a kill leaves is known as temporary (`Store.sweep`)."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / temp_name()
        with open(path, "xb+") as file:
            try:
                yield file
            finally:
                path.unlink()


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _is_latent(name: str) -> bool:
    return name.startswith(NOW) and name.endswith(LATENTS)
