"""Puts packed linears into a model whose modules are those of the source: by the names that the files of the model have.

A linear of the model is replaced in its place. Two kinds of module hold several linears of the file: projections that the
source keeps in one matrix (q, k and v of Phi-3, gate and up of Phi-3 and GLM-4), and experts, which transformers keeps in
three-dimensional parameters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import FormatError
from exl2ray.formats.exl2 import linear_keys
from exl2ray.formats.layout import pad32
from exl2ray.formats.tensorfile import TensorInfo
from exl2ray.run.linear import Exl2Linear
from exl2ray.run.names import EXPERT_ROLES, FUSED

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d{1,6})\.(?P<role>\w+)")


class Joined(torch.nn.Module):
    """Stands for one matrix of the source where the file has a linear for each of its parts, which belong to its parent."""

    def __init__(self, parts: list[Exl2Linear]) -> None:
        super().__init__()
        self._parts = tuple(parts)  # a tuple is no submodule: names of tensors stay those of the file
        self.in_features, self.out_features = parts[0].in_features, sum(p.out_features for p in parts)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features): the results of the parts side by side."""
        return torch.cat([part(x) for part in self._parts], dim=-1)


class Exl2Experts(torch.nn.Module):
    """Gated experts, each with three packed linears; takes the place of a module with three-dimensional parameters."""

    def __init__(self, experts: list[dict[str, Exl2Linear]], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act_fn = activation
        self.roles = next(roles for roles in EXPERT_ROLES if set(roles) == set(experts[0]))
        for number, linears in enumerate(experts):
            self.add_module(str(number), torch.nn.ModuleDict(linears))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden), weighted sums.

        Looks at the numbers of the experts on the host, so it cannot be part of a CUDA graph.
        """
        out = torch.zeros_like(hidden_states)
        for number in sorted(set(top_k_index.flatten().tolist())):
            if number >= len(self._modules):
                continue
            gate, up, down = (self.get_submodule(f"{number}.{role}") for role in self.roles)
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            y = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def empty_linear(key: str, tensors: Mapping[str, TensorInfo], out_features: int | None = None) -> Exl2Linear:
    """A module on the meta device with the shapes that the headers give for ``key``; width of the file if none is given."""
    rows, columns = tensors[f"{key}.q_weight"].shape
    (in_features,) = tensors[f"{key}.q_invperm"].shape
    (groups,) = tensors[f"{key}.q_scale_max"].shape
    width = columns if out_features is None else out_features
    if pad32(width) != columns:
        raise FormatError(f"{key}: {columns} columns in the file; the model's config says {width}")
    return Exl2Linear(in_features, width, rows, groups, f"{key}.bias" in tensors, "meta")


def insert_linears(
    model: torch.nn.Module, tensors: Mapping[str, TensorInfo], renamed: Callable[[str], str]
) -> set[str]:
    """Replaces the linears of ``model`` that the files hold packed, and returns their names in the model.

    tensors: headers of the files; ``renamed``: name of a linear in the files -> its name in the model. Raises FormatError for
    a linear that the model has no place for, and for shapes that contradict each other.
    """
    modules = dict(model.named_modules())
    experts: dict[str, dict[int, dict[str, Exl2Linear]]] = defaultdict(lambda: defaultdict(dict))
    placed = set()
    for key in linear_keys(tensors):
        name = renamed(key)
        expert = EXPERT.fullmatch(name)
        if expert and expert["experts"] in modules and name not in modules:
            experts[expert["experts"]][int(expert["number"])][expert["role"]] = empty_linear(key, tensors)
        elif name in modules:
            _replace(model, name, key, tensors)
        elif not _insert_part(model, modules, name, key, tensors):
            raise FormatError(f"{key}: {type(model).__name__} of transformers has no linear of this name")
        placed.add(name)
    for name, numbered in experts.items():
        _replace_experts(model, name, numbered)
    _join(model, modules)
    return placed


def _replace(model: torch.nn.Module, name: str, key: str, tensors: Mapping[str, TensorInfo]) -> None:
    old = model.get_submodule(name)
    if not isinstance(old, torch.nn.Linear):
        raise FormatError(f"{key}: {name} of the model is a {type(old).__name__}, not a linear")
    new = empty_linear(key, tensors, old.out_features)
    if new.in_features != old.in_features or (new.bias is None) != (old.bias is None):
        has = [f"{x.in_features} inputs {'with' if x.bias is not None else 'without'} a bias" for x in (new, old)]
        raise FormatError(f"{key}: {has[0]} in the file; the model's config says {has[1]}")
    model.set_submodule(name, new)


def _insert_part(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], name: str, key: str, tensors: Mapping[str, TensorInfo]
) -> bool:
    """Puts q_proj beside qkv_proj; False if the model has no such matrix."""
    parent, _, leaf = name.rpartition(".")
    whole = next((w for w, parts in FUSED.items() if leaf in parts and f"{parent}.{w}" in modules), None)
    if whole is None:
        return False
    model.get_submodule(parent).add_module(leaf, empty_linear(key, tensors))
    return True


def _join(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if leaf not in FUSED or not isinstance(module, torch.nn.Linear):
            continue
        holder = model.get_submodule(parent)
        parts = [p for p in (getattr(holder, part, None) for part in FUSED[leaf]) if isinstance(p, Exl2Linear)]
        if not parts:
            continue
        joined = Joined(parts)
        if len(parts) != len(FUSED[leaf]) or (joined.in_features, joined.out_features) != (
            module.in_features, module.out_features
        ):  # fmt: skip
            shape = f"{joined.out_features} x {joined.in_features}"
            want = f"{module.out_features} x {module.in_features}"
            raise FormatError(f"{name}: {len(parts)} of {len(FUSED[leaf])} parts in the file, {shape}; the model has {want}")
        model.set_submodule(name, joined)


def _replace_experts(model: torch.nn.Module, name: str, numbered: dict[int, dict[str, Exl2Linear]]) -> None:
    old: Any = model.get_submodule(name)
    count = getattr(old, "num_experts", None)
    gate_up, down, activation = (getattr(old, x, None) for x in ("gate_up_proj", "down_proj", "act_fn"))
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or activation is None:
        raise FormatError(f"{name}: the experts of {type(old).__name__} have another form than gate, up and down")
    if sorted(numbered) != list(range(count or 0)):
        raise FormatError(f"{name}: {len(numbered)} experts in the file; the model's config says {count}")
    for number, linears in numbered.items():
        roles = next((roles for roles in EXPERT_ROLES if set(roles) == set(linears)), None)
        if roles is None:
            raise FormatError(f"{name}.{number}: has {', '.join(sorted(linears))}, not gate, up and down")
        shapes = [(linears[r].out_features, linears[r].in_features) for r in roles]
        wide, hidden = gate_up.shape[1] // 2, gate_up.shape[2]
        if shapes != [(wide, hidden), (wide, hidden), (hidden, wide)]:
            raise FormatError(f"{name}.{number}: {shapes} in the file; the model's config says {wide} x {hidden}")
    model.set_submodule(name, Exl2Experts([numbered[i] for i in range(len(numbered))], activation))
