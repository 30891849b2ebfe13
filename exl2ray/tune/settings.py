"""What a tuning is asked for, and what follows from it and the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from exl2ray.calibration.data.sources import Source
from exl2ray.tune.memory import SMALL_WEIGHTS, STEP_TOKENS, step_tokens

# Tokens of a row. More documents in a step gain more, also where the judge has rows of 1536: 512 more than 1024, and up to
# LOW_BITS 256, with RAISED times the rate, more than 512 (docs/quality.md). Beyond, 256 loses 1 % with long rows.
LENGTH, LOW_LENGTH = 512, 256
LOW_BITS, RAISED = 3.25, math.sqrt(2.0)  # a weight of the linears but the head
SMALL_PASSES = 2  # over the text, for a model of less than SMALL_WEIGHTS: minutes there, a quarter of an hour for a 7B
RATE = 2e-3  # for steps of STEP_TOKENS and more; the highest
GAIN_BITS = 4.0  # a weight, up to which norms and biases have the rate of latents
PLACES = ("directory", "reference", "output", "sources", "work", "text_flag", "streamed", "written")  # of no consequence


@dataclass(frozen=True)
class Settings:
    """directory: the EXL2 model. reference: its source. output: where the tuned one goes. sources: text; none: built-in.

    tokens: of text to train on. passes: how often over all of it. length: of a row. step_tokens: of a step. rate: of Adam,
    for latents in steps of the grid; gain_rate: for norms and biases, relative to their size. None: what `for_model` and
    `for_rows` have for them. dtype: of the products; None: float32 on CPUs, bfloat16 elsewhere. work: folder for what is not
    finished, beside it (its name and .json) a record of what is; None: in the output, hidden. text_flag: what messages about
    the text call it. written: work directory that keeps what the source writes; None: ``work``, where it stays for a finished
    tuning that is run again. streamed: one module on the device at a time (`exl2ray.tune.shelves`); None: if they do not fit
    there together.
    """

    directory: str
    reference: str
    output: str
    sources: tuple[Source, ...] = ()
    tokens: int = 1_000_000
    length: int | None = None
    step_tokens: int | None = None
    rate: float | None = None
    gain_rate: float | None = None
    warmup: int = 20
    seed: int = 0
    checkpoint_seconds: float = 60.0
    dtype: torch.dtype | None = None
    work: str | None = None
    text_flag: str = "--text"
    written: str | None = None
    streamed: bool | None = None
    passes: int | None = None

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        return self.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    @property
    def row_length(self) -> int:
        """Tokens of a row; as for the most models, while `for_model` has not decided."""
        return self.length or LENGTH

    def for_model(self, weights: int, bits: float) -> Settings:
        """With tokens of a row and of a step for a model of so many weights, if none are given. bits: a weight of the linears
        but the head. Smaller steps gain more (SmolLM2-135M at 3.0 bpw 2 % of its KL) and take a large model too long: its
        optimiser moves 30 bytes a weight and step."""
        length = self.length or (LOW_LENGTH if bits <= LOW_BITS else LENGTH)
        return replace(self, length=length, step_tokens=self.step_tokens or max(step_tokens(weights), length))

    def for_rows(self, rows: int, bits: float, weights: int) -> Settings:
        """With the passes and rates that are not given, for so many rows of text and a model of so many weights: rates with
        the square root of a step's tokens (for Adam: Malladi et al. 2022), and no higher than was tried; a second pass where
        text is not gone through again and again as it is. bits: a weight of the linears but the head.

        Steps between integers halve with every bit, and latents move in these; norms and biases do not, so beyond `GAIN_BITS`
        the disturbance that they are to a model while the rate is high would double with every bit, relative to its errors.
        """
        usual = RATE * math.sqrt(min(1.0, self.rows_of_a_step(rows) * self.row_length / STEP_TOKENS))
        rate = min(RATE, usual * RAISED) if bits <= LOW_BITS else usual
        gain_rate = usual * 2.0 ** -max(0.0, bits - GAIN_BITS)
        passes = passes_over_text(weights) if rows * self.row_length >= self.tokens else 1
        return replace(
            self, rate=self.rate or rate, gain_rate=self.gain_rate or gain_rate, passes=self.passes or passes
        )

    def rows_of_a_step(self, rows: int) -> int:
        """``rows``: that there are."""
        return min(rows, max(1, (self.step_tokens or STEP_TOKENS) // self.row_length))

    def steps(self, rows: int) -> int:
        return max(1, (self.passes or 1) * self.tokens // (self.rows_of_a_step(rows) * self.row_length))


def passes_over_text(weights: int) -> int:
    """If nobody says so, for a model of so many weights: a second one leaves 0.92 times the KL of SmolLM2-135M."""
    return SMALL_PASSES if weights < SMALL_WEIGHTS else 1


@dataclass(frozen=True)
class Where:
    """On what workers: `exl2ray.driver.actors.open_workers`."""

    executor: str = "inline"
    workers: int | None = None
    address: str | None = None
