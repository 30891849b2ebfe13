"""Rows of tokens to evaluate on, from an array of ids or from a text."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2ray.calibration.data.sources import COMPRESSED, kind_by_name, local_source
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.calibration.tokenizer_files import has_tokenizer
from exl2ray.errors import CalibrationError, SourceError, UsageError, reading_hint, unreadable
from exl2ray.evaluate.forward import open_model
from exl2ray.formats.json_file import BINARIES, ENCODINGS, LFS_POINTER, read_bounded

DEFAULT_LENGTH = 2048  # tokens of a row
MOST_TOKENS = 1 << 26  # that one evaluation takes; on the fastest machines more than a day
# What numpy's parser of headers, which is Python's, raises for those that are none.
BROKEN_HEADER = (ValueError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError, TokenError)
TEXT_BYTES = 64 << 20  # of a text file, which is encoded as a whole
MAX_DATA_TOKENS = 1 << 20  # of a data set, which has no end for that purpose


def find_tokenizer(directories: Sequence[str | Path]) -> ModelTokenizer:
    """Tokenizer of the first of the model directories that has one; SourceError if none has."""
    for directory in map(Path, directories):
        if has_tokenizer(directory):
            model = open_model(directory)
            return load_tokenizer(directory, model.source.config, model.vocab_size)
    raise SourceError(
        f"no tokenizer.json in {', '.join(map(str, directories)) or 'any directory'}",
        "--text needs a tokenizer: copy tokenizer.json into the model directory, or give token ids with --tokens F.npy",
    )


def load_tokens(
    path: str | Path,
    tokenizer: ModelTokenizer | None = None,  # for text; see find_tokenizer
    rows: int | None = None,  # None: all there are
    length: int | None = None,  # None: DEFAULT_LENGTH, or that of a 2-D array
    stride: int | None = None,
) -> Tensor:
    """Int64 (rows, length) from a ``.npy`` array of ids, (n,) or (R, T) of any integer dtype, a UTF-8 text
    file, or a Parquet, JSON lines or JSON file as -c takes it.

    A running text (flat array, text file) is cut into rows one after the other, or with a stride into windows that
    start ``stride`` tokens apart; what does not fill a row is left out. Rows of a 2-D array are cut to ``length``.
    BOS is neither added nor removed. Raises UsageError for flags that contradict the data, CalibrationError naming the
    numbers when there are not enough tokens or the file is unusable, SourceError for text without a tokenizer.
    """
    file = Path(path)
    check_flags(rows, length, stride)
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except PermissionError as e:
        raise unreadable(CalibrationError, file, e) from e
    except (OSError, ValueError):
        regular = False
    if not regular:
        raise CalibrationError(f"{file}: missing or not a regular file", "--tokens and --text take a file")
    if file.suffix == ".npy":
        ids = _load_array(file, rows, length or DEFAULT_LENGTH, stride)
        if ids.ndim == 2:
            if stride is not None:
                text = f"--stride {stride}: {file} holds separate rows {ids.shape}, not one running text"
                raise UsageError(text, "leave out --stride, or save the ids as one row: array.reshape(-1)")
            return _first_rows(file, ids, rows, length)
    else:
        wanted = None if rows is None else ((rows - 1) * (stride or length or DEFAULT_LENGTH)) + (length or DEFAULT_LENGTH)
        ids = _encode(file, tokenizer, wanted)
    return _windows(file, ids, rows, length or DEFAULT_LENGTH, stride)


def check_flags(rows: int | None, length: int | None, stride: int | None) -> None:
    """UsageError for numbers that no evaluation can have; None stands for a flag that was not given."""
    for flag, value, least in (("--rows", rows, 1), ("--length", length, 2), ("--stride", stride, 1)):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value}: at least {least} is needed", f"leave out {flag} for the usual number")
    if stride is not None and stride > (length or DEFAULT_LENGTH):
        text = f"--stride {stride} is greater than --length {length or DEFAULT_LENGTH}; tokens would be lost"
        raise UsageError(text, "lower --stride; as large as --length, windows lie side by side")


def _load_array(file: Path, rows: int | None, length: int, stride: int | None) -> NDArray[np.int64]:
    """The ids, no more of them than ``rows`` need."""
    try:
        # Mapped, so that the dtype is looked at before a huge file is read; it refuses pickled objects, which run code.
        array: NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
    except (OSError, EOFError, *BROKEN_HEADER) as e:
        what, hint = _no_array(file, e)
        raise CalibrationError(f"{file}: not a .npy array: {what}", hint) from e
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise CalibrationError(
            f"{file}: {array.dtype} with shape {array.shape}; token ids are integers, (n,) or (rows, length)",
            "write it with numpy.save, from what the model's tokenizer gives",
        )
    if rows is not None:
        array = array[:rows] if array.ndim == 2 else array[: (rows - 1) * (stride or length) + length]
    if array.size > MOST_TOKENS:
        raise CalibrationError(f"{file}: {array.size} token ids; at most {MOST_TOKENS} are evaluated", "lower --rows")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 1 << 31:
        text = f"{file}: token ids from {array.min()} to {array.max()}"
        raise CalibrationError(text, "ids begin at 0; write it with numpy.save, from what the model's tokenizer gives")
    return np.array(array, dtype=np.int64)


def _no_array(file: Path, e: BaseException) -> tuple[str, str]:
    """(what a file is that numpy does not open, what to do); numpy tells of its own parser."""
    again, save = "is the download complete? fetch or copy it again", "write it with numpy.save"
    if isinstance(e, OSError) and e.strerror:
        return f"cannot be read: {e.strerror}", reading_hint(e, again)
    with file.open("rb") as f:
        head, size = f.read(64), os.fstat(f.fileno()).st_size
    if size == 0:
        return "is empty", again
    if head.startswith(b"PK\x03\x04"):
        return "an archive of arrays (.npz)", "save the one with the ids: numpy.save('ids.npy', numpy.load(FILE)[NAME])"
    if head.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder"
    if not head.startswith(b"\x93NUMPY"):
        found = "a pickle" if head[:1] == b"\x80" else f"it begins with {head[:6]!r}"
        return found, f"{save}; a text has another ending"
    if "mmap length" in str(e) or str(e).startswith("EOF"):
        return f"it breaks off: its header tells of more than its {size} bytes", again
    if "Python objects" in str(e):
        return "it holds Python objects", f"{save}, as integers: array.astype('int64')"
    return "its header cannot be read", again


def _encode(file: Path, tokenizer: ModelTokenizer | None, wanted: int | None) -> NDArray[np.int64]:
    """Ids of a text file, or of a file as -c takes it: its first ``wanted`` tokens, else MAX_DATA_TOKENS at most."""
    if tokenizer is None:
        raise SourceError(
            f"{file}: this is no .npy array of token ids, and a text needs a tokenizer",
            "--text takes texts and data sets, --tokens what numpy.save writes",
        )
    if kind_by_name(file.name) not in (None, "text", "Markdown") or file.suffix in COMPRESSED:
        with CalibrationData([local_source(str(file))], tokenizer) as data:
            return data.tokens(min(wanted or MAX_DATA_TOKENS, MAX_DATA_TOKENS))
    raw = read_bounded(file, TEXT_BYTES, CalibrationError)
    binary = next((name for mark, name in BINARIES if raw.startswith(mark)), None)
    if binary is not None:
        raise CalibrationError(f"{file}: is {binary}, not a text", "give the text in it, as UTF-8")
    wide = next((name for mark, name in ENCODINGS if raw.startswith(mark)), None)
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")  # as -c reads it, so without a byte order mark
    except UnicodeDecodeError as e:
        hint = f"iconv -f {wide or 'LATIN1'} -t UTF-8 FILE > NEW; token ids are recognised by the ending .npy"
        raise CalibrationError(f"{file}: not UTF-8 text (byte {e.start})", hint) from e
    if "\0" in text:
        what = f"{file}: holds zero bytes, as a text does not"
        raise CalibrationError(what, "texts are UTF-8; Parquet, Arrow and JSON lines are recognised by their endings")
    return tokenizer.encode(text)


def _first_rows(file: Path, ids: NDArray[np.int64], rows: int | None, length: int | None) -> Tensor:
    found, width = ids.shape
    rows, length = rows or found, length or width
    if rows > found or length > width or found < 1 or width < 2:
        raise CalibrationError(
            f"{file}: has {found} rows of {width} tokens; --rows {rows} --length {length} asks for more",
            "lower --rows or --length",
        )
    return torch.from_numpy(ids[:rows, :length].copy())


def _windows(file: Path, ids: NDArray[np.int64], rows: int | None, length: int, stride: int | None) -> Tensor:
    step = stride or length
    available = (len(ids) - length) // step + 1 if len(ids) >= length else 0
    wanted = rows or max(1, available)
    if wanted > available:
        raise CalibrationError(
            f"{file}: has {len(ids)} tokens; {wanted} rows of --length {length}"
            + (f" --stride {stride}" if stride else "")
            + f" need {(wanted - 1) * step + length}",
            "lower --rows or --length, or give more text",
        )
    return torch.from_numpy(np.stack([ids[i * step : i * step + length] for i in range(wanted)]))
