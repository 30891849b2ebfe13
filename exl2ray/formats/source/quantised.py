"""Models that are quantised already: which way, and to how many bits.

The tensors decide, since config.json is often out of date: a model that was trained on quantised weights and merged is saved
in bfloat16 with the old ``quantization_config``. What config.json says gives the name and the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from exl2ray.formats.hfconfig import levels
from exl2ray.formats.source.folder import Folder
from exl2ray.formats.tensorfile import TensorInfo

LABELS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
# Ends of names that only one way of quantising has; of several that apply, the first counts.
MARKS = (
    (".q_weight", "exl2"),
    (".trellis", "exl3"),
    (".qzeros", "gptq"),
    (".qweight", "gptq"),
    (".bitsandbytes__nf4", "bitsandbytes"),
    (".bitsandbytes__fp4", "bitsandbytes"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".W_q", "hqq"),
    (".codebooks", "aqlm"),
    (".centroids.weight", "vptq"),
    (".Qidxs", "quip"),
    (".dense_weights", "spqr"),
    ("._data", "quanto"),
    (".weight_scales", "eetq"),
    ("qdata", "torchao"),
    (".weight_global_scale", "nvfp4"),
    (".weight_scale_2", "nvfp4"),
    (".weight_packed", "compressed-tensors"),
)
INTEGERS = {"I8": "8-bit integers", "U8": "packed bytes", "I32": "packed integers", "U32": "packed integers"}
FEW = 8  # of so many matrices one of integers does not make a quantised model
BIT_KEYS = ("bits", "w_bit", "wbits", "nbits", "num_bits", "w_bits", "weight_bits", "in_group_bits")
OLD_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt"))


def settings(config: Mapping[str, Any], folder: Folder) -> tuple[str, Mapping[str, Any]]:
    """(method, settings) of a quantised model, as config.json or a file beside it says; ("", {}) if neither does."""
    for level in levels(config):
        for key in ("quantization_config", "compression_config"):
            found = level.get(key)
            if isinstance(found, Mapping):
                method = found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else "")
                return str(method).lower()[:40], found
    mlx = config.get("quantization")
    if isinstance(mlx, Mapping) and "group_size" in mlx:
        return "mlx", mlx
    for name, method in OLD_FILES:
        if name in folder:
            return method, folder.json(name)
    return "", {}


def quantised_by(tensors: Iterable[TensorInfo]) -> str:
    """How the tensors are quantised, as far as their names and dtypes show; empty: they are plain numbers."""
    found: set[str] = set()
    integers, coded, matrices = "", 0, 0
    for info in tensors:
        found |= {method for end, method in MARKS if info.name.endswith(end)}
        if info.name.endswith(".weight") and len(info.shape) >= 2:
            matrices += 1
            if info.dtype in INTEGERS:
                integers, coded = INTEGERS[info.dtype], coded + 1
    if coded * FEW < matrices:  # a table of something, and what a model needs in floating point is asked for by name
        integers = ""
    return next((method for _, method in MARKS if method in found), integers)


def kind(tensors: Iterable[TensorInfo], config: Mapping[str, Any], folder: Folder) -> tuple[str, str] | None:
    """("a GPTQ model", " (4 bits)") for a model whose weights are not plain numbers; None for others."""
    shown = quantised_by(tensors)
    if not shown:
        return None
    method, said = settings(config, folder)
    if shown in ("exl2", "exl3", "nvfp4") or not method:
        label = {"gptq": "GPTQ or AWQ"}.get(shown, LABELS.get(shown, f"quantised ({shown})"))
    else:
        label = "MLX" if method == "mlx" else LABELS.get(method, method)
    form = said.get("format")
    parts = [str(form)[:40]] if isinstance(form, str) and method == "compressed-tensors" else []
    bits = bit_width(said)
    parts += [f"{bits:g} bits"] if bits else []
    article = "an" if label[0] in "AEFHM" and label[1:2].isupper() else "a"
    return f"{article} {label} model", f" ({', '.join(parts)})" if parts else ""


def description(tensors: Iterable[TensorInfo], config: Mapping[str, Any], folder: Folder) -> tuple[str, str] | None:
    """(what the model is, what to do instead) for one that is quantised already, or while it runs; None if its weights are
    plain numbers.

    Tensors that can be dequantised (`dequantise`) are to be left out before.
    """
    found = kind(tensors, config, folder)
    if found is None:
        method, said = settings(config, folder)
        if method == "bitnet" and said.get("quantization_mode") == "online":
            return (
                "is a BitNet model that rounds its weights to -1, 0 and 1 while it runs, which ExLlamaV2 does not",
                "if the model is to run with the weights as they are stored, remove quantization_config from config.json",
            )
        return None
    base = folder.base_model()
    return (
        f"is {found[0]} already{found[1]}: what was lost cannot be brought back, and it would be quantised twice",
        "start from the original weights" + (f": {base}" if base else ""),
    )


def bit_width(said: Mapping[str, Any], depth: int = 3) -> float | None:
    """Bits of a weight in the settings of a quantised model, where they say so."""
    for key, width in (("load_in_4bit", 4.0), ("load_in_8bit", 8.0), ("_load_in_4bit", 4.0), ("_load_in_8bit", 8.0)):
        if said.get(key) is True:
            return width
    for key in BIT_KEYS:
        value = said.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 16:
            return float(value)
    for key in ("weights", "quant_type", "quant_algo"):
        digits = "".join(c for c in str(said.get(key, ""))[:12] if c.isdigit())
        if isinstance(said.get(key), str) and digits and int(digits[0]) in (1, 2, 3, 4, 6, 8):
            return float(digits[0])
    if depth:
        inner = [v for k, v in said.items() if isinstance(v, Mapping) and "activation" not in str(k)]
        return next((bits for v in inner if (bits := bit_width(v, depth - 1))), None)
    return None
