"""What rows of tokens say about themselves: how varied they are, and how well counting alone predicts them.

A Hessian of one repeated character, or of one page fifty times over, describes no text; what is calibrated on it is fitted to
nothing. And a model that predicts text no better than the frequencies of its tokens does not fit its tokenizer, its config or
its own weights: `unigram_perplexity` is what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEW_TOKENS = 32  # distinct ones; bytes of plain English are about 60
FEW_EFFECTIVE = 8.0  # exp of the entropy of the tokens: bytes of plain English have 18
MOST_COMMON = 0.4  # share of one token; in ordinary text, the end of line in code included, at most 0.2
PHRASE = 32  # tokens
_ODD = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9], np.uint64)  # of splitmix64
_BASE = np.uint64(0x94D049BB133111EB)
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
    """Share of the runs of PHRASE tokens in rows (R, T) that are repetitions of an earlier one, 0 to 1.

    Runs are compared by a polynomial hash modulo 2^64 of mixed tokens, from sums along the rows: 25 ms for 115 rows of 2048,
    where a sum of 32 products for each run took a second.
    """
    length = min(PHRASE, rows.shape[1])
    mixed = (rows.numpy().astype(np.uint64) + np.uint64(1)) * _ODD[0]
    mixed = (mixed ^ (mixed >> np.uint64(32))) * _ODD[1]
    powers, inverse = np.ones(rows.shape[1], np.uint64), np.ones(rows.shape[1], np.uint64)
    np.multiply.accumulate(np.full(rows.shape[1] - 1, _BASE, np.uint64), out=powers[1:])
    np.multiply.accumulate(np.full(rows.shape[1] - 1, pow(int(_BASE), -1, 1 << 64), np.uint64), out=inverse[1:])
    sums = np.zeros((len(rows), rows.shape[1] + 1), np.uint64)
    np.cumsum(mixed * powers, axis=1, out=sums[:, 1:])
    hashes = np.sort((sums[:, length:] - sums[:, :-length]) * inverse[: rows.shape[1] - length + 1], axis=None)
    return int((hashes[1:] == hashes[:-1]).sum()) / hashes.size


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
