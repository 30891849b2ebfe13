"""Typed look-up in config.json.

Values are looked up at the top level of the config, then in ``text_config``, then in the family's defaults. JSON null
counts as absent, except that a null hides a family default (a Gemma 2 config with a null softcap has no softcap).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exl2ray.errors import SourceError
from exl2ray.formats.hfconfig import BROKEN
from exl2ray.formats.json_file import as_number
from exl2ray.wording import shown

# Names of one number in the configs of different families; the first that is given counts.
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer")
HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd")
HEADS_KEYS = ("num_attention_heads", "n_heads", "n_head")
KV_HEADS_KEYS = ("num_key_value_heads", "attn_config.kv_n_heads")
EXPERTS_KEYS = ("num_local_experts", "ffn_config.moe_num_experts", "num_experts")
MLP_KEYS = ("intermediate_size", "ffn_config.ffn_hidden_size", "n_inner")
MAX_LENGTH_KEYS = ("max_sequence_length", "model_max_length", "max_position_embeddings", "max_seq_len", "n_positions")

REQUIRED = object()
MAX_INTEGER = 1 << 31
MAX_NUMBER = 1e9  # beyond any multiplier, and squares stay far from the end of float32
HINT = BROKEN


def hint_for(value: Any) -> str:
    """What to do about a value of the wrong type."""
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d*)?([eE][+-]?\d+)?|true|false", value[:40]):
        return f"write {value[:40]} without the quotes"
    return HINT


class ConfigReader:
    """Typed look-up in config.json by the rules of this module's docstring. Keys may be dotted."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        self.levels = [config, text] if isinstance(text, Mapping) else [config]
        self.defaults = defaults

    def raw(self, *keys: str) -> Any:
        """First value that is not null, or None."""
        hidden = set()
        for level in self.levels:
            for key in keys:
                value, present = _dotted(level, key)
                if value is not None:
                    return value
                if present:
                    hidden.add(key)
        return next((self.defaults[k] for k in keys if k in self.defaults and k not in hidden), None)

    def name(self, *keys: str) -> str:
        """The key that ``raw`` takes the value from; the first one if there is no value."""
        return next((k for level in self.levels for k in keys if _dotted(level, k)[0] is not None), keys[0])

    def has(self, key: str) -> bool:
        """Whether the key is present, null included."""
        return any(_dotted(level, key)[1] for level in self.levels)

    def integer(self, *keys: str, default: Any = REQUIRED) -> Any:
        """An integer, or ``default`` if there is none. Raises SourceError naming the key, as the others do."""
        value = self._found(keys, default)
        if value is default:
            return value
        number = as_number(value)
        if number is None or number != int(number):
            raise SourceError(f"config.json: {self.name(*keys)} is {shown(value)}; an integer is needed", hint_for(value))
        if abs(number) >= MAX_INTEGER:
            raise SourceError(f"config.json: {self.name(*keys)} is {shown(value)}, which no model has", HINT)
        return int(value)

    def positive(self, *keys: str, default: Any = REQUIRED, most: int = MAX_INTEGER - 1) -> Any:
        """An integer from 1 to ``most``, or ``default``."""
        value = self.integer(*keys, default=default)
        if value is not default and value <= 0:
            raise SourceError(f"config.json: {self.name(*keys)} is {value}; a positive integer is needed", HINT)
        if value is not default and value > most:
            raise SourceError(f"config.json: {self.name(*keys)} is {value}; at most {most} is possible", HINT)
        return value

    def number(
        self, *keys: str, default: Any = REQUIRED, least: float = -MAX_NUMBER, most: float = MAX_NUMBER
    ) -> Any:
        """A number from ``least`` to ``most``; zero too if ``default`` is zero, which then says that there is none."""
        value = self._found(keys, default)
        if value is default:
            return value
        number = as_number(value)
        if number is None:
            what = f"config.json: {self.name(*keys)} is {shown(value)}; a finite number is needed"
            raise SourceError(what, hint_for(value))
        if not least <= number <= most and not (number == 0 and default == 0):
            raise SourceError(
                f"config.json: {self.name(*keys)} is {shown(value)}; a number from {least:g} to {most:g} is needed", HINT
            )
        return number

    def flag(self, *keys: str) -> bool:
        """Whether it is true; absent counts as false."""
        value = self.raw(*keys)
        if value is not None and not isinstance(value, bool):
            raise SourceError(f"config.json: {self.name(*keys)} is {shown(value)}; true or false is needed", hint_for(value))
        return bool(value)

    def _found(self, keys: tuple[str, ...], default: Any) -> Any:
        value = self.raw(*keys)
        if value is None:
            if default is REQUIRED:
                raise SourceError(f"config.json: {' / '.join(keys)} is missing", "the config does not fit the weights")
            return default
        return value


def _dotted(level: Mapping[str, Any], key: str) -> tuple[Any, bool]:
    """(value, whether the key is present) of a possibly dotted key."""
    value: Any = level
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None, False
        value = value[part]
    return value, True
