"""Roles of the linears of a decoder layer, once. In a parallel block gate and up read what q, k and v read."""

from __future__ import annotations

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")  # families without a gate have the last two
EXPERT = ("w1", "w3", "w2")  # gate, up and down of each expert of a mixture
WRITERS = ("o_proj", "down_proj", "w2")  # add to the residual stream; their input depends on the others' outputs
