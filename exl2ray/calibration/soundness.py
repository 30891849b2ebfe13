"""What rows of tokens say about themselves: how varied they are, and how well counting alone predicts them.

A Hessian of one repeated character, or of one page fifty times over, describes no text; what is calibrated on it is fitted to
nothing. And a model that predicts text no better than the frequencies of its tokens does not fit its tokenizer, its config or
its own weights: `unigram_perplexity` is what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW_TOKENS = 32  # distinct ones; bytes of plain English are about 60
FEW_EFFECTIVE = 8.0  # exp of the entropy of the tokens: bytes of plain English have 18
MOST_COMMON = 0.4  # share of one token; in ordinary text, the end of line in code included, at most 0.2
PHRASE = 32  # tokens
MOST_REPEATED = 0.5  # share of phrases that stood there before; in ordinary text a few percent


def row_warnings(ids: Tensor, what: str) -> list[str]:
    """What is wrong with the variety of calibration rows, int64 (R, T); rows of noise (ids below 0) do not count.

    ``what`` names the rows, as in "calibration rows of the quantisation pass". Nothing for ordinary text.
    """
    rows = ids[(ids >= 0).all(dim=1)]
    if not rows.numel():
        return []
    counts = torch.bincount(rows.flatten())
    total, distinct, top = rows.numel(), int((counts > 0).sum()), int(counts.max())
    shares = counts[counts > 0].double() / total
    effective = float((-(shares * shares.log()).sum()).exp())
    if distinct < FEW_TOKENS or effective < FEW_EFFECTIVE or top / total >= MOST_COMMON:
        tokens = "distinct token" if distinct == 1 else "distinct tokens"
        return [
            f"{what}: {distinct} {tokens} among {total}, {top / total:.0%} of them token {int(counts.argmax())}: the model "
            "is fitted to hardly any text"
        ]
    repeated = repeated_share(rows)
    if repeated >= MOST_REPEATED:
        whole = len(rows) - len(torch.unique(rows, dim=0))
        rest = f", {whole} of {len(rows)} rows are copies of others" if whole else ""
        return [
            f"{what}: {repeated:.0%} of all runs of {min(PHRASE, rows.shape[1])} tokens repeat earlier ones{rest}: the same "
            "text again and again is no more than little text"
        ]
    return []


def repeated_share(rows: Tensor) -> float:
    """Share of the runs of PHRASE tokens in rows (R, T) that are repetitions of an earlier one, 0 to 1."""
    length = min(PHRASE, rows.shape[1])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1, 1 << 62, (length,), generator=generator) | 1
    count = rows.shape[1] - length + 1
    hashes = torch.zeros(len(rows), count, dtype=torch.int64)
    for i, factor in enumerate(factors):  # a linear hash modulo 2^64; int64 wraps round
        hashes += (rows[:, i : i + count] + 1) * factor
    return 1 - len(torch.unique(hashes)) / hashes.numel()


@dataclass(frozen=True)
class Baseline:
    """What anybody can predict of rows. unigram: see `unigram_perplexity`; tokens: that its frequencies come from."""

    vocabulary: int  # the perplexity of a uniform guess
    unigram: float | None
    tokens: int


def baseline(ids: Tensor, reported: int, vocab_size: int) -> Baseline:
    """Of the first ``reported`` rows of a pass, whose perplexity is reported; ids int64 (R, T) of all of them."""
    usable = ((ids >= 0) & (ids < vocab_size)).all(dim=1)  # as in the perplexity of a model: no rows of noise
    known = ids[usable]
    return Baseline(vocab_size, unigram_perplexity(known, ids[:reported][usable[:reported]], vocab_size), known.numel())


def unigram_perplexity(known: Tensor, scored: Tensor, vocab_size: int) -> float | None:
    """Perplexity of a model that knows nothing but how often each token occurs in ``known``, (R, T), on ``scored``, which is
    part of it. None where there is nothing to score.

    Each token is predicted from all the others (leave one out): p(t) = (c_t - 1 + D / V) / (N - 1 + D), where the number D of
    distinct tokens stands for the chance of a new one (Witten-Bell). With the token itself counted, few rows would predict
    themselves.
    """
    targets = scored[:, 1:].flatten()
    if not targets.numel():
        return None
    counts = torch.bincount(known.flatten(), minlength=vocab_size).double()
    distinct = int((counts > 0).sum())
    p = ((counts - 1).clamp(min=0) + distinct / vocab_size) / (known.numel() - 1 + distinct)
    return float((-p.log()[targets].mean()).exp())
