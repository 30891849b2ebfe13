"""What a model consists of: frozen descriptions that every other room works with.

A ``ModelSpec`` lists the modules in execution order. Each ``ModuleSpec`` names the linears to quantise and the tensors to
store as they are, and where in the source each of them comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from exl2ray.formats.layout import StoredSize
from exl2ray.model.hyper import Hyper
from exl2ray.model.rotation import Rotation
from exl2ray.model.rules import Arch

ModuleKind = Literal["embedding", "positions", "attention", "mlp", "moe", "parallel", "norm", "head"]
PROFILE_SUFFIX: dict[str, str] = {
    "embedding": "embedding",
    "positions": "pos_emb",
    "attention": "self_attn",
    "mlp": "mlp",
    "moe": "block_sparse_moe",
    "parallel": "parallel_decoder",
    "norm": "norm",
    "head": "linear",
}


@dataclass(frozen=True)
class Stored:
    """A tensor of the source, or part of one.

    name, shape: as stored (-1: any size). ranges: index ranges [start, stop) along ``axis`` to join, in order; empty:
    everything. transpose: afterwards swap the two dimensions.
    """

    name: str
    shape: tuple[int, ...]
    axis: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    transpose: bool = False


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that the output stores unquantised, in float16.

    role: "embedding", "positions", "norm", "post_norm", "q_norm", "k_norm" or "router", with ".bias" for biases.
    repeat: number of times a 1-D tensor is stacked to 2-D (q/k norm weights: once per head); 0: stored as it is.
    fold: in a rotated model, the norm weight that a router takes up.
    """

    role: str
    output_name: str
    stored: Stored
    repeat: int = 0
    fold: Stored | None = None


@dataclass(frozen=True)
class LinearSpec(StoredSize):
    """One linear layer to quantise.

    role: "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3" or "lm_head".
    key: name in the output. input_group: the captured input that its Hessian comes from: "qkv", "o", "gate_up", "down",
    "w13.<expert>", "w2.<expert>" or "head". In a parallel block gate and up share "qkv": their input is the same one.
    weight: source of the (in_features, out_features) matrix. normalize: divide every column by its L2 norm.
    fold: in a rotated model, the norm weight (in_features,) that a linear reading the residual stream takes up.
    """

    role: str
    key: str
    in_features: int
    out_features: int
    input_group: str
    weight: Stored
    bias: Stored | None = None
    expert: int | None = None
    normalize: bool = False
    fold: Stored | None = None

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModuleSpec:
    """One step of the forward pass. ``index`` is its place in ``ModelSpec.modules``.

    Attention and MLP of a layer share ``key`` ("model.layers.3"); ``profile_key`` tells them apart.
    """

    index: int
    kind: ModuleKind
    key: str
    layer: int | None
    linears: tuple[LinearSpec, ...] = ()
    plain: tuple[PlainTensor, ...] = ()

    @property
    def profile_key(self) -> str:
        """Key in measurement.json, e.g. "model.layers.3.self_attn"."""
        return f"{self.key}.{PROFILE_SUFFIX[self.kind]}"

    @property
    def quantized(self) -> bool:
        """Whether the module is measured: attention, mlp, moe and parallel blocks."""
        return self.kind in ("attention", "mlp", "moe", "parallel")

    @property
    def weights(self) -> int:
        """Of all its linears."""
        return sum(x.weights for x in self.linears)

    def linear(self, role: str, expert: int | None = None) -> LinearSpec:
        """The linear with this role; KeyError if there is none."""
        for linear in self.linears:
            if linear.role == role and linear.expert == expert:
                return linear
        raise KeyError(f"{self.profile_key} has no {role}" + ("" if expert is None else f" of expert {expert}"))


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor that the output holds byte for byte, in the source's dtype (vision tower, projector)."""

    output_name: str
    source_name: str


@dataclass(frozen=True)
class ModelSpec:
    """A whole model.

    copied: what goes into the output as it is. tied: the head is read from the embedding. warnings: where ExLlamaV2
    runs this model differently from its definition, and other things worth telling. rotation: of the residual stream
    (`exl2ray.model.rotated`); everything read through `exl2ray.model.weights` has it.
    """

    arch: Arch
    hyper: Hyper
    modules: tuple[ModuleSpec, ...]
    copied: tuple[CopiedTensor, ...]
    tied: bool
    warnings: tuple[str, ...]
    rotation: Rotation | None = None

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear of the model, head included, in module order."""
        return tuple(linear for module in self.modules for linear in module.linears)

    @property
    def weights(self) -> int:
        """Of all linears, head included."""
        return sum(m.weights for m in self.modules)

    def needed_bos(self, of_tokenizer: Callable[[], int | None]) -> int | None:
        """What a row has to begin with: BOS of families that need it, as config.json or else the tokenizer has it."""
        if not self.arch.needs_bos:
            return None
        return of_tokenizer() if self.hyper.bos_token_id is None else self.hyper.bos_token_id

    @property
    def rotation_entry(self) -> dict[str, Any]:
        """{"rotation": what identifies it} of a rotated model, for hashes and files; empty for others."""
        return {} if self.rotation is None else {"rotation": self.rotation.identity()}
