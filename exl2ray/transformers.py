"""EXL2 models in Hugging Face transformers: ``import exl2ray.transformers``, then ``from_pretrained`` loads them.

Importing registers the quantisation method "exl2", which is what config.json of an EXL2 model names, whatever wrote it.
Everything else is plain transformers: ``device_map``, ``generate``, caches, adapters, ``save_pretrained``. ``exl2ray with
PROGRAM`` does the import for programs that do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from exl2ray.errors import UsageError
from exl2ray.formats.exl2 import linear_keys
from exl2ray.formats.tensorfile import TensorInfo
from exl2ray.run.directory import headers, local_directory, sound_files
from exl2ray.run.linear import Exl2Linear, check_device
from exl2ray.run.modules import Exl2Experts, insert_linears
from exl2ray.run.names import TEXT_MODEL
from exl2ray.run.norms import insert_norms
from exl2ray.wording import file_size

SPARSE = ".block_sparse_moe."  # what Mixtral's files call an mlp of experts
logger = logging.get_logger(__name__)


@register_quantization_config("exl2")
class Exl2Config(QuantizationConfigMixin):
    """``quantization_config`` of config.json, kept as it is."""

    def __init__(self, quant_method: str = "exl2", **settings: Any) -> None:
        self.__dict__.update(settings, quant_method=quant_method)


@register_quantizer("exl2")
class Exl2Quantizer(HfQuantizer):
    """Builds the packed modules before transformers loads tensors into them by name."""

    requires_calibration = True  # transformers refuses to make such a model: `exl2ray convert` does

    def __init__(self, quantization_config: Exl2Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[Path] = []
        self._device_map: Any = None
        self._routed = False  # whether it is a mixture of experts
        self._types: dict[str, torch.dtype] = {}  # of parameters, as transformers makes them
        self._sparse_prefix = False  # whether this transformers renames experts only as it merges them
        self._text_prefix = False  # whether names in the files begin as those of the text part of a larger model

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        self._device_map = device_map
        for device in _gpus(device_map):
            check_device(device)

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the config before files are looked for; not by the first releases of transformers 5."""
        return self._with_files(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Called with the config before files are looked for; by no release from 5.23 on."""
        return self._with_files(config)

    def _with_files(self, config: Any) -> Any:
        """The config with the first file of the model: EXL2 files have names of their own, and no index.

        Checks the directory as ``exl2ray verify`` does, so that broken models are refused before anything is loaded.
        """
        name = getattr(config, "name_or_path", "")
        if self._files or not name:  # a config that comes from nowhere
            return config
        root = local_directory(name, getattr(config, "_commit_hash", None))
        self._files = sound_files(root)
        config.transformers_weights = self._files[0].name
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.float16, torch.bfloat16) and _gpus(self._device_map):
            logger.warning_once(f"EXL2 linears take float16 or bfloat16 on a GPU: float16 in place of {dtype}")
            return torch.float16
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of packed linears keep their types, whatever types the model's modules are to have."""
        names = getattr(converter, "target_patterns", [])
        if any(name.rpartition(".")[2].startswith("q_scale_max") for name in names):
            return None
        wanted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return wanted

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        if checkpoint_files is None:
            raise UsageError("an EXL2 model is loaded from its files, not from a state_dict")
        if self._files:  # transformers found the first of them; it reads those that stand in this list
            checkpoint_files[:] = [str(Path(checkpoint_files[0]).parent / f.name) for f in self._files]
        tensors = headers([Path(file) for file in checkpoint_files])
        _check_memory(tensors, self._device_map)
        text_only = not any("language_model" in name for name, _ in model.named_children()) and not hasattr(
            getattr(model, model.base_model_prefix, None), "language_model"
        )
        self._text_prefix = text_only and any(name.startswith(TEXT_MODEL) for name in tensors)
        modules = [name for name, _ in model.named_modules()]
        left = [name for name in map(_renaming(model, self), linear_keys(tensors)) if SPARSE in name]
        self._sparse_prefix = bool(left) and not any(SPARSE in f"{name}." for name in modules)
        renamed = _renaming(model, self)
        placed = insert_linears(model, tensors, renamed)
        insert_norms(model, tensors, renamed)
        self._types = {name: p.dtype for name, p in model.named_parameters()}
        self._routed = any(isinstance(module, Exl2Experts) for module in model.modules())
        _untie(model, placed)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Names of a text model that EXL2 has as the text part of another one (Gemma 3), and of Mixtral's experts, which the
        first releases of transformers 5 rename only as they merge them."""
        from transformers.core_model_loading import WeightRenaming

        prefix = "^" + TEXT_MODEL.replace(".", r"\.")
        pairs = ((rf"{prefix}model\.", "model."), (f"{prefix}lm_head", "lm_head"))
        found = [WeightRenaming(a, b) for a, b in pairs] if self._text_prefix else []
        return [*found, *([WeightRenaming(SPARSE, ".mlp.")] if self._sparse_prefix else [])]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if _release() < (5, 19) and any(isinstance(m, Exl2Linear) and m.q_weight.is_meta for m in model.modules()):
            raise UsageError("offload_buffers: transformers 5.0 loses buffers that it offloads", "transformers 5.19 or later")
        for name, parameter in model.named_parameters():
            wanted = self._types.get(name, parameter.dtype)
            if parameter.dtype != wanted and parameter.dtype != torch.float32 and not parameter.is_meta:
                # transformers 5.0 to 5.19 leave the type of the file to tensors that they rename
                parameter.data = parameter.data.to(wanted)
        if hasattr(model.config, "transformers_weights"):  # of these files; those of save_pretrained have other names
            del model.config.transformers_weights
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decoding with a static cache: experts look at routing on the host."""
        return not self._routed

    @property
    def is_trainable(self) -> bool:
        return True  # adapters: gradients pass through packed linears to what is in front of them


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers_version.split(".")[:2])


def _gpus(device_map: Any) -> list[torch.device]:
    """GPUs that a device map names; those there are for "auto" and its like."""
    if device_map is None or not torch.cuda.is_available():
        return []
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    found = [torch.device("cuda", p) if isinstance(p, int) else torch.device(p) for p in places if p != "disk"]
    return list({d for d in found if d.type == "cuda"})


def _check_memory(tensors: dict[str, TensorInfo], device_map: Any) -> None:
    """Raises UsageError if the model is to go onto one GPU that cannot hold its weights."""
    gpus = _gpus(device_map)
    whole = isinstance(device_map, (str, int, torch.device)) or (isinstance(device_map, dict) and list(device_map) == [""])
    if len(gpus) != 1 or not whole or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    needed = sum(info.nbytes for info in tensors.values())
    free, total = torch.cuda.mem_get_info(gpus[0])
    if needed > free:
        raise UsageError(
            f"the model has {file_size(needed)} of weights; {gpus[0]} has {file_size(free)} free of {file_size(total)}",
            'several GPUs: device_map="auto"; otherwise a model with fewer bits per weight',
        )


def _renaming(model: Any, quantizer: Exl2Quantizer) -> Any:
    """Name of a linear in the files -> name of the module, as transformers renames the weights of this family."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [x for x in get_model_conversion_mapping(model, None, quantizer) if isinstance(x, WeightRenaming)]
    state = model.state_dict()

    def renamed(key: str) -> str:
        name: str = rename_source_key(f"{key}.weight", renamings, [], model.base_model_prefix, state)[0]
        return name.removesuffix(".weight")

    return renamed


def _untie(model: Any, placed: set[str]) -> None:
    """A packed head has a matrix of its own, though the source shares that of the embedding."""
    tied = [t for t, s in model.all_tied_weights_keys.items() if {t.rpartition(".")[0], s.rpartition(".")[0]} & placed]
    for name in tied:
        del model.all_tied_weights_keys[name]
    if tied:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
