"""Weights that are stored in FP8 or MXFP4 with scales beside them, read as the bfloat16 numbers that they stand for.

    FP8:    value = code * scale,    one scale per tensor, per row, or per block (DeepSeek, Qwen3-FP8: 128 x 128)
    MXFP4:  value = E2M1[nibble] * 2^(scale - 127),    one scale per row and 32 columns, two values a byte, low nibble first

rounded once to bfloat16, as the published code does (to float16 where the scales, or the model, are). Sources: DeepSeek-V3
inference/fp8_cast_bf16.py, compressed-tensors, OCP Microscaling Formats 1.0. Everything above sees only the result:
name, shape and dtype are those of the dequantised tensor, and ranges of rows can be read alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import Exl2RayError, SourceError
from exl2ray.formats.hfconfig import levels
from exl2ray.formats.tensorfile import DTYPES, TensorInfo, read_tensor

FP8 = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("F32", "F64", "BF16", "F16", "F8_E8M0", "U8")
MX_COLUMNS = 32  # that share a scale in MXFP4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CHUNK_NUMBERS = 1 << 22  # computed at once, in float32
IS_SCALE = re.compile(r"scale(_inv|_2|s|_ub)?$")
# Beside quantised weights: scales of activations and of the cache, which a model with plain weights does not have.
BESIDE = re.compile(
    r"\.(input_scale|input_scale_ub|activation_scale|act_scale|output_scale|k_scale|v_scale|q_scale|kv_scale|prob_output_scale"
    r"|weight_shape|input_zero_point|weight_zero_point|input_global_scale)$"
)


@dataclass(frozen=True)
class Scaled:
    """A tensor (rows, ...) that is computed when it is read.

    block: (rows, columns) that share a scale; 0: all of them. packed: MXFP4, two values in a byte of ``weight``.
    """

    info: TensorInfo  # of the result; ``file`` is that of the codes, ``begin`` means nothing
    weight: TensorInfo
    scale: TensorInfo | None
    block: tuple[int, int] = (0, 0)
    packed: bool = False

    @property
    def stored(self) -> list[TensorInfo]:
        """What the files hold of it."""
        return [self.weight] if self.scale is None else [self.weight, self.scale]

    def load(
        self,
        rows: slice | None = None,
        error: type[Exl2RayError] = SourceError,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """As `tensorfile.read_tensor`."""
        height = self.info.shape[0]
        first, last, step = (rows or slice(None)).indices(height)
        if step != 1:
            raise error(f"{self.info.file}: tensor {self.info.name!r}: row slices need step 1, not {step}")
        last = max(first, last)
        shape, dtype = (last - first, *self.info.shape[1:]), DTYPES[self.info.dtype]
        nbytes = math.prod(shape) * dtype.itemsize
        out = torch.empty(nbytes, dtype=torch.uint8) if allocate is None else allocate(nbytes)
        result = out.view(dtype).reshape(shape)
        width = max(1, math.prod(self.info.shape[1:]))
        chunk = max(1, CHUNK_NUMBERS // width)
        for a in range(first, last, chunk):
            b = min(a + chunk, last)
            values = self._codes(slice(a, b), error).reshape(b - a, width)
            factors = self._factors(a, b, width, error)
            values = values if factors is None else values * factors
            result[a - first : b - first] = values.to(dtype).reshape(b - a, *shape[1:])
        return result

    def _codes(self, rows: slice, error: type[Exl2RayError]) -> Tensor:
        """Values before scaling, float32."""
        raw = read_tensor(self.weight, rows, error)
        if not self.packed:
            return raw.float()
        pairs = torch.stack((raw & 15, raw >> 4), dim=-1).long()
        return torch.tensor(E2M1)[pairs].flatten(1)

    def _factors(self, a: int, b: int, width: int, error: type[Exl2RayError]) -> Tensor | None:
        """Scales of rows a .. b, float32, such that they multiply (b - a, width)."""
        if self.scale is None:
            return None
        high, wide = self.block
        if not high:  # one for all
            return _numbers(read_tensor(self.scale, None, error)).reshape(1, 1)
        high, wide = min(high, max(b, 1)), min(wide, max(width, 1))  # no block is larger than what it scales
        top = a // high
        found = _numbers(read_tensor(self.scale, slice(top, -(-b // high)), error)).reshape(-(-b // high) - top, -1)
        found = found.repeat_interleave(high, 0)[a - top * high :][: b - a]
        return found if not wide else found.repeat_interleave(wide, 1)[:, :width]


def _numbers(scale: Tensor) -> Tensor:
    """A scale as float32; bytes are exponents (E8M0), of which 255 is NaN."""
    if scale.dtype != torch.uint8:
        return scale.float()
    return torch.where(scale == 255, torch.nan, torch.exp2(scale.float() - 127))


def dequantised(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], error: type[Exl2RayError]
) -> tuple[dict[str, TensorInfo], dict[str, Scaled]]:
    """(the tensors as a model with plain weights has them, those among them that are computed).

    Without FP8 or MXFP4 tensors the first is ``tensors``. Raises ``error`` for a scale that is missing or does not fit.
    """
    block = _block_size(config)
    made: dict[str, Scaled] = {}
    strange = {n.rpartition(".")[0]: n for n in tensors if "scale" in n.rpartition(".")[2] and not BESIDE.search(n)}
    for name, info in tensors.items():
        if info.dtype in FP8 and not IS_SCALE.search(name):
            made[name] = _fp8(info, tensors, block, config, strange, error)
        elif info.dtype == "U8":
            found = _mxfp4(info, tensors, config)
            if found is not None:
                made[found.info.name] = found
    used = {i.name for s in made.values() for i in s.stored}
    if not made:
        return dict(tensors), {}
    plain = {n: i for n, i in tensors.items() if n not in used and not BESIDE.search(n)}
    return {**plain, **{n: s.info for n, s in made.items()}}, made


def summary(made: Mapping[str, Scaled]) -> str:
    """What is read how, in a sentence."""
    some = next(iter(made.values()))
    kind = "MXFP4" if some.packed else "FP8"
    high, wide = some.block
    per = f"{high} x {wide} block" if high > 1 else f"{wide} columns" if wide else "row" if high else "tensor"
    scale = f"a scale per {per}" if some.scale is not None else "no scale"
    dtype = str(DTYPES[some.info.dtype]).removeprefix("torch.")
    return f"{len(made)} weights are stored in {kind} with {scale}; they are read as {dtype}"


def _fp8(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None, config: Mapping[str, Any],
    strange: Mapping[str, str], error: type[Exl2RayError],
) -> Scaled:  # fmt: skip
    """``strange``: by module, or tensor, a tensor there that is called a scale."""
    where = f"{info.file}: tensor {info.name!r}"
    candidates = [info.name + "_scale_inv", info.name + "_scale", info.name.removesuffix("weight") + "scale"]
    scale = next((tensors[c] for c in candidates if c in tensors), None)
    if not info.shape or 0 in info.shape:
        raise error(f"{where}: an FP8 tensor of shape {list(info.shape)} holds no weights", "fetch the file again")
    if scale is None:
        other = strange.get(info.name) or strange.get(info.name.rpartition(".")[0])
        if other is not None or _quantization(config):
            wanted = " or ".join(c.rsplit(".", 1)[-1] for c in candidates[:2])
            beside = f"; {other} is not known as one" if other is not None else ""
            raise error(
                f"{where} is {info.dtype}, but there is no {wanted}{beside}",
                "start from weights in bfloat16" if other else "its scale is missing: is the download complete?",
            )
        return Scaled(_result(info, info.shape, None, config), info, None)
    if scale.dtype not in SCALE_DTYPES:
        raise error(
            f"{where}: its scale {scale.name!r} has dtype {scale.dtype}; one of {', '.join(SCALE_DTYPES)} is known",
            "fetch the file again, or start from weights in bfloat16",
        )
    result = _result(info, info.shape, scale, config)
    if math.prod(scale.shape) == 1:
        return Scaled(result, info, scale)
    height, width = info.shape[0], math.prod(info.shape[1:])
    if scale.shape in ((height,), (height, 1)):
        return Scaled(result, info, scale, (1, 0))
    if len(scale.shape) == 2 and len(info.shape) == 2:
        fits = _fitting_block(height, width, scale.shape, block)
        if fits is not None:
            return Scaled(result, info, scale, fits)
    raise error(
        f"{where} has shape {list(info.shape)}, its scale {scale.name!r} {list(scale.shape)}: not per tensor, row or block",
        "blocks of another size are named by quantization_config.weight_block_size in config.json",
    )


def _fitting_block(height: int, width: int, scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    rows, columns = scales
    if block is not None and (rows, columns) == (-(-height // block[0]), -(-width // block[1])):
        return block
    if 0 in scales or height % rows or width % columns:
        return None
    return height // rows, width // columns


def _mxfp4(info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scaled | None:
    """Rows of packed pairs with a byte of scale for 32 columns, under the three pairs of names that have been published."""
    for end, scale_end, plain_end in (
        (".weight_packed", ".weight_scale", ".weight"),  # compressed-tensors
        (".weight_blocks", ".weight_scales", ".weight"),  # OpenAI's names
        (".weight", ".weight_scale", ".weight"),  # Quark
    ):
        if not info.name.endswith(end) or len(info.shape) < 2:
            continue
        stem = info.name.removesuffix(end)
        scale = tensors.get(stem + scale_end)
        if scale is None or scale.dtype not in ("U8", "F8_E8M0"):
            continue
        height, width = info.shape[0], 2 * math.prod(info.shape[1:])
        if scale.shape == (height, width // MX_COLUMNS) and width % MX_COLUMNS == 0:
            result = _result(info, (height, width), None, config, stem + plain_end)
            return Scaled(result, info, scale, (1, MX_COLUMNS), packed=True)
    return None


def _result(
    info: TensorInfo, shape: tuple[int, ...], scale: TensorInfo | None, config: Mapping[str, Any], name: str = ""
) -> TensorInfo:
    wanted = config.get("dtype") or config.get("torch_dtype")
    dtype = scale.dtype if scale is not None and scale.dtype in ("F16", "BF16") else "F16" if wanted == "float16" else "BF16"
    return TensorInfo(name or info.name, info.file, dtype, shape, info.begin, math.prod(shape) * DTYPES[dtype].itemsize)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of it, for the model or for the text part of a larger one; empty: nothing."""
    said = (level.get(key) for level in levels(config) for key in ("quantization_config", "compression_config"))
    return next((found for found in said if isinstance(found, Mapping) and found), {})


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """``weight_block_size``, or the block_structure of compressed-tensors."""
    said = _quantization(config)
    groups = said.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    for found in (said.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, Mapping))):
        if isinstance(found, (list, tuple)) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
            return found[0], found[1]
    return None
