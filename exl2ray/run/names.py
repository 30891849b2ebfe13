"""What linears are called in EXL2 files, beside what they are called in the source and in programs that run them."""

from __future__ import annotations

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TEXT_MODEL = "language_model."  # in front of all names of Gemma 3, also of one that is text alone
EXPERT_ROLES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))  # gate, up, down
