#!/usr/bin/env python3
"""What the items of a conversion take on one H200, for `simulate.py`: from FLOP counts and rates, where nothing was measured.

    python scripts/estimate_costs.py > scripts/costs.json
    python scripts/estimate_costs.py --observed FILE      with what `scaling.py --costs FILE` saw, in place of observed.json

Counts are exact for the reference's option tables (19 for attention, 17 for an MLP, 13 to 15 distinct ones per linear). Rates
are those that modules of 70B reach on an H200. Calls that were measured keep the shares of these estimates and take the time
that was seen (`observed.py`). Fields: `schedule_costs.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from observed import Observed
from schedule_costs import Costs
from sweeps import HOST_SUMS_GB

from exl2ray.formats.layout import pad32
from exl2ray.quant.cholesky import block_count
from exl2ray.quant.factorising import TOGETHER_ROWS
from exl2ray.quant.memory import room_within

OBSERVED = Path(__file__).with_name("observed.json")
FORWARD = 620e12  # FLOP/s of fp16 products, as traces of 70B modules on an H200 have it, like the next five
HESSIAN = 720e12  # fp16 inputs, float32 sums
TRAILING = 80e12  # wide GPTQ updates: below the 100 of TF32
FACTOR = 37e12  # Cholesky of large matrices
BLOCK_SECONDS = 0.00103  # a diagonal block of it, and its inverse
GRID = 2e12  # evaluations of the scale search per second
GRID_EVALUATIONS = 97  # per weight and option
ROW_SECONDS = 2e-6  # per row of a single solve, which launches and not FLOPs hold up
MEMORY = 150_000_000_000  # bytes of an H200
LOAD_GB_S = 8.0  # source weights, from a page cache; 7.6 GB in less than a second on the way of two GPUs (docs/log.md)

MEASURE_ROWS, QUANTIZE_ROWS, REPORTED_ROWS, LENGTH = 19, 115, 19, 2048  # of the built-in calibration set
OPTIONS = {"attention": 19, "mlp": 17, "moe": 17}
DISTINCT = {"q": 14, "k": 14, "v": 15, "o": 14, "gate": 13, "up": 13, "down": 14}
CACHED = 0.85  # of the scoring FLOPs remain when projections of equal options are kept
BITS = 4.0
MOE_ROLES = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    wide: int
    kv: int  # features of k and v
    experts: int = 1
    used: int = 1  # experts per token


SHAPES = {
    "7B": Shape(32, 4096, 11008, 4096),
    "70B": Shape(80, 8192, 28672, 1024),
    "405B": Shape(126, 16384, 53248, 1024),
    "Mixtral 8x7B": Shape(32, 4096, 14336, 1024, experts=8, used=2),
}


@dataclass(frozen=True)
class Input:
    """Linears that share an input: ``linears``: role -> output features; ``part``: of the tokens that reach it; ``copies``:
    how many there are (experts).
    """

    features: int
    linears: dict[str, int]
    part: float = 1.0
    copies: int = 1

    def forward(self, tokens: float) -> float:
        return 2 * tokens * self.part * self.copies * self.features * sum(self.linears.values())

    def hessian(self, tokens: float) -> float:
        return 2 * tokens * self.part * self.copies * self.features**2

    def factor_s(self) -> float:
        return self.features**3 / 3 / FACTOR + 0.0015

    def wide_serial_s(self) -> float:
        """What a group waits for while it factorises: factors of diagonal blocks. 0 if one member does it all."""
        wide = self.features > TOGETHER_ROWS and self.copies == 1 and 4e-9 * self.features**2 <= HOST_SUMS_GB
        return BLOCK_SECONDS * block_count(self.features) if wide else 0.0

    def solve_s(self) -> float:
        """One option of every linear of one copy."""
        trailing = self.features**2 * sum(self.linears.values()) / TRAILING
        grid = self.features * sum(self.linears.values()) * GRID_EVALUATIONS / GRID
        return self.factor_s() + trailing + grid + ROW_SECONDS * self.features

    def candidates_s(self) -> float:
        """All distinct options of every linear of all copies."""
        columns = sum(DISTINCT[role] * n for role, n in self.linears.items())
        return self.copies * (self.features**2 * columns / TRAILING + self.features * columns * GRID_EVALUATIONS / GRID)


def modules(s: Shape) -> dict[str, tuple[float, list[Input]]]:
    """kind -> (FLOP of attention's core per token, inputs)."""
    attention = [Input(s.hidden, {"q": s.hidden, "k": s.kv, "v": s.kv}), Input(s.hidden, {"o": s.hidden})]
    part = s.used / s.experts
    mlp = [
        Input(s.hidden, {"gate": s.wide, "up": s.wide}, part, s.experts),
        Input(s.wide, {"down": s.hidden}, part, s.experts),
    ]
    return {"attention": (2.0 * LENGTH * s.hidden, attention), "moe" if s.experts > 1 else "mlp": (0.0, mlp)}


def room_gb(s: Shape) -> float:
    """What a worker leaves for prepared modules, by the sums that it does itself (`exl2ray.team.source_forward`)."""
    made = []
    for kind, (_, inputs) in modules(s).items():
        roles = MOE_ROLES if kind == "moe" else {}
        linears = []
        for i, copy in ((x, copy) for x in inputs for copy in range(x.copies)):
            sizes = {"in_features": i.features, "input_group": (*i.linears, copy)}
            for role, n in i.linears.items():
                sizes |= {"out_features": n, "padded_out": pad32(n)}
                sizes |= {"weights": i.features * n, "padded_weights": i.features * pad32(n)}
                linears.append(SimpleNamespace(role=roles.get(role, f"{role}_proj"), **sizes))
        made.append(SimpleNamespace(kind=kind, quantized=True, linears=linears))
    room = room_within(made, 2 * QUANTIZE_ROWS * LENGTH * s.hidden, LENGTH, MEMORY, False)
    return max(0, room) / 1e9


def costs(s: Shape) -> dict[str, Any]:
    out = {}
    for kind, (core, inputs) in modules(s).items():
        weights = sum(i.copies * i.features * sum(i.linears.values()) for i in inputs)

        def forward(rows: float, core: float = core, inputs: list[Input] = inputs) -> float:
            tokens = rows * LENGTH
            return (sum(i.forward(tokens) for i in inputs) + core * tokens) / FORWARD

        def hessians(rows: float, inputs: list[Input] = inputs) -> float:
            return sum(i.hessian(rows * LENGTH) for i in inputs) / HESSIAN

        factors = sum(i.copies * i.factor_s() for i in inputs)
        scoring = OPTIONS[kind] * CACHED * forward(MEASURE_ROWS)
        named = {
            f"{'+'.join(i.linears)}{f'.{c}' if i.copies > 1 else ''}": i for i in inputs for c in range(i.copies)
        }  # fmt: skip
        out[kind] = {
            "load_s": weights * 2 / 1e9 / LOAD_GB_S,
            "sweep_s": forward(MEASURE_ROWS),
            "hessian_s": hessians(MEASURE_ROWS),
            "measure_s": factors + sum(i.candidates_s() for i in inputs) + scoring,
            "forward_s": forward(QUANTIZE_ROWS),
            "forward_hessian_s": hessians(QUANTIZE_ROWS),
            "reported_s": forward(REPORTED_ROWS),
            "check_s": forward(QUANTIZE_ROWS),
            "solve_s": {name: i.solve_s() for name, i in named.items()},
            "wide_s": {name: i.factor_s() - i.wide_serial_s() for name, i in named.items() if i.wide_serial_s()},
            "wide_serial_s": {name: i.wide_serial_s() for name, i in named.items() if i.wide_serial_s()},
            "hessian_gb": {name: i.features**2 * 4 / 1e9 for name, i in named.items()},
            "packed_gb": {name: i.features * sum(i.linears.values()) * BITS / 8 / 1e9 for name, i in named.items()},
        }
    return {
        "layers": s.layers,
        "measure_state_gb": MEASURE_ROWS * LENGTH * s.hidden * 2 / 1e9,
        "quantize_state_gb": QUANTIZE_ROWS * LENGTH * s.hidden * 2 / 1e9,
        "quantize_rows": QUANTIZE_ROWS,
        "modules": out,
        "room_gb": room_gb(s),
        "perplexity_s": sum(m["reported_s"] + m["load_s"] * BITS / 16 for m in out.values()),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def estimate(observed: Path = OBSERVED) -> dict[str, Any]:
    value: dict[str, Any] = {
        "source": "estimated from FLOP counts and rates of one H200",
        "nccl_gb_s": 300.0,  # sums of 3.56 GB in 0.010 to 0.012 s, states of 1.95 GB in 0.007, between two H200
        "message_s": 0.003,
        "driver_s": 0.003,
        "sweep_module_s": 0.005,  # what is left of 3.4 s for 8 modules on two H200 and 3.7 s for 16 on four, `reference`
        "group_reads": 2.0,  # 3.4 GB in 0.2 s on two H200, 10.3 GB in 0.64 s on four, `measure`, at LOAD_GB_S of one
        "start_s": 4.7,  # 70B shape of 8 layers, kernels compiled before; of a 7B 4.4 s, 7.2 s for the first on a machine
        "group_start_s": 6.0,  # the same on two H200: with Ray, workers, and connecting them
        "write_gb_s": 0.4,  # 3.6 GB in 11.1 s, 7B on one H200; 4.5 GB in about 10, 70B shape of 8 layers on four
        "models": {name: costs(shape) for name, shape in SHAPES.items()},
    }
    return rounded(asdict(Observed.load(observed).corrected(Costs.parse(value))))  # type: ignore[no-any-return]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observed", type=Path, default=OBSERVED)
    print(json.dumps(estimate(parser.parse_args().observed), indent=1))
