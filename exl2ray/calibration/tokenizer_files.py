"""The files of a tokenizer in a model's folder: sizes bounded, settings read, tokens that tokenizer.json may lack.

Three files may list tokens besides ``tokenizer.json``: ``added_tokens.json`` (text to id), ``added_tokens_decoder`` in
``tokenizer_config.json`` (id to text and flags), ``special_tokens_map.json`` (roles to texts, without ids). transformers
reads all of them, ExLlamaV2 ``tokenizer.json`` and ``added_tokens.json``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2ray.calibration.conversion import converted_json, vocabulary_files
from exl2ray.calibration.limited_child import quoted, shown
from exl2ray.calibration.vocabulary_forms import begins_as_vocabulary
from exl2ray.errors import SourceError
from exl2ray.formats.json_file import MIB, read_bounded, read_json_object, refuse_substitute
from exl2ray.formats.regular import open_regular
from exl2ray.formats.side_files import TEMPLATES
from exl2ray.wording import some

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
OWN_TOKENS = ("model_specific_special_tokens", "extra_special_tokens")  # objects from names to tokens, or a list
MAX_TOKENIZER_BYTES = 96 * MIB  # three times the largest that is published
MAX_TEMPLATE_BYTES = 1 * MIB  # published ones have up to 30 kB
MAX_ID = 1 << 31
HEAD_BYTES = 4096  # that tell a vocabulary from something else
AGAIN = "download the file again"


@dataclass(frozen=True)
class TokenizerFiles:
    """What the folder says, before the tokenizer itself is looked at."""

    path: Path  # tokenizer.json, or the folder whose vocabulary was converted
    content: bytes  # of tokenizer.json
    settings: Mapping[str, Any]  # tokenizer_config.json; special_tokens_map.json for what it does not have
    stated: tuple[tuple[int, str, dict[str, bool]], ...]  # id, text, flags
    named: tuple[tuple[str, dict[str, bool]], ...]  # special tokens: text, flags
    chat_template: str | None
    converted: bool  # content is not that of a file
    warnings: tuple[str, ...]


def read_tokenizer_files(root: Path) -> TokenizerFiles:
    """Raises SourceError naming the file that is missing, too large, or not what it should be."""
    path = root / "tokenizer.json"
    converted = not os.path.lexists(path)
    content, warnings = converted_json(root) if converted else (read_content(path), _other_vocabulary(root))
    settings = optional_json(root / "tokenizer_config.json")
    chat_template, odd = _chat_template(root, settings)
    special_map = optional_json(root / "special_tokens_map.json")
    if "added_tokens_decoder" in settings:  # transformers reads the older file only without the newer entry
        special_map = {}
    merged = {**{k: v for k, v in special_map.items() if k in (*SPECIAL_NAMES, *SPECIAL_LISTS)}, **settings}
    stated = [*_decoder_tokens(root / "tokenizer_config.json", settings), *_added_tokens(root, merged)]
    return TokenizerFiles(
        path=root if converted else path,
        content=content,
        settings=merged,
        stated=tuple(stated),
        named=tuple(_special_tokens(merged)),
        chat_template=chat_template,
        converted=converted,
        warnings=(*warnings, *odd),
    )


def _other_vocabulary(root: Path) -> list[str]:
    """A warning about a tokenizer.model beside tokenizer.json that is none."""
    path = root / "tokenizer.model"
    try:
        with open_regular(path) as f:
            head = f.read(HEAD_BYTES)
    except OSError:
        return []
    if begins_as_vocabulary(head):
        return []
    return [
        f"{path}: neither a SentencePiece model nor a file of tiktoken; ExLlamaV2 takes it where it is there, and not "
        "tokenizer.json: download it again, or delete it"
    ]


def has_tokenizer(root: Path) -> bool:
    """Whether a folder has a tokenizer.json, or what one can be made of."""
    return os.path.lexists(root / "tokenizer.json") or bool(vocabulary_files(root))


def read_content(path: Path) -> bytes:
    """tokenizer.json, checked for what can be told without the tokenizers library."""
    data = read_bounded(path, MAX_TOKENIZER_BYTES, hint=AGAIN)
    refuse_substitute(data, str(path), SourceError)
    if not data.strip():
        raise SourceError(f"{path}: is empty", AGAIN)
    if data.startswith(b"\xef\xbb\xbf"):
        raise SourceError(
            f"{path}: begins with a byte order mark, which no loader of tokenizers reads", "save it as UTF-8 without one"
        )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SourceError(f"{path}: not UTF-8 (byte {e.start})", AGAIN) from e
    return data


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a file that not every model has; empty if it is not there."""
    return read_json_object(path, hint=AGAIN, odd=True) if os.path.lexists(path) else {}


def token_text(value: Any) -> str | None:
    """Text of a special token, given as a string or as a serialised added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def template_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names under which a chat template finds them."""
    return {name: text for name, value in _named_tokens(settings).items() if (text := token_text(value)) is not None}


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers has them, in its order: the usual ones, what a model has beside them (``image_token``; objects first,
    then texts, or where there are none what an object of its own has), those of ``extra_special_tokens``, if an object.
    """
    explicit, extra = (dict(own) if isinstance(own := settings.get(key), Mapping) else {} for key in OWN_TOKENS)
    usual = {name: settings[name] for name in SPECIAL_NAMES if name in settings}
    beside = {name: value for name, value in settings.items() if name.endswith("_token") and name not in usual}
    texts = {name: value for name, value in beside.items() if isinstance(value, str)}
    objects = {n: v for n, v in beside.items() if isinstance(v, Mapping) and v.get("__type") == "AddedToken"}
    return {**usual, **objects, **(texts or explicit), **extra}


def _decoder_tokens(path: Path, settings: Mapping[str, Any]) -> list[tuple[int, str, dict[str, bool]]]:
    entries = settings.get("added_tokens_decoder")
    if entries is None:
        return []
    if not isinstance(entries, dict):
        raise SourceError(
            f"{path}: added_tokens_decoder is a {type(entries).__name__}, not an object from ids to tokens", AGAIN
        )
    out = []
    for key, entry in entries.items():
        text = token_text(entry)
        if text is None or not (key.isascii() and key.isdigit()) or int(key) >= MAX_ID:
            raise SourceError(
                f"{path}: added_tokens_decoder: {quoted(key)} is not an id with the content of a token",
                AGAIN,
            )
        out.append((int(key), text, _flags(entry)))
    return out


def _added_tokens(root: Path, settings: Mapping[str, Any]) -> list[tuple[int, str, dict[str, bool]]]:
    """added_tokens.json, with the flags that transformers gives such tokens."""
    path = root / "added_tokens.json"
    special = {text for text, _ in _special_tokens(settings)}
    out = []
    for text, value in optional_json(path).items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_ID:
            raise SourceError(f"{path}: {quoted(text)} has id {shown(repr(value), 40)}", AGAIN)
        out.append((value, text, {"normalized": text not in special, "special": text in special}))
    return out


def _special_tokens(settings: Mapping[str, Any]) -> list[tuple[str, dict[str, bool]]]:
    """Text and flags of the special tokens, in the order in which transformers adds those that are missing."""
    values = list(_named_tokens(settings).values())
    for name in SPECIAL_LISTS:
        values += listed if isinstance(listed := settings.get(name), list) else []
    return [(text, _flags(v)) for v in values if (text := token_text(v))]


def _flags(value: Any) -> dict[str, bool]:
    """Flags of a serialised added token; none for a plain text."""
    return {k: v for k, v in value.items() if isinstance(v, bool)} if isinstance(value, dict) else {}


def _chat_template(root: Path, settings: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """chat_template.jinja, else ``chat_template`` of tokenizer_config.json: a string, or several by name with one "default";
    else additional_chat_templates/default.jinja; else that of chat_template.json, where models that see have theirs.

    Beside it what is said of one that is none of these.
    """
    file = _template_file(root / "chat_template.jinja")
    if file is not None:
        return file, []
    template = _default_template(given := settings.get("chat_template"))
    if isinstance(template, str) and template.strip():
        return template, []
    file = _template_file(root / TEMPLATES / "default.jinja")
    template = _default_template(optional_json(root / "chat_template.json").get("chat_template")) if file is None else file
    if isinstance(template, str) and template.strip():
        return template, []
    if not given or isinstance(given, str):
        return None, []
    named = _by_name(given)
    nameless = not named or "default" in named
    said = f"is {shown(repr(given), 40)}, not a text" if nameless else f"has {some(map(quoted, named))} and no 'default'"
    return None, [
        f"{root / 'tokenizer_config.json'}: chat_template {said}: conversations of calibration rows become plain text; give "
        "the template for chats the name default"
    ]


def _default_template(given: Any) -> Any:
    """The template itself, or the one that transformers takes of several where no name is asked for."""
    return given if isinstance(given, str) else _by_name(given).get("default")


def _by_name(given: Any) -> dict[str, Any]:
    """Several templates: an object from names to texts, or a list of objects with ``name`` and ``template``."""
    if isinstance(given, list):
        return {str(t.get("name")): t.get("template") for t in given if isinstance(t, dict)}
    return given if isinstance(given, dict) else {}


def _template_file(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    data = read_bounded(path, MAX_TEMPLATE_BYTES, hint=AGAIN)
    refuse_substitute(data, str(path), SourceError)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise SourceError(f"{path}: not UTF-8 (byte {e.start})", "save it again as UTF-8") from e
