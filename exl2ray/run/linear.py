"""One EXL2 linear as a torch module: tensors as they are in the file, multiplied without being unpacked where that pays.

torch.compile sees two operators, ``exl2ray::product`` and ``exl2ray::gradient``, which find the module by its number.
Tracing the module itself was tried: it fails under ``inference_mode`` at tensors made of NumPy arrays (torch 2.13).
"""

from __future__ import annotations

import itertools
import threading
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from exl2ray.cuda.run import Packed
from exl2ray.cuda.run_kernels import MAX_ROWS
from exl2ray.errors import FormatError, UsageError
from exl2ray.formats.exl2 import PackedLinear, groups_layout
from exl2ray.formats.layout import GroupLayout, pad32

_turn = threading.RLock()  # held during a product: launches are changed for each call, and not all of Numba's threads share
KERNEL_TYPES = (torch.float16, torch.bfloat16)  # of activations on a GPU
_numbers = itertools.count()
_linears: WeakValueDictionary[int, Exl2Linear] = WeakValueDictionary()


class Exl2Linear(torch.nn.Module):
    """y = x W + bias with W (in_features, out_features) packed; Q packed rows, G groups, N32 = out_features padded to 32.

    Buffers have the names, dtypes and shapes of the file, so ``state_dict`` is what the file holds.
    What the kernels need besides is derived at the first call, and anew after a move to another device.
    """

    q_weight: Tensor
    q_scale: Tensor
    q_scale_max: Tensor
    q_groups: Tensor
    q_invperm: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, packed_rows: int, groups: int, bias: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        n = pad32(out_features)
        shapes = {
            "q_weight": ((packed_rows, n), torch.int32), "q_scale": ((groups, n // 8), torch.int32),
            "q_scale_max": ((groups,), torch.float16), "q_groups": ((2 * groups,), torch.int16),
            "q_invperm": ((in_features,), torch.int32),
        }  # fmt: skip
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(n, dtype=torch.float16, device=device) if bias else None)
        self._packed: Packed | None = None
        self._register()

    def _register(self) -> None:
        self._number = next(_numbers)
        _linears[self._number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled, is a module of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    @classmethod
    def from_packed(cls, p: PackedLinear, device: Any = None, out_features: int | None = None) -> Exl2Linear:
        """The module of a linear that was read and checked (``PackedLinear.from_tensors``); keeps tensors that are there."""
        rows, groups = p.q_weight.shape[0], p.q_scale_max.shape[0]
        out = cls(p.in_features, out_features or p.out_features, rows, groups, p.bias is not None, "meta")
        for name, tensor in p.tensors().items():
            setattr(out, name.rsplit(".", 1)[1], tensor.to(device))
        return out

    @property
    def qweight(self) -> Tensor:
        """``q_weight`` under the name by which PEFT finds the device of quantised linears."""
        return self.q_weight

    @property
    def layout(self) -> GroupLayout:
        """Groups of stored rows; raises FormatError if ``q_groups`` is not legal."""
        return groups_layout(self.q_groups.tolist(), self.q_weight.shape[0])

    def packed(self) -> Packed:
        """The tensors for the kernels, on the device of ``q_weight``; derived once, or anew where they do not stay."""
        p = self._packed
        if p is None or p.q_weight is not self.q_weight:
            p = self._derive()
            self._packed = None if self._offloaded() else p
        return p

    def _offloaded(self) -> bool:
        """Whether accelerate takes the tensors off the device after each call."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))

    def _derive(self) -> Packed:
        if self.q_weight.is_cuda:
            check_device(self.q_weight.device)
        layout = self.layout
        if layout.in_features != self.in_features:
            raise FormatError(f"the groups hold {layout.in_features} rows; the linear has {self.in_features} inputs")
        table = [
            (bits, offset + unit * bits, g)
            for g, (bits, rows, offset) in enumerate(zip(layout.bits, layout.rows, layout.offsets, strict=True))
            for unit in range(rows // 32)
        ]
        device = self.q_weight.device
        return Packed(
            self.q_weight,
            self.q_scale,
            (self.q_scale_max.float() / 256).half().float(),
            self.q_invperm.argsort().to(torch.int32),
            torch.tensor(table, dtype=torch.int32, device=device),
            self.bias,
        )

    def weight_matrix(self, dtype: torch.dtype) -> Tensor:
        """W (in_features, N32), unpacked, in a tensor of its own: in halves as the file has it, rounded to ``dtype``."""
        kernel_has = dtype in KERNEL_TYPES or not self.q_weight.is_cuda
        shape = self.in_features, self.q_weight.shape[1]
        out = torch.empty(shape, dtype=dtype if kernel_has else torch.float16, device=self.q_weight.device)
        self.packed().unpack(out)
        return out.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) of its dtype; under autocast of that one, as with a plain linear.

        float16 and bfloat16, on the CPU float32 too, are what the kernels take; others are multiplied by unpacked weights.
        """
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():  # torch 2.11 exports while it compiles
            raise UsageError("packed linears cannot be exported: their graph is of this process alone", "torch.compile")
        if x.device != self.q_weight.device:
            raise UsageError(f"activations on {x.device} meet a packed linear on {self.q_weight.device}", "move one of them")
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            self.prepare()
            y: Tensor = torch.ops.exl2ray.product(flat, self._number, self.q_weight.shape[1])
        elif torch.is_grad_enabled() and flat.requires_grad:
            y = torch.ops.exl2ray.product(flat, self._number, self.q_weight.shape[1])
        else:
            y = self.product(flat)
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def prepare(self) -> None:
        """Makes what stays on the device; torch.compile calls it as it traces: what runs later may be recorded in a graph."""
        if not self.q_weight.is_meta:
            self.packed()

    def product(self, x: Tensor) -> Tensor:
        """x (rows, in_features) -> (rows, N32), with the bias; several threads may call it, one after the other is served."""
        with _turn:
            if 0 < x.shape[0] <= MAX_ROWS and (x.dtype in KERNEL_TYPES or not x.is_cuda):
                return self.packed().product(x)
            weight = self.weight_matrix(x.dtype)
            return x @ weight if self.bias is None else torch.addmm(self.bias.to(x.dtype), x, weight)

    def gradient(self, grad: Tensor) -> Tensor:
        """Gradient (rows, N32) of the result -> (rows, in_features), that of the activations."""
        with _turn:
            return grad @ self.weight_matrix(grad.dtype).T

    def _apply(self, fn: Any, recurse: bool = True) -> Exl2Linear:
        """Moves between devices; dtypes are the file's whatever the rest of the model is cast to."""

        def kept(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        moved = super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        assert isinstance(moved, Exl2Linear)
        return moved

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.linear = _linears[inputs[1]]  # keeps it until the gradient is asked for


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Gradients with respect to the activations, which adapters in front of a quantised linear need."""
    return torch.ops.exl2ray.gradient(grad, ctx.linear._number, ctx.linear.in_features), None, None


for _name in ("product", "gradient"):
    torch.library.define(f"exl2ray::{_name}", "(Tensor x, int linear, int columns) -> Tensor")
    torch.library.register_fake(f"exl2ray::{_name}", lambda x, linear, columns: x.new_empty(x.shape[0], columns))
torch.library.impl("exl2ray::product", "default", lambda x, linear, columns: _linears[linear].product(x))
torch.library.impl("exl2ray::gradient", "default", lambda x, linear, columns: _linears[linear].gradient(x))
torch.library.register_autograd("exl2ray::product", _backward, setup_context=_setup_context)


def check_device(device: torch.device) -> None:
    """Raises UsageError if the GPU is too old for the kernels: CUDA 13 compiles for compute capability 7.5 and later."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (7, 5):
        name = torch.cuda.get_device_name(device)
        raise UsageError(
            f"{name} has compute capability {major}.{minor}; EXL2 models need 7.5 or later", "run the model on the CPU"
        )
