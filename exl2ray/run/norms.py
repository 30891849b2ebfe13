"""Norms of query and key heads: one weight for all heads in the source, repeated for each of them in EXL2 files.

ExLlamaV2 wants (heads, head_dim), and equal rows in it for every family but Cohere, whose source has a row for each head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from exl2ray.errors import FormatError
from exl2ray.formats.tensorfile import TensorInfo, read_tensor

HEAD_NORM = re.compile(r".*\.[qk]_norm\.weight")


def single_row(name: str, weight: Tensor) -> Tensor:
    """The weight (head_dim,) of all heads. Raises FormatError if rows of (heads, head_dim) differ."""
    if not torch.equal(weight, weight[:1].expand_as(weight)):
        raise FormatError(f"{name}: its {weight.shape[0]} rows differ; this model has one norm for all heads")
    return weight[0]


class RepeatedNorm(torch.nn.Module):
    """Stands for a norm of the model; ``weight`` (heads, head_dim) is that of the files."""

    def __init__(self, norm: torch.nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._norm = (norm,)  # a tuple is no submodule: its own weight is not loaded
        self.weight = torch.nn.Parameter(torch.empty(shape, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """What the norm makes of x with the one weight that it expects."""
        y: Tensor = torch.func.functional_call(self._norm[0], {"weight": self.weight[0]}, (x,))
        return y


def insert_norms(model: torch.nn.Module, tensors: Mapping[str, TensorInfo], renamed: Callable[[str], str]) -> None:
    """Replaces norms of heads that have rows for all heads in the files, and one in ``model``; see `insert_linears`.

    Raises FormatError if rows differ, which the files tell: what is offloaded to a disk has no values in the model.
    """
    modules = dict(model.named_modules())
    for name, info in tensors.items():
        norm = modules.get(renamed(name.removesuffix(".weight"))) if HEAD_NORM.fullmatch(name) else None
        weight = getattr(norm, "weight", None)
        if norm is not None and weight is not None and weight.dim() == 1 and len(info.shape) == 2:
            with torch.device("cpu"):  # transformers makes models on the meta device
                single_row(name, read_tensor(info, error=FormatError))
            model.set_submodule(renamed(name.removesuffix(".weight")), RepeatedNorm(norm, info.shape))
