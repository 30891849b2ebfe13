"""Names of tensors that a wrapper has changed: torch.compile, DistributedDataParallel, FSDP and PEFT save theirs with marks.

A mark never carries meaning, so it is taken out wherever it stands. Prefixes of the model itself (``model.``,
``language_model.``, ...) are the business of `exl2ray.model.arch`, which knows what a family calls its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LEADING = ("module.", "base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.")
INNER = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|ia3_l)\b")


def plain_name(name: str) -> str:
    """``name`` without the marks of wrappers."""
    found = True
    while found:
        found = False
        for mark in LEADING:
            if name.startswith(mark):
                name, found = name[len(mark) :], True
    return INNER.sub("", name)


def plain_names(names: Iterable[str]) -> Mapping[str, str]:
    """Plain name -> name as stored, for all of them; where two would share one, every name stays as it is."""
    names = list(names)
    plain = {plain_name(n): n for n in names}
    return plain if len(plain) == len(names) else {n: n for n in names}


def unmerged(names: Iterable[str]) -> list[str]:
    """Tensors of an adapter that has not been merged into the weights around it."""
    return [n for n in names if LORA.search(n)]
