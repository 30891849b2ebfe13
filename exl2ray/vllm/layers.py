"""Packed linears and heads inside vLLM's layers.

One layer of vLLM may hold several linears of the files (q, k and v): each stays a packed linear of its own, and the results
lie side by side. With tensor parallelism a rank keeps its columns, or the input features that are its own; see
`exl2ray.run.slices`. All that contradicts the model is refused as layers are made, before any weight is read.

torch.compile sees one operator, ``exl2ray::linear``, which finds the layer by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearMethodBase, QKVParallelLinear, RowParallelLinear

from exl2ray.errors import FormatError, UsageError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.layout import pad32
from exl2ray.formats.tensorfile import read_tensor
from exl2ray.run.linear import Exl2Linear
from exl2ray.run.slices import columns, rows
from exl2ray.vllm.files import PackedFiles
from exl2ray.vllm.surroundings import check_memory, check_nothing_left, ignore_index, single_norms

_layers: WeakValueDictionary[str, torch.nn.ModuleList] = WeakValueDictionary()


@dataclass(frozen=True)
class Part:
    """What a rank keeps of one linear of the files: columns first .. first + count as ``width``, and inputs, or all."""

    key: str
    first: int
    count: int
    width: int
    inputs: tuple[int, int] | None = None  # first, count


def run_parts(parts: torch.nn.ModuleList, x: Tensor) -> Tensor:
    """x (..., inputs) -> results of the parts side by side; a part cut along its inputs may take more, which are zero."""
    outputs: list[Tensor] = []
    for part in parts:
        assert isinstance(part, Exl2Linear)
        more = part.in_features - x.shape[-1]
        outputs.append(part(torch.nn.functional.pad(x, (0, more)) if more else x))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _linear(x: Tensor, name: str, columns: int) -> Tensor:
    return run_parts(_layers[name], x)


def _linear_shape(x: Tensor, name: str, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns)


torch.library.define("exl2ray::linear", "(Tensor x, str name, int columns) -> Tensor")
torch.library.impl("exl2ray::linear", "default", _linear)
torch.library.register_fake("exl2ray::linear", _linear_shape)


def read_part(files: PackedFiles, part: Part, device: torch.device) -> tuple[Exl2Linear, Tensor | None]:
    """A linear of the files, checked and cut, and its bias, which vLLM adds; cut on the device, where that is quick."""
    tensors = files.tensors()

    def get(name: str) -> Tensor | None:
        return read_tensor(tensors[name], error=FormatError) if name in tensors else None

    with torch.device("cpu"):
        try:
            p = PackedLinear.from_tensors(part.key, get)
        except FormatError as e:
            hint = f"fetch the model again; `exl2ray verify {files.root}` lists all that is wrong with it"
            raise FormatError(f"{files.root}: {e.message}", e.hint or hint) from e
        bias, whole = p.bias, part.first == 0 and pad32(part.width) == p.out_features
        p = PackedLinear(part.key, p.q_weight.to(device), *_moved(p, device))
    with torch.device(device):
        if not whole:
            p = columns(p, part.first, part.count, part.width)
        if part.inputs is not None:
            p = rows(p, *part.inputs)
    linear = Exl2Linear.from_packed(p, device, part.width)
    return linear, None if bias is None else bias[part.first : part.first + part.count]


def _moved(p: PackedLinear, device: torch.device) -> list[Tensor]:
    return [t.to(device) for t in (p.q_scale, p.q_scale_max, p.q_groups, p.q_invperm)]


class Exl2LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One layer of vLLM that consists of packed linears."""

    def __init__(self, files: PackedFiles, name: str, keys: list[str]) -> None:
        self.files, self.keys = files, keys
        self.name = f"{files.root}:{name}"
        self.parts: list[Part] = []
        self.device = torch.device("cpu")

    def create_weights(
        self, layer: torch.nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Decides what this rank keeps. Raises FormatError where the files contradict vLLM's layer."""
        if len(output_partition_sizes) != len(self.keys):
            raise FormatError(f"{self.name}: {len(output_partition_sizes)} parts in vLLM, {len(self.keys)} in the files")
        inputs = None
        if isinstance(layer, RowParallelLinear) and input_size_per_partition < input_size:
            inputs = (layer.tp_rank * input_size_per_partition, input_size_per_partition)
        for i, (key, size) in enumerate(zip(self.keys, output_partition_sizes, strict=True)):
            ranks, rank = 1, 0
            if isinstance(layer, ColumnParallelLinear):
                copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and i > 0 else 1
                ranks, rank = layer.tp_size // copies, layer.tp_rank // copies
            self.files.check(key, input_size, size * ranks, bool(layer.has_bias))
            self.parts.append(Part(key, rank * size, size, size, inputs))
        self._prepare()

    def _prepare(self) -> None:
        self.device = torch.empty(0).device  # that of the model being made
        check_memory(self.files, self.device, get_current_vllm_config())
        ignore_index(self.files.root)
        single_norms(self.files)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Reads the packed tensors of this rank from the files, onto the device."""
        if hasattr(layer, "exl2"):
            return
        check_nothing_left(self.files)
        linears, biases = zip(*(read_part(self.files, part, self.device) for part in self.parts), strict=True)
        layer.exl2 = _layers[self.name] = torch.nn.ModuleList(linears)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            bias.data.copy_(torch.cat(biases))

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.exl2ray.linear(x, self.name, sum(part.width for part in self.parts))
        return y if bias is None else y + bias


class Exl2HeadMethod(Exl2LinearMethod):
    """A packed head; where vLLM ties the head to the embedding, it keeps its own matrix."""

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """The rank's part of the vocabulary, with columns behind it, since ranks have equal widths; vLLM drops them."""
        (key,), at = self.keys, layer.shard_indices
        self.files.check(key, layer.embedding_dim, layer.org_vocab_size, layer.has_bias)
        count = at.org_vocab_end_index - at.org_vocab_start_index
        self.parts = [Part(key, at.org_vocab_start_index, count, layer.num_embeddings_per_partition)]
        if layer.num_added_embeddings:
            raise UsageError(f"{key}: the model has {layer.num_added_embeddings} words more than the file")
        self._prepare()

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        return layer
