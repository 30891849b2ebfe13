"""One model evaluated alone, as most tests want it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from exl2ray.evaluate.compare import evaluate_many
from exl2ray.evaluate.forward import OpenModel
from exl2ray.evaluate.result import EvalResult


def evaluate(
    model: str | Path | OpenModel, reference: str | Path | None, ids: Tensor, device: str, **more: Any
) -> EvalResult:
    """`evaluate_many` of one model, with its further arguments."""
    return evaluate_many([model], reference, ids, device, **more)[0]
