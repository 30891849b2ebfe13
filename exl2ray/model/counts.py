"""Counts in config.json against what the headers of the weights hold, before anything is made of that length.

A config comes from a download like the weights do, and a number in it is a few bytes whatever it says. Loops and lists over
layers, experts, heads and dimensions are therefore bounded by the tensors that exist; small differences are left to the
comparison of every tensor's name and shape (`exl2ray.model.arch`), which says more about them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.class_defaults import defaults_of
from exl2ray.model.config_reader import (
    EXPERTS_KEYS,
    HEADS_KEYS,
    HIDDEN_KEYS,
    KV_HEADS_KEYS,
    LAYER_KEYS,
    MLP_KEYS,
    ConfigReader,
)
from exl2ray.model.rules import Arch

# Whatever the weights hold. The largest published models have 126 layers, 384 experts, 128 heads, heads of 576 dimensions.
MAX_LAYERS, MAX_EXPERTS, MAX_HEADS, MAX_HEAD_DIM = 10_000, 10_000, 4096, 65_536
SIZES = (HIDDEN_KEYS, ("head_dim",), HEADS_KEYS, KV_HEADS_KEYS, EXPERTS_KEYS, MLP_KEYS, ("vocab_size",))  # some dimension's
SLACK = 4  # times what exists may be described, and listed as missing: more is no download that misses some shards
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
HINT = "config.json is broken, or of another model than the weights"
VOCABULARY = f"{HINT}; or tokens were added to it without resizing the embedding, whose rows vocab_size counts"


def check_counts(arch: Arch, config: Mapping[str, Any], source: SourceModel) -> None:
    """Raises SourceError for a count in config.json that the tensors of ``source`` cannot have; naming both."""
    defaults = defaults_of(arch, config)
    c = ConfigReader(config, defaults)
    longest = max((max(source.shape(n), default=0) for n in source.names() if source.nbytes(n)), default=0)
    for keys in SIZES:
        value = c.positive(*keys, default=None)
        if value is not None and value > longest:
            absent = next((k for k in keys if k in defaults), None)
            hint = VOCABULARY if keys == ("vocab_size",) else HINT
            said = f"{absent} is absent, and {value} by default" if absent else f"{c.name(*keys)} is {value}"
            raise SourceError(
                f"config.json: {said}, but no tensor of the weights is larger than {longest}",
                f"add {absent}, as the config.json of the model has it that these weights were made from" if absent else hint,
            )
    layers = c.positive(*LAYER_KEYS)
    experts = c.positive(*EXPERTS_KEYS) if arch.moe else 0
    tensors = len(source.names())
    held = len({m[1] for n in source.names() if (m := LAYER.search(n))})
    if layers > min(SLACK * held + 64, MAX_LAYERS):
        raise SourceError(f"config.json: {c.name(*LAYER_KEYS)} is {layers}, but the weights hold {held} layers", HINT)
    if not arch.experts_fused and layers * experts * 3 > SLACK * tensors + 1024:
        raise SourceError(
            f"config.json: {c.name(*EXPERTS_KEYS)} is {experts}; in {layers} layers these are "
            f"{layers * experts * 3} matrices, but the weights hold {tensors} tensors",
            HINT,
        )
