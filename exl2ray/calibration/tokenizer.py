"""The model's tokenizer: ``tokenizer.json``, BOS and EOS ids, special tokens and chat template.

converter-algorithm section 3: text is encoded without automatic BOS/EOS and without templates; added tokens that
occur literally in the text are matched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from exl2ray.errors import SourceError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ModelTokenizer:
    """A loaded tokenizer. ``vocab_size`` is its highest id + 1; ids of text are always below it."""

    tokenizer: Tokenizer
    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    chat_template: str | None  # Jinja source
    special_tokens: Mapping[str, str]  # "bos_token" -> text; what a chat template may refer to

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of ``text``, int64 (T,), without BOS, EOS or any other token that is not in the text."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """``encode`` of each text; the library spreads a batch over the CPU cores."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in encodings]


def load_tokenizer(directory: str | Path, config: Mapping[str, Any], vocab_size: int) -> ModelTokenizer:
    """Load the tokenizer of a Hugging Face directory.

    ``config`` is the model's config.json, ``vocab_size`` the rows of its embedding (and head). Raises SourceError when
    tokenizer.json is missing or broken, when any id (added tokens included) is not below ``vocab_size``, or when a BOS
    or EOS setting is not usable.
    """
    root = Path(directory)
    path = root / "tokenizer.json"
    tokenizer = _read_tokenizer(path)
    # Some files store these; both would change the ids of long texts behind our back.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if not vocab:
        raise SourceError(f"{path}: the vocabulary is empty")
    token, highest = max(vocab.items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise SourceError(
            f"{path}: token {token!r} has id {highest}, so the tokenizer needs {highest + 1} embedding rows; "
            f"the model has {vocab_size}",
            "the tokenizer is of another model, or tokens were added without resizing the embedding",
        )
    settings = _read_json(root / "tokenizer_config.json")
    lookup = _TokenIds(path, vocab, vocab_size)
    bos_id = lookup.resolve("bos", config, settings, default=1)
    eos_id = lookup.resolve("eos", config, settings, default=2)
    special = {n: t for n in SPECIAL_NAMES if (t := _token_text(settings.get(n))) is not None}
    for name, token_id in (("bos_token", bos_id), ("eos_token", eos_id)):
        text = tokenizer.id_to_token(token_id) if token_id is not None else None
        if text is not None:
            special.setdefault(name, text)
    return ModelTokenizer(
        tokenizer=tokenizer,
        path=path,
        vocab_size=highest + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        chat_template=_chat_template(root, settings),
        special_tokens=special,
    )


@dataclass(frozen=True)
class _TokenIds:
    path: Path
    vocab: Mapping[str, int]
    vocab_size: int

    def resolve(self, which: str, config: Mapping[str, Any], settings: Mapping[str, Any], default: int) -> int | None:
        """Section 3: config.json, else tokenizer config (null there: the model has none), else ``default``."""
        name = f"{which}_token_id"
        value = config.get(name)
        if isinstance(value, list):  # several EOS ids; the first one is used
            value = value[0] if value else None
        if value is not None:
            return self._check(value, f"config.json: {name}")
        token_name = f"{which}_token"
        if token_name in settings:
            if settings[token_name] is None:
                return None
            text = _token_text(settings[token_name])
            if text is None or text not in self.vocab:
                raise SourceError(
                    f"{self.path.parent / 'tokenizer_config.json'}: {token_name} {settings[token_name]!r} "
                    f"is not a token of {self.path.name}",
                    f"set {name} in config.json",
                )
            return self.vocab[text]
        return self._check(default, f"default {name}")

    def _check(self, value: Any, origin: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise SourceError(f"{self.path.parent}: {origin} is {value!r}, not an integer")
        if not 0 <= value < self.vocab_size:
            raise SourceError(
                f"{self.path.parent}: {origin} is {value}, but the model has {self.vocab_size} embedding rows"
            )
        return value


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise SourceError(
            f"tokenizer not found: {path}",
            "a model that only has tokenizer.model (SentencePiece) needs a converted one: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes it",
        )
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"{path}: cannot be read: {e}") from e
    except Exception as e:  # the library raises plain Exception for whatever its parser dislikes
        raise SourceError(f"{path}: not a tokenizer file: {e}", "download the file again") from e


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise SourceError(f"{path}: not a JSON file: {e}") from e
    if not isinstance(obj, dict):
        raise SourceError(f"{path}: holds {type(obj).__name__}, not an object")
    return obj


def _token_text(value: Any) -> str | None:
    """Text of a special token, given as a string or as a serialised added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(root: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else ``chat_template`` of tokenizer_config.json: a string, or a list with one "default"."""
    file = root / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise SourceError(f"{file}: cannot be read: {e}") from e
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template.strip() else None
