"""What is around an EXL2 model in vLLM: room on the GPU, files that vLLM reads, linears that it has no place for."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from exl2ray.errors import FormatError, UsageError
from exl2ray.run.norms import HEAD_NORM, single_row
from exl2ray.vllm.files import PackedFiles
from exl2ray.wording import file_size

logger = logging.getLogger("vllm.exl2ray")  # below vLLM's own, which are the ones that it shows


def check_memory(files: PackedFiles, device: torch.device, vllm_config: Any) -> None:
    """Raises UsageError if the packed weights of a rank do not fit on its GPU, whatever else is to go there."""
    if device.type != "cuda":
        return
    packed = sum(t.nbytes for n, t in files.tensors().items() if n.rpartition(".")[2].startswith("q_"))
    ranks = vllm_config.parallel_config.tensor_parallel_size * vllm_config.parallel_config.pipeline_parallel_size
    free, total = torch.cuda.mem_get_info(device)
    if packed / ranks > free:
        raise UsageError(
            f"the model has {file_size(packed)} of packed weights for {ranks} GPUs; {device} has {file_size(free)} free "
            f"of {file_size(total)}",
            "more of them: --tensor-parallel-size; otherwise a model with fewer bits per weight",
        )


def check_nothing_left(files: PackedFiles) -> None:
    """Called when all layers are made. Raises FormatError if packed linears of the files have no place in vLLM's model.

    A head may have none: some families of vLLM know no head but the embedding. It is left out, with a warning.
    """
    from vllm.distributed import get_pp_group

    left = files.left()
    if not left or get_pp_group().world_size > 1:
        return
    if all(key.endswith("lm_head") for key in left):
        files.claimed.update(left)
        logger.warning("This model of vLLM takes the embedding for its head: %s of the file is not used", ", ".join(left))
        return
    raise FormatError(f"{files.root}: vLLM's model has no place for {len(left)} packed linears, first {left[0]}")


def single_norms(files: PackedFiles) -> None:
    """Lets vLLM read one row of norms of heads, as its models have it, where the files repeat it for each head."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = getattr(DefaultModelLoader, "_get_weights_iterator", None)
    if original is None or files.norms_apart:
        return
    sources = getattr(original, "exl2_sources", None)
    if sources is not None:
        sources.add(files.source)
        return

    @functools.wraps(original)
    def tensors(self: Any, source: Any) -> Any:
        for name, tensor in original(self, source):
            repeated = source.model_or_path in tensors.exl2_sources and tensor.dim() == 2 and HEAD_NORM.fullmatch(name)  # type: ignore[attr-defined]
            yield name, single_row(name, tensor) if repeated else tensor

    tensors.exl2_sources = {files.source}  # type: ignore[attr-defined]
    DefaultModelLoader._get_weights_iterator = tensors


def ignore_index(root: Path | None) -> None:
    """Lets vLLM read all safetensors files of the folder, not those that an index names.

    ExLlamaV2 copies the source's index, which does not describe the weights that are there, and vLLM would miss its files.
    """
    from vllm.model_executor.model_loader import default_loader

    original = getattr(default_loader, "filter_duplicate_safetensors_files", None)
    if root is None or original is None:
        return
    roots = getattr(original, "exl2_roots", None)
    if roots is not None:
        roots.add(root.resolve())
        return

    @functools.wraps(original)
    def all_files(files: list[str], folder: str, index: str) -> Any:
        return files if Path(folder).resolve() in all_files.exl2_roots else original(files, folder, index)  # type: ignore[attr-defined]

    all_files.exl2_roots = {root.resolve()}  # type: ignore[attr-defined]
    default_loader.filter_duplicate_safetensors_files = all_files
