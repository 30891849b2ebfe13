"""The model's tokenizer: ``tokenizer.json``, BOS and EOS ids, special tokens and chat template.

As in ExLlamaV2, text is encoded without automatic BOS/EOS and without templates; added tokens that occur literally in the
text are matched. The tokenizer itself lives in a child process with limits (`exl2ray.calibration.limited`), since its file
comes from a stranger; so do chat templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exl2ray.calibration.chat_text import TemplateProcess
from exl2ray.calibration.limited import MIB, ChildError, LimitedProcess
from exl2ray.calibration.limited_child import quoted, shown
from exl2ray.calibration.tokenizer_files import (
    AGAIN,
    TokenizerFiles,
    optional_json,
    read_tokenizer_files,
    template_tokens,
    token_text,
)
from exl2ray.errors import SourceError
from exl2ray.formats.hfconfig import config_value

# Of a process that holds a tokenizer. The largest published ones, 35 MB with 262,000 tokens, take 500 MB and 2 s.
MEMORY_BYTES, MEMORY_PER_BYTE, MOST_MEMORY_BYTES = 512 * MIB, 12, 1300 * MIB
MEMORY_PER_TEXT_BYTE = 300  # of the longest text so far: an encoding keeps pieces, offsets and more of every token, and what
# it gives back stays with the allocator of the process
LOAD_SECONDS, LOAD_SECONDS_PER_MIB = 2.0, 0.15
BYTES_PER_SECOND = 250_000  # of text; slow tokenizers do four times that
IDS_PER_BYTE, IDS_PER_TEXT = 16, 1024  # normalisers may lengthen text, but not without end
SHOWN = 3  # tokens in a message


class TokenizerProcess:
    """The child with one tokenizer. Every method raises SourceError when the child gives up."""

    def __init__(self, files: TokenizerFiles, rows: int) -> None:
        self._path = files.path
        self._memory = min(MEMORY_BYTES + MEMORY_PER_BYTE * len(files.content), MOST_MEMORY_BYTES)
        self._text_memory = 0
        self._child = LimitedProcess("tokenizer")
        request = {"op": "load", "stated": files.stated, "named": files.named, "rows": rows, "names": False}
        seconds = LOAD_SECONDS + LOAD_SECONDS_PER_MIB * len(files.content) / MIB
        try:
            self.report, _ = self._child.ask(request, [files.content], cpu_seconds=seconds, memory_bytes=self._memory)
        except ChildError as e:
            self._child.close()
            if e.ended or e.reason.startswith("used more"):
                raise SourceError(f"{self._path}: loading the tokenizer {e.reason}", _UNUSUAL) from e
            raise SourceError(
                f"{self._path}: not a tokenizer file that tokenizers {version('tokenizers')} reads: {e.reason}",
                "download the file again; if a newer version of the library wrote it: pip install -U tokenizers",
            ) from e

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, int64 (T,)."""
        data = [text.encode("utf-8") for text in texts]
        size = sum(map(len, data))
        self._text_memory = max(self._text_memory, MEMORY_PER_TEXT_BYTE * max(map(len, data), default=0))
        _, blobs, lengths = self._ask(
            {"op": "encode"}, data, f"{size} bytes of text", cpu_seconds=size / BYTES_PER_SECOND,
            answer_bytes=4 * (IDS_PER_BYTE * size + IDS_PER_TEXT * len(data)),
        )  # fmt: skip
        ids = np.frombuffer(blobs[0], np.int32).astype(np.int64)
        return np.split(ids, np.cumsum(lengths)[:-1]) if lengths else []

    def ids_of(self, tokens: Sequence[str]) -> list[int | None]:
        return self._look_up("ids", tokens=tokens)

    def tokens_of(self, ids: Sequence[int]) -> list[str | None]:
        return self._look_up("tokens", of=ids)

    def decode(self, ids: Sequence[int]) -> str:
        _, blobs, _ = self._ask({"op": "decode", "ids": ids}, [], f"{len(ids)} ids", cpu_seconds=0.1)
        return blobs[0].decode("utf-8")

    def close(self) -> None:
        self._child.close()

    def _look_up(self, what: str, **request: Sequence[Any]) -> list[Any]:
        answer, _, _ = self._ask({"op": "look_up", **request}, [], "a few tokens", cpu_seconds=0.01)
        return list(answer[what])

    def _ask(
        self,
        request: Mapping[str, Any],
        blobs: Sequence[bytes],
        what: str,
        cpu_seconds: float,
        answer_bytes: int = 64 * MIB,
    ) -> tuple[dict[str, Any], list[bytes], list[int]]:
        try:
            answer, out = self._child.ask(
                request, blobs, cpu_seconds=cpu_seconds, memory_bytes=self._memory + self._text_memory,
                answer_bytes=answer_bytes,
            )  # fmt: skip
        except ChildError as e:
            reason = e.reason if e.ended or e.reason.startswith("used more") else f"fails: {e.reason}"
            raise SourceError(f"{self._path}: the tokenizer {reason} (with {what})", _UNUSUAL) from e
        return answer, out, answer.get("lengths", [])


_UNUSUAL = "no tokenizer of a real model does that: take tokenizer.json from the model's first publisher"


@dataclass(frozen=True)
class ModelTokenizer:
    """A loaded tokenizer. ``close`` ends its process."""

    process: TokenizerProcess
    path: Path  # of tokenizer.json; the folder, if the vocabulary was converted
    vocab_size: int  # highest id with an embedding row, + 1
    bos_id: int | None
    eos_id: int | None
    warnings: tuple[str, ...]
    added: Mapping[str, int]  # tokens that are not in tokenizer.json
    rejected: frozenset[str]  # tokens whose stated ids are not those of tokenizer.json
    converted: bytes | None  # content of a tokenizer.json that the model does not have
    templates: TemplateProcess | None  # None without a template
    _encoded: dict[str, NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)  # until it is closed

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of ``text``, int64 (T,), without BOS, EOS or any other token that is not in the text."""
        return self.process.encode([text])[0]

    def encode_once(self, text: str) -> NDArray[np.int64]:
        """``encode``, for texts that are asked for again, by the rows of the other pass: kept until ``close``."""
        found = self._encoded.get(text)
        if found is None:
            found = self._encoded[text] = self.encode(text)
            found.flags.writeable = False
        return found

    def encode_ahead(self, texts: Iterable[str]) -> None:
        """Finds what `encode_once` will give for ``texts``: one request, which the library spreads over the CPU cores."""
        wanted = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        for text, ids in zip(wanted, self.process.encode(wanted) if wanted else (), strict=True):
            ids.flags.writeable = False
            self._encoded[text] = ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """``encode`` of each text; the library spreads a batch over the CPU cores."""
        return self.process.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        return self.process.decode(ids)

    def close(self) -> None:
        """Ends the child processes, of the tokenizer and of its chat template."""
        self.process.close()
        self._encoded.clear()
        if self.templates is not None:
            self.templates.close()

    def __enter__(self) -> ModelTokenizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load_tokenizer(directory: str | Path, config: Mapping[str, Any], vocab_size: int) -> ModelTokenizer:
    """Load the tokenizer of a Hugging Face directory.

    ``config`` is the model's config.json, ``vocab_size`` the rows of its embedding (and head). Raises SourceError when
    tokenizer.json is missing or broken, when its vocabulary does not fit into the embedding, or when a BOS or EOS setting is
    no number. What can be done without (added tokens beyond the embedding, ids out of range) is among ``warnings``.
    """
    root = Path(directory)
    files = read_tokenizer_files(root)
    process = TokenizerProcess(files, vocab_size)
    try:
        report = process.report
        _check_vocabulary(files.path, report, vocab_size)
        warnings = [*files.warnings, *_vocabulary_warnings(files.path, report, vocab_size)]
        ends = _EndTokens(root, process, vocab_size, warnings.append)
        bos_id = ends.resolve("bos", config, files.settings, default=1)
        eos_id = ends.resolve("eos", config, files.settings, default=2)
        ends.check_padding(config)
        ends.check_generation_config()
        special = template_tokens(files.settings)
        for name, token_id in (("bos_token", bos_id), ("eos_token", eos_id)):
            text = process.tokens_of([token_id])[0] if token_id is not None else None
            if text is not None:
                special.setdefault(name, text)
    except BaseException:
        process.close()
        raise
    return ModelTokenizer(
        process=process,
        path=files.path,
        vocab_size=min(report["highest"][0] + 1, vocab_size),
        bos_id=bos_id,
        eos_id=eos_id,
        warnings=tuple(warnings),
        added=dict(report["added"]),
        rejected=frozenset(t for t, _, _ in report["disagreeing"]),
        converted=files.content if files.converted else None,
        templates=None if files.chat_template is None else TemplateProcess(files.chat_template, special),
    )


def _check_vocabulary(path: Path, report: Mapping[str, Any], rows: int) -> None:
    if report["highest"] is None:
        raise SourceError(f"{path}: the vocabulary is empty", AGAIN)
    if report["base_highest"] is not None and report["base_highest"][0] >= rows:
        highest, token = report["base_highest"]
        raise SourceError(
            f"{path}: the vocabulary goes up to id {highest} ({quoted(token)}) and needs {highest + 1} embedding rows; "
            f"the model has {rows}",
            "the tokenizer is of another model: take tokenizer.json from where the weights are from",
        )


def _vocabulary_warnings(path: Path, report: Mapping[str, Any], rows: int) -> list[str]:
    """What is odd about added tokens, for people."""
    out = []
    if report["surplus"]:
        some = _list(f"{quoted(t)} ({i})" for i, t in report["surplus"])
        out.append(
            f"{path}: {report['surplus_count']} added tokens have no embedding row (the model has {rows}): {some}; "
            "harmless as long as no text holds them"
        )
    for text, stated, actual in report["renumbered"][:SHOWN]:
        out.append(f"{path}: the token {quoted(text)} has id {actual} for all loaders, not {stated} as its entry says")
    if report["disagreeing"]:
        some = _list(
            f"{quoted(t)} (stated {i}" + (f", would be {actual})" if actual is not None else ")")
            for t, i, actual in report["disagreeing"]
        )
        root = path.parent if path.suffix else path
        out.append(f"{root}: added tokens whose stated ids are not those that loaders give them are left out: {some}")
    if report["without_row"]:
        some = _list(quoted(t) for t in report["without_row"])
        out.append(f"{path}: special tokens that are not in the vocabulary, with no embedding row left for them: {some}")
    return out


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _list(texts: Any) -> str:
    some = list(texts)
    return ", ".join(some[:SHOWN]) + (", ..." if len(some) > SHOWN else "")


@dataclass(frozen=True)
class _EndTokens:
    """Where BOS and EOS come from."""

    root: Path
    process: TokenizerProcess
    rows: int
    warn: Callable[[str], None]

    def resolve(self, which: str, config: Mapping[str, Any], settings: Mapping[str, Any], default: int) -> int | None:
        """Section 3: config.json, else tokenizer config (null there: the model has none), else ``default``.

        Ids without an embedding row are left out, and so are tokens that are none.
        """
        name, token_name = f"{which}_token_id", f"{which}_token"
        values = _listed(config.get(name))  # of several EOS ids the first
        usable = self._usable(values, f"config.json: {name}")
        if usable:
            return usable[0]
        if token_name in settings:
            return None if settings[token_name] is None else self._id_of(settings[token_name], token_name)
        return default if not values and default < self.rows else None

    def check_padding(self, config: Mapping[str, Any]) -> None:
        """Whether the padding token has a row; it matters to transformers alone. Negative ids are counted from the end."""
        value = config_value(config, "pad_token_id")
        if value is not None and not (type(value) is int and value < 0):
            self._usable([value], "config.json: pad_token_id")

    def check_generation_config(self) -> None:
        try:
            found = optional_json(self.root / "generation_config.json")
        except SourceError:  # `exl2ray.formats.side_files` tells of it
            return
        for name in ("bos_token_id", "eos_token_id"):
            origin, values = f"generation_config.json: {name}", _listed(found.get(name))
            self._usable([v for v in values if type(v) is int], origin)
            for odd in [v for v in values if type(v) is not int][:1]:
                what = f"{self.root}: {origin} is {shown(repr(odd), 40)}, not an integer"
                self.warn(f"{what}: transformers cannot generate with it")

    def _usable(self, values: Sequence[Any], origin: str) -> list[int]:
        for value in values:
            if type(value) is not int:
                what = f"{self.root}: {origin} is {shown(repr(value), 40)}, not an integer"
                raise SourceError(what, "write the token's id, a number without quotes")
        out = [v for v in values if not 0 <= v < self.rows]
        if out:
            some = _list(map(str, out))
            self.warn(f"{self.root}: {origin} {some} has no embedding row (the model has {self.rows}) and is left out")
        return [v for v in values if 0 <= v < self.rows]

    def _id_of(self, value: Any, token_name: str) -> int | None:
        text = token_text(value)
        found = None if text is None else self.process.ids_of([text])[0]
        if found is not None and found < self.rows:
            return found
        why = "is not a token of the vocabulary" if found is None else f"has id {found}, without an embedding row"
        self.warn(f"{self.root / 'tokenizer_config.json'}: {token_name} {shown(repr(value), 60)} {why}; it is left out")
        return None
