"""Reading the tensors that will be needed next while the device is busy with the present ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import torch

from exl2ray.errors import Exl2RayError
from exl2ray.formats.hf import SourceModel


class TensorReader(Protocol):
    """What weights are read from: a model, one that is read ahead, or one that a group reads together."""

    @property
    def path(self) -> Path: ...
    def __contains__(self, name: object) -> bool: ...
    def load(self, name: str, rows: slice | None = None) -> torch.Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def where(self, name: str) -> str: ...


class Reading:
    """What stands in for a model where its tensors are loaded; what they are, the model says."""

    def __init__(self, source: SourceModel) -> None:
        self.source, self.path = source, source.path

    def where(self, name: str) -> str:
        return self.source.where(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> str:
        return self.source.dtype(name)

    def __contains__(self, name: object) -> bool:
        return name in self.source


class ReadAhead(Reading):
    """A SourceModel that can fetch tensors in background threads; `load` hands them out once and forgets them.

    Holds the tensors of the last `fetch` only: at most two modules beside the one in use.
    ``check(name, tensor)`` runs in the background too. What it raises comes up again when the tensor is read the plain way.
    ``allocate(n)``: (n,) uint8 to read into, say pinned memory; called from several threads.
    """

    def __init__(
        self,
        source: SourceModel,
        check: Callable[[str, torch.Tensor], None] | None = None,
        allocate: Callable[[int], torch.Tensor] | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(source)
        self._check, self._allocate = check, allocate
        self._checked: set[str] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._fetched: dict[str, Future[torch.Tensor]] = {}

    def fetch(self, names: Sequence[str]) -> None:
        """Starts reading whole tensors, in this order; what an earlier call fetched and is not among them is dropped."""
        for name in [n for n in self._fetched if n not in names]:
            self._fetched.pop(name).cancel()  # its memory is free before the first new one wants some
        for name in names:
            if name not in self._fetched and name in self.source:
                self._fetched[name] = self._pool.submit(self._read, name)

    def wait(self) -> None:
        """Until everything that was asked for has been read, or has failed."""
        wait(self._fetched.values())

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.source.load(name, allocate=self._allocate)
        if self._check is not None:
            self._check(name, tensor)
        return tensor

    def checked(self, name: str) -> bool:
        """Whether the tensor of this name that `load` gave last went through ``check``."""
        return name in self._checked

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """As `SourceModel.load`; errors of the background read are raised by reading again."""
        self._checked.discard(name)
        future = self._fetched.pop(name, None) if rows is None else None
        if future is None or future.cancelled():
            return self.source.load(name, rows)
        try:
            tensor = future.result()
        except (Exl2RayError, OSError, RuntimeError):
            return self.source.load(name)
        if self._check is not None:
            self._checked.add(name)
        return tensor
