"""The sensitivity pass: forward through the source model, keeping the states before every module, then backward.

Rows of tokens are cut into shares, each computed by itself in batches of one shape. So the results are the same for any
number of workers, however the shares are dealt out, and a share that is finished never has to be computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from exl2ray.errors import NumericError
from exl2ray.model.blocks import Block, check_states
from exl2ray.model.half import attention_by_products
from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.model.weights import forget_pinned
from exl2ray.quant.sensitivity import Sums, add, column_weights, head_backward, module_backward
from exl2ray.store.file_names import MEASURE
from exl2ray.store.records import Record
from exl2ray.team.member import Member
from exl2ray.team.messages import Begun, ItemResult, SensitivityPass, hand_key
from exl2ray.team.runner import Runner

ROWS, TOKENS = 16, 512  # of the tokens that the pass runs on: many short texts say more than a few long ones
SHARE_ROWS = 2  # at a time, and what workers share out
SYNTHETIC = {"random", "shuffled", "noise"}  # kinds of calibration rows that are no text

PROBES = 3  # changes with what is measured here
ModelSums = dict[str, Sums]  # module -> role -> sums over the tokens of a share
Sensitivities = dict[str, dict[str, list[float]]]  # module -> role -> [KL per token, squared error per token]


def sensitivity(worker: Member, part: SensitivityPass) -> Iterator[Begun | ItemResult]:
    """Backward passes over some shares of rows each; a record per share."""
    worker.let_go()
    for index in worker.until_taken(part.hands):
        hand = part.hands[index]
        key = hand_key(hand)
        yield worker.begin(Begun("sensitivity", index, key))
        begin = time.monotonic()
        found = backward_pass(worker.runner, hand, part.tokens)
        seconds = (time.monotonic() - begin) / len(found)
        for share, sums in found.items():
            worker.runner.records.commit(sensitivity_record(share, sums, part.inputs_hash, seconds))
        rows = sum(len(r) for r in hand.values())
        yield worker.result(index, key, begin, f"{rows} rows of {part.tokens} tokens", {"sums": found})


def backward_pass(runner: Runner, shares: Mapping[int, tuple[int, ...]], tokens: int) -> dict[int, ModelSums]:
    """Sums of the gradients of all linears over each share of rows, ``tokens`` of each row.

    Raises NumericError where one is not finite.
    """
    spec = runner.spec
    modules = spec.modules[1:]
    every = [r for rows in shares.values() for r in rows]
    nbytes = 4 * len(every) * tokens * spec.hyper.hidden_size * len(modules)
    home = runner.home(nbytes)
    if home.type != runner.device.type:
        forget_pinned()  # of measuring: the states are as large as all the rest
    ids = runner.rows("measure")[every, : tokens]
    size = max(1, SHARE_ROWS // runner.shrink.get(runner.in_hand, 1))
    batches = _batches(shares, size)
    embedded = runner.load_for_gradients(spec.modules[0], modules[:2]).forward(ids).to(home)
    kept = [[embedded[b] for b in batches]]
    blocks = _Blocks(runner, room=_room_for_blocks(runner, nbytes))
    for i, module in enumerate(modules[:-1]):  # kept: before each module, the head included
        block = blocks.forward(module, modules[i + 1 : i + 3])
        kept.append([block.forward(x.to(runner.device)).float().to(home) for x in kept[-1]])
        for x in kept[-1]:
            check_states(x, f"output of {module.profile_key}")
    out: dict[int, ModelSums] = {share: {} for share in shares}
    owner = [share for share, rows in shares.items() for _ in range(0, len(rows), size)]
    gradients: list[torch.Tensor] = []
    for i in range(len(modules) - 1, -1, -1):
        module = modules[i]
        block = blocks.backward(module, modules[max(0, i - 2) : i][::-1])
        columns, states = column_weights(block), kept.pop()
        if module.kind == "head":
            signs = [torch.Generator(runner.device).manual_seed(share) for share in owner]
            found = [head_backward(block, x, g, columns) for x, g in zip(states, signs, strict=True)]
        else:
            with attention_by_products():
                pairs = zip(states, gradients, strict=True)
                found = [module_backward(block, x, g, columns, runner.device) for x, g in pairs]
        gradients = [g for g, _ in found]
        for share, (_, sums) in zip(owner, found, strict=True):
            if sums:
                add(out[share].setdefault(module.profile_key, {}), sums)
        _check(module.profile_key, [sums for _, sums in found])
    return out


def _room_for_blocks(runner: Runner, nbytes: int) -> int:
    """Beside states of ``nbytes``. None on a CPU, where reading is little work beside the rest, and none after running out of
    memory: there was less than the size of the GPU says."""
    crowded = runner.shrink.get(runner.in_hand, 1) > 1
    return 0 if crowded or runner.device.type != "cuda" else runner.room(nbytes) // 2


class _Blocks:
    """Modules with their weights, each needed twice: the last ones that fit into ``room`` bytes stay for the way back."""

    def __init__(self, runner: Runner, room: int) -> None:
        self._runner, self._room = runner, room
        self._kept: dict[int, tuple[Block, int]] = {}  # in order

    def forward(self, module: ModuleSpec, coming: Sequence[ModuleSpec]) -> Block:
        block = self._runner.load_for_gradients(module, coming)
        nbytes = sum(w.numel() * w.element_size() for w in block.weights.values())
        self._kept[module.index] = block, nbytes
        while self._kept and sum(n for _, n in self._kept.values()) > self._room:
            del self._kept[next(iter(self._kept))]
        return block

    def backward(self, module: ModuleSpec, coming: Sequence[ModuleSpec]) -> Block:
        coming = [m for m in coming if m.index not in self._kept]
        if module.index not in self._kept:
            return self._runner.load_for_gradients(module, coming)
        self._runner.fetch(coming)
        return self._kept.pop(module.index)[0]


def _batches(shares: Mapping[int, Sequence[int]], size: int) -> list[slice]:
    """Places, among the rows of all shares, of the rows that are computed together."""
    out, start = [], 0
    for rows in shares.values():
        for first in range(0, len(rows), size):
            out.append(slice(start + first, start + min(first + size, len(rows))))
        start += len(rows)
    return out


def _check(key: str, found: Sequence[Sums]) -> None:
    for sums in found:
        for role, values in sums.items():
            if not all(math.isfinite(v) for v in values):
                raise NumericError(
                    f"{key}, {role}: gradients are not finite (sums {values[0]} and {values[1]})",
                    "the model's activations may be too large, or its weights are broken",
                )


def sensitivities(spec: ModelSpec, shares: Mapping[int, ModelSums], tokens: int) -> Sensitivities:
    """The sensitivities that all shares together say; ``tokens`` of all shares. A role without tokens has [0, 0]."""
    out: Sensitivities = {}
    for module in spec.modules:
        if not module.linears:
            continue
        total: Sums = {role: [0.0, 0.0] for role in dict.fromkeys(x.role for x in module.linears)}
        for share in sorted(shares):  # a fixed order: the bits do not depend on who finished first
            add(total, shares[share].get(module.profile_key, {}))
        out[module.profile_key] = {role: [v / tokens for v in values] for role, values in total.items()}
    return out


def sensitivity_key(share: int) -> str:
    """Key of the record of a share."""
    return f"sensitivity-{share}"


def sensitivity_record(share: int, sums: ModelSums, inputs_hash: str, seconds: float) -> Record:
    """The record of one share."""
    return Record(MEASURE, sensitivity_key(share), inputs_hash, {"sums": sums}, (), seconds)


def share_rows_out(kinds: Sequence[str], length: int) -> tuple[dict[int, tuple[int, ...]], int]:
    """(share -> row numbers, tokens of each row) of the rows that the pass runs on: text, spread evenly over the set."""
    usable = [i for i, kind in enumerate(kinds) if kind not in SYNTHETIC] or list(range(len(kinds)))
    count = min(ROWS, len(usable))
    rows = [usable[i * len(usable) // count] for i in range(count)]
    shares = {n: tuple(rows[i : i + SHARE_ROWS]) for n, i in enumerate(range(0, count, SHARE_ROWS))}
    return shares, min(TOKENS, length)


def deal(shares: Mapping[int, tuple[int, ...]], hands: int) -> list[dict[int, tuple[int, ...]]]:
    """Shares in ``hands`` portions of about equal size, or as many as there are shares."""
    numbers = list(shares)
    hands = min(hands, len(numbers))
    return [{n: shares[n] for n in numbers[h::hands]} for h in range(hands)]
