"""Mixtures of experts in vLLM: each expert has three packed linears, run one expert after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from exl2ray.errors import UsageError
from exl2ray.vllm.files import PackedFiles
from exl2ray.vllm.layers import Part, read_part, run_parts
from exl2ray.vllm.surroundings import check_memory, check_nothing_left, ignore_index, single_norms


class Exl2ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one layer. Routing is looked at on the host, so no CUDA graph can be recorded with them."""

    def __init__(self, files: PackedFiles, layer: Any, name: str) -> None:
        super().__init__(layer.moe_config)
        self.files, self.name = files, name
        self.parts: dict[int, tuple[Part, Part, Part]] = {}  # number here -> gate, up, down
        self.device = torch.device("cpu")

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Decides what this rank keeps. Raises FormatError or UsageError for what cannot be run."""
        vllm_config = get_current_vllm_config()
        self.device = torch.empty(0).device
        if self.device.type == "cuda" and not vllm_config.model_config.enforce_eager:
            raise UsageError("EXL2 experts cannot be recorded in a CUDA graph", "vllm serve DIR --enforce-eager")
        if not self.moe.is_act_and_mul or layer.apply_router_weight_on_input or layer.swiglu_limit:
            raise UsageError(f"{self.name}: experts of another form than down(act(gate(x)) * up(x))")
        check_memory(self.files, self.device, vllm_config)
        ignore_index(self.files.root)
        single_norms(self.files)
        wide, rank = intermediate_size_per_partition, self.moe.tp_rank
        for number in range(layer.global_num_experts):
            gate, up, down = self.files.expert(self.name, number)
            for key in (gate, up):
                self.files.check(key, hidden_size, wide * self.moe.tp_size, bias=False)
            self.files.check(down, wide * self.moe.tp_size, hidden_size, bias=False)
            here = layer._map_global_expert_id_to_local_expert_id(number)
            inputs = (rank * wide, wide) if self.moe.tp_size > 1 else None
            if here >= 0:
                self.parts[here] = (
                    Part(gate, rank * wide, wide, wide), Part(up, rank * wide, wide, wide),
                    Part(down, 0, hidden_size, hidden_size, inputs),
                )  # fmt: skip

    def process_weights_after_loading(self, layer: Any) -> None:
        """Reads the packed tensors of this rank's experts from the files, onto the device."""
        if hasattr(layer, "exl2"):
            return
        check_nothing_left(self.files)
        layer.exl2 = torch.nn.ModuleList(
            torch.nn.ModuleList(read_part(self.files, part, self.device)[0] for part in self.parts[number])
            for number in range(len(self.parts))
        )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (tokens, hidden), topk_weights and topk_ids (tokens, k) -> (tokens, hidden), this rank's part of the sum."""
        out = torch.zeros_like(x)
        experts = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        for number in sorted(set(experts.flatten().tolist()) - {-1}):
            gate, up, down = layer.exl2[number]
            token, place = torch.where(experts == number)
            states = x[token]
            both = torch.cat([gate(states), up(states)], dim=-1)
            inner = both.new_empty(both.shape[0], both.shape[1] // 2)
            apply_moe_activation(layer.activation, inner, both)
            y = run_parts([down], inner)  # type: ignore[arg-type]
            out.index_add_(0, token, (y * topk_weights[token, place, None]).to(out.dtype))
        return out
