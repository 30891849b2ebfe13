"""What the simulated schedules (`schedules.py`) are fed with: seconds on one GPU, sizes, rates. Read from costs.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModuleCosts:
    """One module on one GPU. Dictionaries have an entry per input that several linears share, named by them."""

    load_s: float
    """reading its weights onto a GPU; hidden behind the module before where the same worker goes on with the next one"""
    sweep_s: float
    """forward of the measurement rows"""
    hessian_s: float
    """Hessians of the measurement rows, in that forward"""
    measure_s: float
    """solving and scoring all options, after that"""
    forward_s: float
    """forward of the quantisation rows"""
    forward_hessian_s: float
    """Hessians of the quantisation rows"""
    reported_s: float
    """forward of the rows whose perplexity is reported, in the other model"""
    check_s: float
    """forward of the quantisation rows through the quantised module"""
    solve_s: dict[str, float]
    """quantising the linears of one input, writing included"""
    hessian_gb: dict[str, float]
    packed_gb: dict[str, float]
    first_measure_s: float = 0.0
    """what a worker's first module of this kind takes in addition (loading kernels, recording graphs), measuring"""
    first_quantize_s: float = 0.0
    """the same, on reference states"""
    first_chain_s: float = 0.0
    """the same, in a chain on quantised states"""
    wide_s: dict[str, float] = field(default_factory=dict)
    """of solve_s, products of factorising wide Hessians, which a group shares out (``exl2ray.quant.factorising``)"""
    wide_serial_s: dict[str, float] = field(default_factory=dict)
    """of solve_s, what of these factorisations one member does while the others wait"""
    group: float = 1.0
    """what solving and forward passes take in a chain, over what they take on reference states"""

    def pass_s(self, measuring: bool) -> float:
        """Going through, on the way to another module."""
        return self.sweep_s if measuring else self.forward_s

    def enter_s(self, measuring: bool) -> float:
        return self.sweep_s + self.hessian_s if measuring else self.forward_s + self.forward_hessian_s

    def rest_s(self, measuring: bool) -> float:
        """Everything else on an entered module, in a fan."""
        return self.measure_s if measuring else sum(self.solve_s.values()) + self.check_s


@dataclass(frozen=True)
class ModelCosts:
    layers: int
    measure_state_gb: float  # hidden states of all rows at one boundary of modules
    quantize_state_gb: float
    quantize_rows: int
    modules: dict[str, ModuleCosts]  # of one layer, in order
    perplexity_s: float = 0.0  # of one layer: the pass of a finished model that was quantised on reference states
    room_gb: float = 0.0  # on a GPU, for states and Hessians of modules that a sweep has prepared for it

    @staticmethod
    def parse(value: dict[str, Any]) -> ModelCosts:
        """As JSON has it."""
        return ModelCosts(**{**value, "modules": {k: ModuleCosts(**c) for k, c in value["modules"].items()}})

    def chain(self) -> list[ModuleCosts]:
        return [m for _ in range(self.layers) for m in self.modules.values()]


@dataclass(frozen=True)
class Costs:
    source: str  # where the numbers come from
    nccl_gb_s: float  # between the GPUs of a group
    message_s: float  # one exchange of small objects in a group
    driver_s: float  # from the end of a call to the start of the next one on a worker
    sweep_module_s: float  # a module of a sweep, beside forward passes and what is sent: agreeing, many small tensors
    group_reads: float  # how many times as fast as one worker those of one machine read a module together, at most
    start_s: float  # from the command to the first call, one GPU
    group_start_s: float  # the same with several: Ray, workers, connecting GPUs
    write_gb_s: float  # of shards and side files, fsync included; while later modules are quantised
    models: dict[str, ModelCosts]

    @staticmethod
    def parse(value: dict[str, Any]) -> Costs:
        """As JSON has it."""
        return Costs(**{**value, "models": {name: ModelCosts.parse(m) for name, m in value["models"].items()}})

    @staticmethod
    def load(path: Path) -> Costs:
        return Costs.parse(json.loads(path.read_text(encoding="utf-8")))
