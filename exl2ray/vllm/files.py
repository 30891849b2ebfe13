"""The packed linears of an EXL2 model under the names of vLLM's modules. Knows nothing of vLLM itself.

Loads no numba: vLLM's start on a CPU looks through all modules that are loaded, and fails at numba's llvmlite (0.32.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl2ray.errors import FormatError
from exl2ray.formats.exl2 import QUANTIZED_SUFFIXES, linear_keys
from exl2ray.formats.hf import weight_files
from exl2ray.formats.hfconfig import read_config
from exl2ray.formats.layout import pad32
from exl2ray.formats.tensorfile import TensorInfo
from exl2ray.run.directory import headers, sound_files
from exl2ray.run.names import EXPERT_ROLES, FUSED, TEXT_MODEL


@dataclass
class PackedFiles:
    """Made once, in front of everything, and sent to the processes that load the model: names, and no weights.

    names: linear in vLLM's model -> in the files; biased: those of the files that have a bias; prefix: in front of all names
    in the files, and of none in vLLM; claimed: those of the files that a layer of this process is going to read. source: what
    vLLM calls the model; norms_apart: each head has a norm of its own.
    """

    root: Path
    names: dict[str, str]
    biased: list[str]
    source: str
    norms_apart: bool
    prefix: str = ""
    claimed: set[str] = field(default_factory=set)
    _tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def opened(cls, root: Path, source: str = "") -> PackedFiles:
        """Raises FormatError for whatever ``exl2ray verify`` refuses."""
        tensors = headers(sound_files(root))
        keys = linear_keys(tensors)
        biased = [key for key in keys if f"{key}.bias" in tensors]
        family = str(read_config(root / "config.json", FormatError)["architectures"][0])
        return cls(root, {key: key for key in keys}, biased, source or str(root), family.startswith("Cohere"))

    def tensors(self) -> dict[str, TensorInfo]:
        """Headers of the files, read once in each process."""
        if not self._tensors:
            self._tensors = headers(weight_files(self.root, FormatError))
        return self._tensors

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": {}}

    def rename(self, names: Sequence[str]) -> None:
        """New names in vLLM's model, in the order of the old ones."""
        self.names = dict(zip(names, self.names.values(), strict=True))

    def patterns(self) -> list[str]:
        """Regular expressions for the names of all tensors that belong to packed linears, in the files and in vLLM."""
        biased = set(self.biased)
        names = sorted({name for name, key in self.names.items() if key in biased} | biased)
        found = ["(?:" + "|".join(re.escape(suffix) for suffix in QUANTIZED_SUFFIXES) + ")$"]
        return found + ["^(?:" + "|".join(re.escape(name) for name in names) + r")\.bias$"] * bool(names)

    def claim(self, names: Sequence[str]) -> list[str]:
        """Their keys in the files, for a layer that is going to read them."""
        keys = [self.names[name] for name in names]
        self.claimed.update(keys)
        return keys

    def parts(self, layer: str, merged: Mapping[str, Sequence[str]]) -> list[str]:
        """Keys of the linears that make up a layer of vLLM, in its order; none if it is not packed.

        merged: last part of a name -> those of its parts, in this family. Raises FormatError if only some parts are packed.
        """
        parent = layer.rpartition(".")[0]
        if parent and not self.prefix and any(name.startswith(f"{TEXT_MODEL}{parent}.") for name in self.names):
            self.prefix = TEXT_MODEL
            self.names = {name.removeprefix(TEXT_MODEL): key for name, key in self.names.items()}
        if layer in self.names:
            return self.claim([layer])
        parent, _, leaf = layer.rpartition(".")
        for leaves in (merged.get(leaf), FUSED.get(leaf)):
            names = [f"{parent}.{part}" for part in leaves or ()]
            missing = [name for name in names if name not in self.names]
            if names and not missing:
                return self.claim(names)
            if len(missing) < len(names):
                raise FormatError(f"{self.root}: {layer} of vLLM is one matrix; {', '.join(missing)} is not packed")
        return []

    def has_experts(self, layer: str) -> bool:
        return any(name.startswith(f"{layer}.") for name in self.names)

    def expert(self, layer: str, number: int) -> list[str]:
        """Keys of gate, up and down of one expert. Raises FormatError if it has no packed ones."""
        for roles in EXPERT_ROLES:
            names = [f"{layer}.{number}.{role}" for role in roles]
            if all(name in self.names for name in names):
                return self.claim(names)
        raise FormatError(f"{self.root}: {layer}.{number} is not packed, or not there; vLLM's model has this expert")

    def check(self, key: str, inputs: int, outputs: int, bias: bool) -> None:
        """Raises FormatError unless a linear has the size of vLLM's layer, and a bias if that has one."""
        tensors = self.tensors()
        found = (tensors[f"{key}.q_invperm"].shape[0], tensors[f"{key}.q_weight"].shape[1])
        if found != (inputs, pad32(outputs)):
            raise FormatError(f"{key}: {found[0]} x {found[1]} in the file; vLLM's layer has {inputs} x {outputs}")
        if bias != (key in self.biased):
            raise FormatError(f"{key}: {'without' if bias else 'with'} a bias in the file, not so in vLLM's layer")

    def left(self) -> list[str]:
        """Keys that no layer has claimed."""
        return sorted(set(self.names.values()) - self.claimed)
