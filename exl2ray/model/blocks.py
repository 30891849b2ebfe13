"""Forward passes, one module at a time: ``load_block`` reads a module's weights, ``Block.forward`` advances the states.

States are (R, T, hidden) tensors, R calibration rows of T tokens, in ``state_dtype`` (float16, or float32 where the
family keeps its residual stream so). Linears run in the compute dtype, norms, softmax and RoPE in float32. Rows are
independent: callers choose how many to pass at once. Nothing here waits for the GPU except the routing of experts and
noise rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import CalibrationError, NumericError
from exl2ray.formats.layout import FLOAT16_MAX
from exl2ray.formats.readahead import TensorReader
from exl2ray.model.half import AttentionHalf, Capture, Half, LinearBank, MlpHalf, Norm, chosen
from exl2ray.model.moe import Expert, ExpertBank, Routing, route
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.model.weights import read_linear, read_tensor

__all__ = ["Block", "Half", "Routing", "check_states", "load_block"]

MAX_INFINITE_SHARE = 0.005  # of the elements; more infinities than this are an error
NOISE_SEED = 0

LinearReader = Callable[[ModelSpec, LinearSpec, Any], tuple[Tensor, Tensor | None]]


class Block(ABC):
    """One module with its weights. weights[key] (K, N) and biases[key] (N,) are in compute dtype."""

    def __init__(self, spec: ModelSpec, module: ModuleSpec, bank: LinearBank, state_dtype: torch.dtype) -> None:
        self.spec = spec
        self.module = module
        self.bank = bank
        self.state_dtype = state_dtype
        self.halves: tuple[Half, ...] = ()

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.bank.weights

    @property
    def biases(self) -> dict[str, Tensor]:
        return self.bank.biases

    def set_weight(self, key: str, weight: Tensor) -> None:
        """Replace a linear's weight by (K, N) or the padded (K, N32); it is moved and cast as needed."""
        self.bank.set_weight(key, weight)

    @abstractmethod
    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        """States before the module -> states after it. capture(input_group, inputs (tokens, K)) is called per group."""

    def forward_some(self, x: Tensor, rows: slice | None, capture: Capture | None = None) -> Tensor:
        """States after the module of some of the rows x alone (None: of all); what is captured is of all. Halves make
        their last product for these rows only."""
        return chosen(self.forward(x, capture), rows)


class EmbeddingBlock(Block):
    """Token ids (R, T) int64 -> states (R, T, hidden). Ids outside the table count as id 0."""

    table: Tensor  # (vocab, hidden)

    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        """For families with noise rows, rows whose first id is negative become Gaussian noise.

        Its mean and standard deviation are those of all other rows of this call, so pass all rows at once.
        """
        ids = x.to(self.table.device)
        known = (ids >= 0) & (ids < self.table.shape[0])
        states = self.table[torch.where(known, ids, torch.zeros_like(ids))].to(self.state_dtype)
        scale = self.spec.hyper.embedding_scale
        if scale != 1.0:
            states = (states.float() * scale).to(self.state_dtype)
        if self.spec.arch.noise_rows is not None:
            noisy = ids[:, 0] < 0
            if bool(noisy.any()):
                states[noisy] = self._noise(states[~noisy], int(noisy.sum()))
        return states

    def _noise(self, others: Tensor, rows: int) -> Tensor:
        """(rows, T, hidden) noise, the same on every device."""
        if others.numel() == 0:
            raise CalibrationError("all calibration rows are noise rows; their statistics need a row of text")
        std, mean = torch.std_mean(others.float())
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noise = torch.randn(rows, *others.shape[1:], generator=generator).to(others.device)
        return (noise * std + mean).to(self.state_dtype)


class PositionsBlock(Block):
    """Adds learned position embeddings."""

    table: Tensor  # (positions, hidden)

    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        return self.added(x, 0)

    def added(self, x: Tensor, start: int) -> Tensor:
        """x (R, T, hidden) plus the embeddings of the positions start .. start + T - 1."""
        stop = start + x.shape[1]
        if stop > self.table.shape[0]:
            raise CalibrationError(
                f"rows of {stop} tokens, but the model has {self.table.shape[0]} learned positions",
                f"use -l {self.table.shape[0]} or less",
            )
        return x + self.table[start:stop].to(x.dtype)


class SequentialBlock(Block):
    """Attention or MLP: one half, residual included."""

    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        return self.forward_some(x, None, capture)

    def forward_some(self, x: Tensor, rows: slice | None, capture: Capture | None = None) -> Tensor:
        half = self.halves[0]
        return half.post(chosen(x, rows), half.branch(half.pre(x), capture, rows))


class ParallelBlock(Block):
    """x + attention(n) + mlp(n) with n = norm(x); n is captured once, as "qkv"."""

    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        return self.forward_some(x, None, capture)

    def forward_some(self, x: Tensor, rows: slice | None, capture: Capture | None = None) -> Tensor:
        attention, mlp = self.halves
        n = attention.pre(x)

        def without_shared(group: str, inputs: Tensor) -> None:
            if capture is not None and group != attention.first[0].input_group:
                capture(group, inputs)

        own = chosen(x, rows)
        a = attention.post(own, attention.branch(n, capture, rows))
        m = mlp.post(own, mlp.branch(n, None if capture is None else without_shared, rows))
        return own + a.to(x.dtype) + m.to(x.dtype)


class MoeBlock(Block):
    """Router and experts. The stages are public: route once, then run the experts with any candidate weights."""

    experts: ExpertBank

    def pre(self, x: Tensor) -> Tensor:
        """x (R, T, hidden) state dtype -> normed (R, T, hidden) compute dtype."""
        return self.experts.norm(x, self.bank.dtype)

    def route(self, h: Tensor) -> Routing:
        """h (tokens, hidden) -> Routing; waits for the GPU once."""
        return route(self.experts.router, h, self.experts.per_token)

    def forward_experts(
        self,
        h: Tensor,
        routing: Routing,
        weights: Mapping[str, Tensor] | None = None,
        capture: Capture | None = None,
    ) -> Tensor:
        """h (tokens, hidden) -> (tokens, hidden). weights: candidates by linear key, in place of the stored ones."""
        return self.experts.forward(h, routing, weights, capture)

    def inputs_of_all_experts(self, x: Tensor) -> Iterator[tuple[str, Tensor, int]]:
        """What the linears of every expert would see if all tokens went to it: (input group, (tokens, K), tokens routed)."""
        h = self.pre(x).flatten(0, -2)
        for expert, count in zip(self.experts.experts, self.route(h).counts, strict=True):
            yield expert.gate.input_group, h, count
            yield expert.down.input_group, self.experts.mid(expert, h), count

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual addition; the residual multiplier does not apply to experts."""
        return x + y.reshape(x.shape).to(x.dtype)

    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        h = self.pre(x).flatten(0, -2)
        return self.post(x, self.forward_experts(h, self.route(h), None, capture))


class NormBlock(Block):
    """Final norm: states -> (R, T, hidden) in compute dtype."""

    norm: Norm

    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        return self.norm(x, self.bank.dtype)


class HeadBlock(Block):
    """Normed states -> logits (R, T, vocab) float32, logit multiplier and softcap applied."""

    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor:
        n = x.to(self.bank.dtype)
        head = self.module.linears[0]
        if capture is not None:
            capture(head.input_group, n.flatten(0, -2))
        logits = self.bank.linear(head, n).float()
        h = self.spec.hyper
        if torch.is_grad_enabled() and logits.requires_grad:  # as below, without overwriting what a backward pass needs
            logits = logits * h.logit_scale
            return logits if h.logit_softcap is None else h.logit_softcap * torch.tanh(logits / h.logit_softcap)
        if h.logit_scale != 1.0:
            logits = logits.mul_(h.logit_scale)
        if h.logit_softcap is not None:
            logits = logits.div_(h.logit_softcap).tanh_().mul_(h.logit_softcap)
        return logits


def load_block(
    spec: ModelSpec,
    module: ModuleSpec,
    source: TensorReader,
    device: torch.device | str,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None = None,
    read: LinearReader | None = None,
) -> Block:
    """Read the weights of one module and build its forward pass.

    dtype: of the linears (float16 on GPUs, float32 on CPUs). state_dtype: None for the family's own. read: where the
    linears come from; None reads the source, a reader that dequantises runs an EXL2 model. Raises SourceError.
    """
    device = torch.device(device)
    bank = LinearBank(module.linears, dtype)
    for linear in module.linears:
        weight, bias = read_linear(spec, linear, source, device, dtype) if read is None else read(spec, linear, source)
        # two steps: in one, the conversion would run on the CPU
        bank.weights[linear.key] = bank.fitted(linear, weight).to(device, non_blocking=True).to(dtype)
        if bias is not None:
            bank.biases[linear.key] = bias[: linear.out_features].to(device, dtype)
    plain = {p.role: read_tensor(spec, p, source, device, dtype) for p in module.plain}
    block = _BLOCKS[module.kind](spec, module, bank, state_dtype or getattr(torch, spec.hyper.state_dtype))
    if isinstance(block, (EmbeddingBlock, PositionsBlock)):
        block.table = next(iter(plain.values()))
    elif isinstance(block, NormBlock):
        block.norm = _norm(spec, plain)
    elif isinstance(block, MoeBlock):
        block.experts = _experts(spec, module, bank, plain)
    elif isinstance(block, ParallelBlock):
        block.halves = (_attention(spec, module, bank, plain, device), _mlp(spec, module, bank, plain))
    elif module.kind == "attention":
        block.halves = (_attention(spec, module, bank, plain, device),)
    elif module.kind == "mlp":
        block.halves = (_mlp(spec, module, bank, plain),)
    return block


_BLOCKS: dict[str, type[Block]] = {
    "embedding": EmbeddingBlock,
    "positions": PositionsBlock,
    "attention": SequentialBlock,
    "mlp": SequentialBlock,
    "moe": MoeBlock,
    "parallel": ParallelBlock,
    "norm": NormBlock,
    "head": HeadBlock,
}
Plain = dict[str, Tensor]  # unquantised tensors of a module by role


def _norm(spec: ModelSpec, plain: Plain, role: str = "norm") -> Norm:
    rule = spec.arch.norm
    return Norm(rule.kind, plain[role], spec.hyper.norm_eps, rule.offset, plain.get(f"{role}.bias"))


def _post_norm(spec: ModelSpec, plain: Plain) -> Norm | None:
    return _norm(spec, plain, "post_norm") if "post_norm" in plain else None


def _head_norm(spec: ModelSpec, plain: Plain, role: str) -> Norm | None:
    rule = spec.arch.head_norm
    if rule is None or role not in plain:
        return None
    return Norm(rule.kind, plain[role], spec.hyper.norm_eps, rule.offset)


def _attention(spec: ModelSpec, module: ModuleSpec, bank: LinearBank, plain: Plain, device: torch.device) -> AttentionHalf:
    return AttentionHalf(
        bank,
        tuple(module.linear(f"{n}_proj") for n in "qkvo"),
        spec.hyper,
        module.layer or 0,
        device,
        _norm(spec, plain),
        _post_norm(spec, plain),
        _head_norm(spec, plain, "q_norm"),
        _head_norm(spec, plain, "k_norm"),
        add_residual=module.kind != "parallel",
    )


def _mlp(spec: ModelSpec, module: ModuleSpec, bank: LinearBank, plain: Plain) -> MlpHalf:
    linears = tuple(x for x in module.linears if x.role in ("gate_proj", "up_proj", "down_proj"))
    return MlpHalf(
        bank,
        linears,
        spec.hyper,
        spec.arch.activation,
        _norm(spec, plain),
        _post_norm(spec, plain),
        add_residual=module.kind != "parallel",
    )


def _experts(spec: ModelSpec, module: ModuleSpec, bank: LinearBank, plain: Plain) -> ExpertBank:
    gate, up, down = ([x for x in module.linears if x.role == role] for role in ("w1", "w3", "w2"))
    experts = tuple(Expert(*three) for three in zip(gate, up, down, strict=True))
    h = spec.hyper
    return ExpertBank(bank, experts, plain["router"], h.experts_per_token, spec.arch.activation, _norm(spec, plain))


def check_states(states: Tensor, where: str) -> int:
    """Check states after a module; returns how many infinities were clamped.

    Infinities, if fewer than 0.5 % of the elements, become +-65504 in place. Raises NumericError for any NaN and for
    more infinities. Waits for the GPU once.
    """
    if states.numel() == 0 or bool(torch.isfinite(torch.stack(states.aminmax())).all()):  # one pass, and it keeps a NaN
        return 0
    nans, infinities = torch.stack((states.isnan().sum(), states.isinf().sum())).tolist()
    if nans:
        raise NumericError(f"{where}: {nans} of {states.numel()} values are NaN", "the model or its weights are broken")
    if infinities >= MAX_INFINITE_SHARE * states.numel() and infinities:
        raise NumericError(
            f"{where}: {infinities} of {states.numel()} values are infinite",
            "the model's activations exceed float16; it may be meant for bfloat16 only",
        )
    if infinities:
        states.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    return int(infinities)
