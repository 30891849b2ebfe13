"""The end of a tuning: what of the best state is kept, by the divergences of held-out rows, in the words of the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exl2ray.model.blocks import Block
from exl2ray.tune import judge
from exl2ray.tune.evaluating import Evaluator
from exl2ray.tune.opening import Pair, install_snapshot, load_finished, parts_of
from exl2ray.tune.shelves import Shelf
from exl2ray.tune.state import Saved

MakeShelf = Callable[[Callable[[int], Block]], Sequence[Block]]


def decided(
    pair: Pair, saved: Saved, evaluate: Evaluator, kinds: Sequence[str], device: torch.device, shelf: MakeShelf
) -> dict[str, Any]:
    """All members of a group call it together. shelf: where the blocks of the finished model are, all or one at a time.

    What comes of it is JSON: kept, words, ratio, worse (`exl2ray.tune.judge.Verdict`), before and after (divergences of the
    rows), steps (of the best state), peak_bytes (of the GPU's memory).
    """
    modules = pair.start.spec.modules
    blocks = shelf(lambda i: load_finished(pair, modules[i], device))
    before = evaluate(blocks)

    def variant(index: int, parts: frozenset[str]) -> Block:
        block = blocks[index]
        install_snapshot(pair, block, device, saved.best(modules[index].profile_key), parts)
        return block

    def evaluated(parts: frozenset[str]) -> Tensor:
        return evaluate(Shelf(len(blocks), lambda i: variant(i, parts)))

    verdict = judge.decide(before, parts_of(pair.start.spec, pair), evaluated, kinds)
    return {
        "kept": list(verdict.kept), "words": verdict.words, "ratio": verdict.ratio, "worse": list(verdict.worse),
        "before": before.tolist(), "after": verdict.rows.tolist(), "steps": saved.progress.scores[saved.progress.best][0],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }  # fmt: skip
