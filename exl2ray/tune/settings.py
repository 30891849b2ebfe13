"""What a tuning is asked for, and what follows from it and the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl2ray.calibration.data.sources import Source
from exl2ray.tune.grid import REACH

PLACES = ("directory", "reference", "output", "sources", "work", "text_flag", "streamed", "written")  # of no consequence


@dataclass(frozen=True)
class Settings:
    """directory: the EXL2 model. reference: its source. output: where the tuned one goes. sources: text; none: built-in.

    tokens: to train on. length: of a row. step_tokens: of a step. rate: of Adam, for latents in steps of the grid; gain_rate:
    for norms and biases, relative to their size. reach: how far latents may begin from their integers. dtype: of the
    products; None: float32 on CPUs, bfloat16 elsewhere. work: folder for what is not finished, beside it (its name and .json)
    a record of what is; None: in the output, hidden. text_flag: what messages about the text call it. written: work
    directory that keeps what the source writes; None: ``work``, where it stays for a finished tuning that is run again.
    streamed: one module on the device at a time (`exl2ray.tune.shelves`); None: if they do not fit there together.
    """

    directory: str
    reference: str
    output: str
    sources: tuple[Source, ...] = ()
    tokens: int = 1_000_000
    length: int = 1024
    step_tokens: int = 8192
    rate: float = 2e-3
    gain_rate: float = 2e-3
    reach: float = REACH
    warmup: int = 20
    seed: int = 0
    checkpoint_seconds: float = 60.0
    dtype: torch.dtype | None = None
    work: str | None = None
    text_flag: str = "--text"
    written: str | None = None
    streamed: bool | None = None

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        return self.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    def rows_of_a_step(self, rows: int) -> int:
        """``rows``: that there are."""
        return min(rows, max(1, self.step_tokens // self.length))

    def steps(self, rows: int) -> int:
        return max(1, self.tokens // (self.rows_of_a_step(rows) * self.length))


@dataclass(frozen=True)
class Where:
    """On what workers: `exl2ray.driver.actors.open_workers`."""

    executor: str = "inline"
    workers: int | None = None
    address: str | None = None
