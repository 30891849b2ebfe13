"""What vLLM asks about an EXL2 model: which of its layers are quantised, and by which linears of the files.

Packed tensors do not pass through vLLM's stream of weights: `layers.py` reads them from the files, checked, cut and put on
the device one linear after the other, and the stream is told to leave them out. So a merged layer of vLLM may have parts of
different shapes and widths, models that share a matrix between embedding and head can have a packed head of their own, and
what a family's loader makes of names and biases is no matter. Tried first: empty parameters with loaders of their own, which
each family's loader has to find (vLLM takes a name in .q_scale for that of a key-value cache).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class Exl2Config(QuantizationConfig):  # type: ignore[misc]  # of a package that need not be installed
    """The quantisation of one EXL2 model; ``files``: set before vLLM starts the processes that load it."""

    _ignore_unexpected_suffixes = ()  # those of vLLM hide scales

    def __init__(self) -> None:
        super().__init__()
        self.files: Any = None

    def get_name(self) -> str:
        return "exl2"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations: on GPUs the kernels take halves only."""
        from vllm.platforms import current_platform

        return [torch.float16, torch.bfloat16, *([torch.float32] if current_platform.is_cpu() else [])]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # CUDA 13, whose compiler numba uses, begins there

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is part of config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Exl2Config:
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called before any process of vLLM loads the model. Raises FormatError for what ``exl2ray verify`` refuses."""
        from exl2ray.run.directory import local_directory
        from exl2ray.vllm.files import PackedFiles

        self.files = PackedFiles.opened(local_directory(model_name, revision), model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM's model may have other names for its modules than the files."""
        names = [hf_to_vllm_mapper.apply_list([f"{name}.weight"]) or [f"{name}.weight"] for name in self.files.names]
        self.files.rename([name.removesuffix(".weight") for (name,) in names])

    @staticmethod
    def get_cache_scale_mapper() -> Any:
        """EXL2 files have no scales of key-value caches, which vLLM sees in q_scale."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()

    def get_checkpoint_weight_mapper(self) -> Any:
        """Leaves packed tensors, and biases of packed linears, out of the stream of weights.

        Asked for when all layers are made and no weight is read. Raises FormatError if a packed linear has no place.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        from exl2ray.vllm.surroundings import check_nothing_left

        check_nothing_left(self.files)
        renamed = {self.files.prefix: ""} if self.files.prefix else {}
        dropped = {re.compile(p): None for p in self.files.patterns()}
        return WeightsMapper(orig_to_new_regex=dropped, orig_to_new_prefix=renamed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; None or vLLM's own where the files have it unquantised."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if isinstance(layer, RoutedExperts):
            name = prefix.removesuffix(".routed_experts")
            if not self.files.has_experts(name):
                return None
            from exl2ray.vllm.experts import Exl2ExpertsMethod

            return Exl2ExpertsMethod(self.files, layer, name)
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            keys = self.files.parts(prefix, self.packed_modules_mapping)
            if keys:
                from exl2ray.vllm.layers import Exl2HeadMethod, Exl2LinearMethod

                made = Exl2HeadMethod if isinstance(layer, ParallelLMHead) else Exl2LinearMethod
                return made(self.files, prefix, keys)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
