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
from math import prod
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, overload

import torch
from torch import Tensor

from exl2ray.store.faults import translated
from exl2ray.store.fs import temp_name
from exl2ray.tune.module import TunedModule

T = TypeVar("T")
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
        shapes = {name: tuple(t.shape) for name, t in state.items()}
        count = sum(prod(shape) for shape in shapes.values())
        whole = self._memory(count) if 4 * count <= self._room else self._mapped(count)
        parts = torch.split(whole, [prod(shape) for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def _memory(self, count: int) -> Tensor:
        self._room -= 4 * count
        return torch.empty(count, pin_memory=torch.cuda.is_available())

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


def _is_latent(name: str) -> bool:
    return name.startswith(NOW) and name.endswith(LATENTS)
