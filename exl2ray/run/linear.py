"""One EXL2 linear as a torch module: tensors as they are in the file, multiplied without being unpacked where that pays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exl2ray.cuda.run import MAX_ROWS, Packed
from exl2ray.errors import FormatError, UsageError
from exl2ray.formats.exl2 import PackedLinear, groups_layout
from exl2ray.formats.layout import GroupLayout, pad32

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Exl2Linear(torch.nn.Module):
    """y = x W + bias with W (in_features, out_features) packed; Q packed rows, G groups, N32 = out_features padded to 32.

    Buffers have the names, dtypes and shapes of the file (exl2-format section 5), so ``state_dict`` is what the file holds.
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
        """The tensors for the kernels, on the device of ``q_weight``; derived once."""
        p = self._packed
        if p is None or p.q_weight is not self.q_weight:
            p = self._packed = self._derive()
        return p

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
        """W (in_features, N32) in a buffer that all linears of the device share: valid until the next one unpacks."""
        size = self.in_features * self.q_weight.shape[1]
        key = (self.q_weight.device, dtype)
        if key not in _scratch or _scratch[key].numel() < size:
            with torch.inference_mode(False):  # or it could not be written to outside of inference mode later
                _scratch[key] = torch.empty(size, dtype=dtype, device=key[0])
        out = _scratch[key][:size].view(self.in_features, -1)
        self.packed().unpack(out)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) float16 or bfloat16, on the CPU float32, too -> (..., out_features) of its dtype."""
        flat = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and flat.requires_grad:
            y: Tensor = _Product.apply(flat, self)  # type: ignore[no-untyped-call]
        else:
            y = self._product(flat)
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        if 0 < x.shape[0] <= MAX_ROWS:
            return self.packed().product(x)
        weight = self.weight_matrix(x.dtype)
        return x @ weight if self.bias is None else torch.addmm(self.bias.to(x.dtype), x, weight)

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


class _Product(torch.autograd.Function):
    """Gradients with respect to the activations, which adapters in front of a quantised linear need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Exl2Linear) -> Tensor:
        ctx.linear = linear
        return linear._product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.weight_matrix(grad.dtype).T, None


def check_device(device: torch.device) -> None:
    """Raises UsageError if the GPU is too old for the kernels: CUDA 13 compiles for compute capability 7.5 and later."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (7, 5):
        name = torch.cuda.get_device_name(device)
        raise UsageError(
            f"{name} has compute capability {major}.{minor}; EXL2 models need 7.5 or later", "run the model on the CPU"
        )
