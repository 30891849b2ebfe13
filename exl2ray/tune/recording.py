"""A step recorded once as a CUDA graph and replayed: the same kernels on the same numbers, without the host between them.

A step of a small model is 15 thousand launches, which take the host far longer than the GPU. The first step of a shape runs
as it is: what is compiled, loaded or worked out once is there before anything is recorded. What a recording reads and
changes (weights, latents, moments, rates) has to stay where it is. Nothing runs while it is recorded, so that after a failed
attempt the steps can go on as before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RecordedStep:
    """``step``: ids (R, T) on the device -> a result that stays on the device. ``wanted``: whether it may be recorded at all;
    `problem` says what came of it, if that was nothing."""

    def __init__(self, step: Callable[[Tensor], Tensor], wanted: bool) -> None:
        self._step, self._wanted = step, wanted
        self._warm: torch.Size | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids, self._result = torch.empty(0), torch.empty(0)
        self.problem = ""

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, ids: Tensor) -> Tensor:
        if self._graph is None and self._wanted and ids.shape == self._warm:
            self._record(ids)
        if self._graph is None or ids.shape != self._ids.shape:
            self._warm = ids.shape
            return self._step(ids)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._result.clone()

    def _record(self, ids: Tensor) -> None:
        torch.cuda.synchronize(ids.device)
        torch.cuda.empty_cache()  # the recording has memory of its own
        self._ids, graph = ids.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(ids.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self._step(self._ids)
        except RuntimeError as e:  # out of memory, or an operation that cannot be recorded
            self._wanted, self.problem = False, str(e).partition("\n")[0]
            torch.cuda.empty_cache()
            return
        self._graph = graph
