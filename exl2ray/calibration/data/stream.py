"""Tokens of calibration data, as many as are asked for; rows of them.

As in ExLlamaV2, each document is encoded by itself, without BOS or EOS; the token streams are concatenated.
A source is read only as far as needed. Of several sources each has a stream of its own, and they take turns row by row, so
that every one of them counts whatever its size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exl2ray.calibration.chat_text import ChatText
from exl2ray.calibration.data.problem import HOW_TO_MAKE_ONE
from exl2ray.calibration.data.sources import Source
from exl2ray.calibration.data.taken import NAME_CHARACTERS, SHOWN, Taken
from exl2ray.calibration.limited import MIB, ChildError, LimitedProcess
from exl2ray.calibration.rows import Rows, check_ids, check_length
from exl2ray.calibration.text import Conversation
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError, Exl2RayError, UsageError
from exl2ray.wording import plural, some

Ids = NDArray[np.int64]
MEMORY_BYTES = 700 * MIB  # of the process that reads; a cell of 120 MB takes 400
OPEN_SECONDS, NEXT_SECONDS, SECONDS_PER_MIB = 6.0, 0.05, 1.0  # of processor time; ordinary files take a hundredth
# A document is encoded as a whole up to some megabytes, if that many tokens are asked for; else up to its first part.
LEAST_WHOLE, MOST_WHOLE, WHOLE_BYTES_PER_TOKEN = 64 << 10, 2 * MIB, 16
LEAST_BYTES, MOST_BYTES, BYTES_PER_TOKEN = 4 << 10, 2 * MIB, 6  # of text in one answer, by what is still needed
ENOUGH_BYTES, MAX_BYTES_PER_ID = 4 * MIB, 200  # text of which hardly any token comes is none
SAMPLE = Conversation("", (("user", "Hello"), ("assistant", "Hello!")))


@dataclass(frozen=True)
class _Part:
    ids: Ids
    file: int  # index into _Stream.described
    starts: bool  # a document
    digest: bytes  # SHA-256 of the text


class _Chats:
    """Conversations as text, with the model's chat template; its process is started by the first one."""

    def __init__(self, tokenizer: ModelTokenizer, chat_rows: bool) -> None:
        self._templates = tokenizer.templates if chat_rows else None
        self._text: ChatText | None = None

    def text(self, messages: Sequence[tuple[str, str]]) -> str:
        self._text = self._text or ChatText(self._templates, SAMPLE)
        return self._text.text(Conversation("", tuple((role, content) for role, content in messages)))

    def notes(self) -> list[str]:
        return [] if self._text is None else self._text.notes()


class _Stream:
    """One source. ``take`` may be asked again: what was encoded is kept."""

    def __init__(self, source: Source, tokenizer: ModelTokenizer, chats: _Chats, whole: int) -> None:
        self.source, self._tokenizer, self._chats, self._whole = source, tokenizer, chats, whole
        self._fault: Exl2RayError | None = None  # that ended it
        self.described: list[dict[str, Any]] = []
        self.have = self._bytes = self.skipped = 0
        self._parts: list[_Part] = []
        self._waiting = list(source.files)
        self._child: LimitedProcess | None = None
        self._open = False
        self._seconds = 0.0  # for the text that came last
        self._skipped_here = 0

    def fill(self, count: int) -> int:
        """Reads until there are ``count`` tokens or no more text; how many there are."""
        if self.have < count and self._fault is not None:
            raise self._fault
        try:
            while self.have < count and (self._open or self._waiting):
                if not self._open:
                    self._open_next()
                self._read(count - self.have)
        except Exl2RayError as e:
            self._fault = e
            raise
        return self.have

    def tokens(self, count: int) -> Ids:
        """The first ``count`` tokens."""
        return np.concatenate([np.empty(0, np.int64), *(ids for _, ids in self._first(count))])

    def documents_of(self, count: int) -> list[Ids]:
        """The first ``count`` tokens, document by document."""
        out: list[list[Ids]] = []
        for part, ids in self._first(count):
            if part.starts or not out:
                out.append([])
            out[-1].append(ids)
        return [np.concatenate(parts) for parts in out]

    def taken(self, count: int) -> tuple[list[Taken], bytes]:
        """What the first ``count`` tokens come from, and a hash of those texts."""
        found: dict[int, list[int]] = {}
        texts = hashlib.sha256()
        for part, ids in self._first(count):
            used = found.setdefault(part.file, [0, 0])
            used[0] += part.starts
            used[1] += len(ids)
            texts.update(part.digest)
        return [self._taken(index, *used) for index, used in found.items()], texts.digest()

    def documents(self) -> int:
        return sum(part.starts for part in self._parts)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child, self._open, self._waiting = None, False, []

    def _first(self, count: int) -> Iterator[tuple[_Part, Ids]]:
        """The parts with the first ``count`` tokens, and those of them that count."""
        for part in self._parts:
            if count <= 0:
                return
            yield part, part.ids[:count]
            count -= len(part.ids)

    def _taken(self, index: int, documents: int, tokens: int) -> Taken:
        d = self.described[index]
        columns, ignored = tuple(d["columns"]), tuple(d["ignored"])
        return Taken(self.source.given, d["file"], d["format"], columns, ignored, d["form"], documents, tokens)

    def _open_next(self) -> None:
        file = self._waiting.pop(0)
        if self._child is None:
            self._child = LimitedProcess("data")
        path = str(file.fetch())
        self._name = path if len(self.source.files) == 1 else f"{self.source.given}: {file.name}"
        request = {"op": "open", "path": path, "column": self.source.column, "whole": self._whole}
        described, _ = self._ask(request, OPEN_SECONDS)
        self.described.append({**described, "file": file.name})
        self._open, self._skipped_here = True, 0

    def _read(self, missing: int) -> None:
        wanted = max(LEAST_BYTES, min(MOST_BYTES, missing * BYTES_PER_TOKEN))
        answer, blobs = self._ask({"op": "next", "bytes": wanted}, NEXT_SECONDS + self._seconds)
        self._seconds = SECONDS_PER_MIB * sum(map(len, blobs)) / MIB
        self.skipped += answer["skipped"] - self._skipped_here
        self._skipped_here = answer["skipped"]
        self._open = not answer["end"]
        texts = [self._text(kind, blob) for (kind, _), blob in zip(answer["pieces"], blobs, strict=True)]
        encoded = self._tokenizer.encode_batch(texts) if texts else []
        for (_, starts), blob, ids in zip(answer["pieces"], blobs, encoded, strict=True):
            self._parts.append(_Part(ids, len(self.described) - 1, starts, hashlib.sha256(blob).digest()))
            self.have += len(ids)
        self._bytes += sum(map(len, blobs))
        if self._bytes > ENOUGH_BYTES and self._bytes > MAX_BYTES_PER_ID * self.have:
            raise CalibrationError(
                f"-c {self._name}: {self._bytes >> 20} MiB of text give no more than {self.have} tokens",
                "is it text? `exl2ray calibration -c FILE` shows how rows begin",
            )

    def _text(self, kind: str, blob: bytes) -> str:
        if kind == "text":
            return blob.decode("utf-8")
        return self._chats.text(json.loads(blob))

    def _ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], list[bytes]]:
        assert self._child is not None
        try:
            answer, blobs = self._child.ask(request, cpu_seconds=seconds, memory_bytes=MEMORY_BYTES)
        except ChildError as e:
            raise CalibrationError(
                f"-c {self._name}: reading it {e.reason}", f"text does not need that much: {HOW_TO_MAKE_ONE}"
            ) from e
        if "fault" in answer:
            kind = UsageError if answer["usage"] else CalibrationError
            raise kind(f"-c {self._name}: {answer['fault']}", answer["hint"])
        return answer, blobs


class CalibrationData:
    """The text of one or several ``-c`` for one model. A context manager: it ends its child processes.

    most_tokens: that ``rows`` will be asked for at most.
    """

    def __init__(
        self, sources: Sequence[Source], tokenizer: ModelTokenizer, chat_rows: bool = True, most_tokens: int = 1 << 20
    ) -> None:
        self._tokenizer = tokenizer
        self._chats = _Chats(tokenizer, chat_rows)
        whole = max(LEAST_WHOLE, min(MOST_WHOLE, most_tokens * WHOLE_BYTES_PER_TOKEN))
        self._streams = [_Stream(source, tokenizer, self._chats, whole) for source in sources]

    def __enter__(self) -> CalibrationData:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams:
            stream.close()

    def tokens(self, most: int) -> Ids:
        """The first tokens of the sources, int64 (n,), one source after the other: ``most`` of each, or all there are."""
        for stream in self._streams:
            stream.fill(most)
        return np.concatenate([stream.tokens(most) for stream in self._streams])

    def documents(self, most: int) -> list[Ids]:
        """What `tokens` gives, document by document."""
        for stream in self._streams:
            stream.fill(most)
        return [ids for stream in self._streams for ids in stream.documents_of(most)]

    def rows(
        self, rows: int, length: int, row_flag: str, length_flag: str, vocab_size: int, max_positions: int | None = None
    ) -> Rows:
        """Int64 (rows, length): the first tokens of each source.

        row_flag, length_flag: "-r" or "-mr", "-l" or "-ml", for messages. vocab_size: rows of the model's embedding.
        max_positions: the longest sequence that the model takes. Raises CalibrationError for an unusable row count or length,
        unusable files and too little text; UsageError for a column that is not there; SourceError for an id without an
        embedding row.
        """
        if rows < 1:
            raise CalibrationError(f"{row_flag} {rows}: at least one calibration row is needed")
        check_length(length, length_flag, max_positions)
        shares = self._shares(rows, length)
        if sum(shares) < rows:
            raise self._too_little(rows, length, row_flag, length_flag)
        stacks = [s.tokens(n * length).reshape(n, length) for s, n in zip(self._streams, shares, strict=True)]
        order = sorted((i, k) for k, n in enumerate(shares) for i in range(n))  # turn by turn
        tokens = torch.from_numpy(np.stack([stacks[k][i] for i, k in order]))
        kinds = [f"-c {self._streams[k].source.name}" for _, k in order]
        check_ids(tokens, vocab_size, self._tokenizer, kinds)
        taken = [s.taken(n * length) for s, n in zip(self._streams, shares, strict=True)]
        digest = hashlib.sha256(b"".join(d for _, d in taken)).hexdigest()
        found = tuple(t for some, _ in taken for t in some)
        name = ", ".join(s.source.given for s in self._streams)
        return Rows(tokens, tuple(kinds), name, tuple(self._notes(shares)), found, digest)

    def _shares(self, rows: int, length: int) -> list[int]:
        """Rows of each source: as even as can be, where one that is too short leaves its turns to the others."""
        shares, short = [0] * len(self._streams), [False] * len(self._streams)
        even = -(-rows // len(self._streams))
        for stream in self._streams:
            stream.fill(even * length)
        while sum(shares) < rows and not all(short):
            for k, stream in enumerate(self._streams):
                if short[k] or sum(shares) == rows:
                    continue
                wanted = (shares[k] + 1) * length
                short[k] = stream.fill(wanted) < wanted
                shares[k] += not short[k]
        return shares

    def _too_little(self, rows: int, length: int, row_flag: str, length_flag: str) -> CalibrationError:
        have, documents = (sum(n) for n in zip(*((s.have, s.documents()) for s in self._streams), strict=True))
        usable = sum(s.have // length for s in self._streams)
        one = len(self._streams) == 1
        name = self._streams[0].source.given if one else f"{len(self._streams)} sources"
        return CalibrationError(
            f"{name}: {row_flag} {rows} x {length_flag} {length} needs {rows * length} tokens, "
            f"{'file gives' if one else 'they give'} {have} ({plural(documents, 'document')} with text)",
            f"use {f'{row_flag} {usable}' if usable else f'a smaller {length_flag}'}, or more text",
        )

    def _notes(self, shares: Sequence[int]) -> list[str]:
        notes = [note for s in self._streams for note in s.source.notes]
        unused = [s for s, share in zip(self._streams, shares, strict=True) if not share]
        notes += [f"-c {s.source.given}: not used, there are more sources than rows" for s in unused]
        for stream in self._streams:
            notes += [f"-c {stream.source.given}: {d['note']}" for d in stream.described if d["note"]]
            ignored = dict.fromkeys(name for d in stream.described for name in d["ignored"])
            if ignored:
                notes.append(f"-c {stream.source.given}: ignored columns: {some(ignored, SHOWN, NAME_CHARACTERS)}")
            if stream.skipped:
                notes.append(f"-c {stream.source.given}: left out: {plural(stream.skipped, 'record')} without text")
        return list(dict.fromkeys(notes + self._chats.notes()))
