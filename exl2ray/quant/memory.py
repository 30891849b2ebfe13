"""How much to do at once: rows per forward and working memory of the solver, from shapes and the device's size.

The choice depends on the device's *total* memory, never on what is free at the moment, so that two runs on one kind of
device batch alike and give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exl2ray.cuda.small_batches import GRAPH_SHARE
from exl2ray.cuda.small_batches import device_bytes as device_bytes
from exl2ray.formats import roles
from exl2ray.quality import DAMPING, Settings
from exl2ray.quant.block import Module
from exl2ray.quant.hessian import FLOAT64_ROWS
from exl2ray.quant.qparams import MOE_TABLE, distinct_options
from exl2ray.quant.solve import BYTES_PER_WEIGHT

# On CPUs, whatever memory there is: tokens of a forward, working memory of a solver batch, what enters second linears.
CPU_BATCH_TOKENS = 8192
CPU_SOLVER_BYTES = 2 << 30
CPU_KEEP_BYTES = 256 << 20
# Shares of a GPU's memory: candidates of a module, one solver batch, activations of a forward. Besides these a module needs
# its weights, Hessians and, at factorisation, two K x K matrices; recorded graphs keep their buffers.
CANDIDATE_SHARE = 0.3
SOLVER_SHARE = 0.2
ACTIVATION_SHARE = 0.2
ROOM_SHARE = 0.95  # what modules, states and recorded graphs may take together; the rest is fragmentation
STATE_SETS = 3  # of hidden states beside a module, where they stay on the GPU
CORRECTED_STATE_SETS = 4  # with corrected targets: entry and output, each in the quantised and in the source model
PARTIAL_SUMS = 3  # of Hessians that wait for their sibling in the tree of shares
SUMS_SHARE = 0.15  # such sums; more of them wait in host memory
KEEP_SHARE = 0.1  # what enters second linears, if that much is left
EXPERT_SHARE = 0.1  # scoring of one expert's tokens
# A GPU that has room for a factor that is not needed yet, and at most so much of it: 14336 inputs on an H200; 28672 inputs
# would take the room of states that wait for their module.
ROOMY_BYTES, AHEAD_SHARE = 40 << 30, 0.02
# A linear that is being quantised for good, per weight: error float32, sorted copy float32, result twice in half precision,
# integers twice.
SOLVED_BYTES = 14
NORM_BYTES_PER_TOKEN = 1 << 17  # the final norm: states in and out in float32, hidden sizes up to 16384


def settings_for(module: Module, rows: int, tokens: int, device: torch.device, damping: float) -> Settings:
    """Batch sizes for one module; ``rows`` calibration rows of ``tokens`` tokens."""
    if device.type != "cuda":
        return Settings(damping, max(1, min(rows, CPU_BATCH_TOKENS // tokens)), CPU_SOLVER_BYTES)
    return settings_within(module, rows, tokens, device_bytes(device), damping)


def settings_within(module: Module, rows: int, tokens: int, total: int, damping: float) -> Settings:
    """`settings_for` on a GPU of ``total`` bytes."""
    candidates = candidate_bytes(module)
    offload = candidates > CANDIDATE_SHARE * total
    solver = int(total * SOLVER_SHARE)
    per_row = max(1, tokens * _bytes_per_token(module))
    batch = max(1, min(rows, int(total * ACTIVATION_SHARE) // per_row))
    ahead = total >= ROOMY_BYTES and not offload and ahead_bytes(module) <= AHEAD_SHARE * total
    return Settings(damping, batch, solver, offload, _expert_tokens(module, total), ahead)


def states_fit(
    modules: Sequence[Module], state_bytes: int, tokens: int, device: torch.device, corrected: bool,
    measuring: bool,
) -> bool:  # fmt: skip
    """Whether hidden states of ``state_bytes`` stay on the GPU: if the largest module has room beside them."""
    if device.type != "cuda":
        return False
    return states_fit_within(modules, state_bytes, tokens, device_bytes(device), corrected, measuring)


def states_fit_within(
    modules: Sequence[Module], state_bytes: int, tokens: int, total: int, corrected: bool = False, measuring: bool = True
) -> bool:
    """`states_fit` on a GPU of ``total`` bytes."""
    return room_within(modules, state_bytes, tokens, total, corrected, measuring) >= 0


def room_for_contexts(
    modules: Sequence[Module], state_bytes: int, tokens: int, device: torch.device, measuring: bool = True
) -> int:
    """Bytes for results of reference passes that wait for their module's turn; on CPUs no limit."""
    if device.type != "cuda":
        return 1 << 62
    return max(0, room_within(modules, state_bytes, tokens, device_bytes(device), False, measuring))


def context_bytes(module: Module, state_bytes: int) -> int:
    """What waits for a module's turn: its output states and its Hessians."""
    return state_bytes + hessian_bytes(module)


def room_within(
    modules: Sequence[Module], state_bytes: int, tokens: int, total: int, corrected: bool, measuring: bool = True
) -> int:
    """Bytes that the largest module leaves free beside states of ``state_bytes``, on a GPU of ``total`` bytes.

    Negative if they do not fit. A pass holds three sets of states: entry, target and output.

    corrected: with corrected targets (`exl2ray.quant.correct`), which take a fourth set, and sums of their own. measuring:
    with all options of a module, which quantising never has: a layer of Mixtral measures in 86 GB of a GPU of 150, and
    quantises in 41.
    """
    worst = 0
    for module in modules:
        settings = settings_within(module, max(1, state_bytes // (2 * tokens * _hidden(module))), tokens, total, DAMPING)
        sums = hessian_bytes(module) + (cross_bytes(module) if corrected else 0)
        partial = 0 if sums_on_host_within(module, total, corrected) else PARTIAL_SUMS * sums
        extra = _correction_bytes(module) if corrected else 0
        peak = max(peak_bytes(module, settings, tokens, 0).values())
        worst = max(worst, partial + extra + (peak if measuring else min(peak, _quantizing(module, settings, tokens))))
    sets = CORRECTED_STATE_SETS if corrected else STATE_SETS
    return int((ROOM_SHARE - GRAPH_SHARE) * total) - worst - sets * state_bytes


def keep_bytes(modules: Sequence[Module], state_bytes: int, tokens: int, device: torch.device) -> int:
    """Bytes for what enters the second linears of a module until these are quantised, beside states of ``state_bytes`` (0:
    they are in main memory). With corrected targets, which compute it beforehand."""
    return CPU_KEEP_BYTES if device.type != "cuda" else keep_bytes_within(modules, state_bytes, tokens, device_bytes(device))


def keep_bytes_within(modules: Sequence[Module], state_bytes: int, tokens: int, total: int) -> int:
    """`keep_bytes` on a GPU of ``total`` bytes."""
    return max(0, min(int(KEEP_SHARE * total), room_within(modules, state_bytes, tokens, total, True, measuring=False)))


def middle_bytes(module: Module, rows: int, tokens: int, itemsize: int) -> int:
    """What enters the second linear of a module of one half; 0 for others."""
    second = [x for x in module.linears if x.role in roles.WRITERS]
    return rows * tokens * itemsize * second[0].in_features if module.kind in ("attention", "mlp") and second else 0


def sums_on_host(module: Module, device: torch.device, corrected: bool) -> bool:
    """Whether sums of Hessians over shares of the rows wait in host memory (`exl2ray.quant.rows`)."""
    return device.type == "cuda" and sums_on_host_within(module, device_bytes(device), corrected)


def sums_on_host_within(module: Module, total: int, corrected: bool = False) -> bool:
    """`sums_on_host` on a GPU of ``total`` bytes."""
    sums = hessian_bytes(module) + (cross_bytes(module) if corrected else 0)
    return PARTIAL_SUMS * sums > SUMS_SHARE * total


def recorded_bytes(modules: Sequence[Module], total: int) -> int:
    """At most what recorded solver batches of these modules keep on a GPU of ``total`` bytes, until memory runs out."""
    groups = {(m.kind, x.input_group): _solver_bytes(m, x.input_group) for m in modules for x in m.linears}
    return min(sum(groups.values()), int(GRAPH_SHARE * total))


def _factor_bytes(k: int) -> int:
    """What factorising a K x K Hessian takes beside it."""
    return (8 if k > FLOAT64_ROWS else 4) * k * k + 4 * k * k


def ahead_bytes(module: Module) -> int:
    """At most what factors take that are made while others are used: that of one input, of experts those of one, beside the
    first factor of the expert in hand, which has to stay meanwhile."""
    widths = {x.in_features for x in module.linears}
    if module.kind == "moe":
        return sum(map(_factor_bytes, widths)) + 4 * min(widths) ** 2
    return max(map(_factor_bytes, widths), default=0)


def hessian_bytes(module: Module) -> int:
    inputs = {x.input_group: x.in_features for x in module.linears}
    return sum(4 * k * k for k in inputs.values())


def cross_bytes(module: Module) -> int:
    """Products that corrected targets are made of: K x K for linears on a common input, K x N for those that write back."""
    if not module.quantized:
        return 0
    second = [x for x in module.linears if x.role in roles.WRITERS]
    first: dict[str, int] = {x.input_group: x.in_features for x in module.linears if x not in second}
    sizes = [k * k for k in first.values()] + [x.weights for x in second]
    return 4 * sum(sizes)


def _correction_bytes(module: Module) -> int:
    """What corrected targets add to the peak of a module: the products, the targets, the source weights."""
    return cross_bytes(module) + 4 * sum(x.weights for x in module.linears)


def _hidden(module: Module) -> int:
    return min((x.in_features for x in module.linears), default=1)


def peak_bytes(module: Module, settings: Settings, tokens: int, states_bytes: int) -> dict[str, int]:
    """Estimate of the most GPU memory that each stage of measuring a module takes, in bytes; on GPUs, from shapes.

    states_bytes: of one set of hidden states if they are kept on the GPU, else 0; two of them count, entry and output.
    Stages: "reference" (forward and Hessians
    of all inputs), "solve" (one input's factor and one solver batch, beside all Hessians and, unless they are offloaded, all
    candidates), "score" (one batch of rows, beside the candidates). The Hessians of experts stay until the end: one that saw
    few tokens borrows from all of them.
    """
    weights = sum(2 * x.weights for x in module.linears)
    inputs = {x.input_group: x.in_features for x in module.linears}
    resident = weights + hessian_bytes(module) + 2 * states_bytes
    candidates = 0 if settings.offload else candidate_bytes(module)
    activations = settings.batch_rows * tokens * _bytes_per_token(module)
    largest = max(inputs.values(), default=0)
    factor, coming = _factor_bytes(largest), ahead_bytes(module) if settings.ahead else 0
    one_batch = min(settings.budget_bytes or 0, max((_solver_bytes(module, group) for group in inputs), default=0))
    expert = (settings.expert_tokens or 0) * _expert_bytes_per_token(module)
    one_candidate = max((2 * x.padded_weights for x in module.linears), default=0)
    return {
        "reference": resident + activations,
        "solve": resident + candidates + max(factor, 4 * largest * largest + one_batch + coming),
        "score": resident + candidates + activations + expert + (one_candidate if settings.offload else 0),
    }


def _quantizing(module: Module, settings: Settings, tokens: int) -> int:
    """The most that quantising a module takes, in bytes, beside states and sums that wait: its weights twice (those of the
    source model, and the reconstructed ones), all Hessians, and a batch of a forward pass or what is being solved."""
    weights = sum(2 * x.weights for x in module.linears)
    members: dict[str, list[int]] = {}
    for x in module.linears:
        members.setdefault(x.input_group, []).append(x.padded_weights)
    factor = _factor_bytes(max((x.in_features for x in module.linears), default=0))
    if settings.ahead:
        factor += ahead_bytes(module)
    solved = SOLVED_BYTES * max((sum(m) for m in members.values()), default=0)
    if module.kind == "moe":  # some experts are solved side by side, if they are small
        solved = max(solved, min(SOLVED_BYTES * sum(map(sum, members.values())), settings.budget_bytes or 0))
    activations = settings.batch_rows * tokens * _bytes_per_token(module)
    return 2 * weights + hessian_bytes(module) + max(activations, factor + solved)


def _solver_bytes(module: Module, group: str) -> int:
    """Working memory of the options of the linears on one input, solved in one batch."""
    members = [x for x in module.linears if x.input_group == group]
    return sum(BYTES_PER_WEIGHT * _options(x.role) * x.padded_weights for x in members)


def _expert_tokens(module: Module, total: int) -> int | None:
    """Tokens of one expert that are scored at once; None for a dense module."""
    per_token = _expert_bytes_per_token(module)
    return max(256, int(total * EXPERT_SHARE) // per_token) if per_token else None


def _expert_bytes_per_token(module: Module) -> int:
    """What scoring one token of one expert keeps: outputs of all options of w1 and w3, an input of w2 and its outputs."""
    width = max((x.in_features for x in module.linears if x.role == "w2"), default=0)
    hidden = max((x.in_features for x in module.linears if x.role == "w1"), default=0)
    return 2 * width * (_options("w1") + _options("w3") + 2) + 12 * hidden if width else 0


def _options(role: str) -> int:
    """Distinct options in the table of a role; 1 for the head."""
    return max(1, len(distinct_options(role)))


def candidate_bytes(module: Module) -> int:
    """Reconstructed weights of all distinct options of a module, in half precision."""
    return sum(2 * _options(x.role) * x.padded_weights for x in module.linears)


def _bytes_per_token(module: Module) -> int:
    """Activations of the scoring forward: every distinct option's outputs of the first linears at once, in half precision."""
    widest = 0
    first = [x for x in module.linears if x.role in (*roles.ATTENTION, *roles.MLP) and x.role not in roles.WRITERS]
    widest += sum(2 * _options(x.role) * x.padded_out for x in first)
    if module.kind == "moe":  # sums of every table row in float32; inputs, outputs and weighted outputs of the chosen experts
        widest += (4 * len(MOE_TABLE.rows) + 16) * max(x.in_features for x in module.linears if x.role == "w1")
    if not module.linears:
        return NORM_BYTES_PER_TOKEN
    hidden: int = max(x.in_features for x in module.linears)
    return widest + 16 * hidden + (8 * module.linears[0].padded_out if module.kind == "head" else 0)
