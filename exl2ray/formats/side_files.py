"""The files beside a model's weights: which of them are copied into an output, and how large they may be.

Whoever made the folder chose what lies there, so nothing is believed to be small because of its name. A file that a model
does not work without has the limit of its kind and is refused beyond it; any other that is too large, too many, or no file at
all is left out and named.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from exl2ray.beneath import folder, make_directories, resolved
from exl2ray.errors import PERMISSIONS, SourceError, unreadable
from exl2ray.formats.file_states import FileState, Hashing, file_states
from exl2ray.formats.files import atomic_file, write_error
from exl2ray.formats.json_file import LFS_POINTER, LIMITS, MIB, read_json_object
from exl2ray.formats.links import link_error, outside_links
from exl2ray.formats.regular import file_kind, open_regular
from exl2ray.formats.shards import refuse_same_directory
from exl2ray.wording import some

# Weights in other formats, indexes of the source's shards, and settings of an adapter or of another way of quantising, which
# loaders would take for the output's; what a conversion leaves, which `publish` would take for this model's. The reference
# leaves out *.safetensors and *.bin only.
NOT_SIDE_FILES = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|ot)|consolidated\..*|.*\.(safetensors|bin)\.index\.json"
    r"|adapter_config\.json|adapter_model\..*|(quantize_config|quant_config|hf_quant_config)\.json"
    r"|(measurement|evaluation|job_new)\.json",
    re.IGNORECASE,
)
# Files whose absence, or half of whose content, would make another model.
NEEDED: dict[str, int] = {
    **LIMITS, "processor_config.json": 1 * MIB, "video_preprocessor_config.json": 1 * MIB, "chat_template.json": 2 * MIB,
    "chat_template.jinja": 1 * MIB, "tokenizer.model": 32 * MIB, "vocab.json": 32 * MIB, "merges.txt": 32 * MIB,
}  # fmt: skip
TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a model: chat templates with names of their own
TEMPLATE = re.compile(r"[^.].*\.jinja", re.ASCII)
# Objects in JSON that a conversion copies without reading them; those of the tokenizer are refused if they are broken.
UNREAD = (
    "generation_config.json", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
OTHER_BYTES = 32 * MIB  # of a file that none of these is: papers, pictures, code
TOTAL_BYTES = 1 << 30
MOST_FILES = 1000
POINTER_BYTES = (60, 1024)  # of a Git LFS pointer
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class SideFiles:
    """sizes: bytes of the files that are copied, by name, sorted. refused: problems. warnings: what is left out, in words."""

    sizes: dict[str, int]
    refused: tuple[SourceError, ...]
    warnings: tuple[str, ...]


def examine_side_files(source: str | Path) -> SideFiles:
    """Looks at sizes and kinds only. Raises OSError for a folder that cannot be listed."""
    source = Path(source)
    sizes: dict[str, int] = {}
    refused: list[SourceError] = []
    no_files: list[str] = []
    large: list[str] = []
    denied: list[str] = []
    pointers: list[str] = []
    for name, size, what in sorted(_found(source)):
        needed = _limit(name)
        if what:
            no_files.append(f"{name} ({what})")
        elif not os.access(source / name, os.R_OK):
            if needed:
                refused.append(SourceError(f"{source / name}: cannot be read: Permission denied", PERMISSIONS))
            else:
                denied.append(name)
        elif _is_pointer(source / name, size):
            if needed:
                text = f"{source / name}: a Git LFS pointer, not the file itself"
                refused.append(SourceError(text, "run `git lfs pull` in the model's folder"))
            else:
                pointers.append(name)
        elif size <= (needed or OTHER_BYTES):
            sizes[name] = size
        elif needed:
            refused.append(_too_large(source / name, size, needed))
        else:
            large.append(f"{name} ({size >> 20} MiB)")
    beyond = _beyond_total(sizes)
    warnings = [
        _left_out(large, f"larger than {OTHER_BYTES >> 20} MiB"),
        _left_out(beyond, f"beyond {MOST_FILES} files or {TOTAL_BYTES >> 20} MiB together"),
        _left_out(no_files, "not regular files"),
        _left_out(pointers, "Git LFS pointers in place of the files"),
        _left_out(denied, "this user may not read them"),
    ]
    kept = {name: size for name, size in sizes.items() if name not in beyond}
    return SideFiles(kept, tuple(refused), tuple(filter(None, warnings)))


def broken_side_files(source: str | Path) -> list[str]:
    """Warnings of JSON files that nobody here reads, and that are not what loaders of the output can read."""
    out = []
    for name in UNREAD:
        if (Path(source) / name).is_file():  # what is no file is not copied, and that is a warning of its own
            try:
                read_json_object(Path(source) / name, odd=True)
            except SourceError as e:
                out.append(f"{e.message}; it is copied into the output as it is: fetch it again, or delete it")
    return out


def check_side_files(source: str | Path) -> SideFiles:
    """Those that `copy_side_files` copies. Raises SourceError for what it refuses, so that nobody hears of it after hours of
    work: a link that leads elsewhere, config.json included, a file that is too large. OSError as above."""
    found = examine_side_files(source)
    if found.refused:
        raise found.refused[0]
    for name, real in outside_links(source, [*found.sizes, "config.json"]).items():
        raise link_error(source, name, real)
    return found


def side_files(source: str | Path) -> list[str]:
    """Names of the files that `copy_side_files` copies, sorted."""
    return list(examine_side_files(source).sizes)


def side_bytes(source: str | Path) -> int:
    """Bytes of these files."""
    return sum(examine_side_files(source).sizes.values())


def copy_side_files(source: str | Path, target: str | Path) -> list[str]:
    """Copy what belongs to a model besides weights and config.json; returns the names.

    Every regular file at the top level of ``source``, e.g. tokenizer, chat template, licence, and the chat templates in
    ``TEMPLATES``, within the limits above.
    Unlike the reference, also left out are weights in other formats (``*.pt``, ``*.pth``, ``*.gguf``,
    ``consolidated.*``, ...), the source's weight index files, which no longer describe the weights, and dot files.
    config.json is written by ``write_config``. Existing files are overwritten. Raises UsageError if both are one
    directory, SourceError for a link that leads elsewhere (`exl2ray.formats.links`), for a file that is too large, or that
    is another one than a moment ago, StoreError if writing fails.
    """
    source, target = Path(source), Path(target)
    refuse_same_directory(source, target)
    try:
        make_directories(target)
        found = check_side_files(source)
    except OSError as e:
        raise write_error(target, e) from e
    for name, size in found.sizes.items():
        folders = Path(name).parts[:-1]
        if folders:
            with folder(resolved(target), folders, create=True):
                pass
        with atomic_file(target / name) as out:
            for piece in _pieces(source / name, size):
                out.write(piece)
    return list(found.sizes)


def stale_side_files(source: str | Path, target: str | Path) -> list[str]:
    """Names of side files of ``source`` whose copy in ``target`` is missing or has another content."""

    def same(name: str, size: int) -> bool:
        copy = Path(target) / name
        try:
            if os.lstat(copy).st_size != size or not stat.S_ISREG(os.lstat(copy).st_mode):
                return False
            return all(a == b for a, b in zip(_pieces(Path(source) / name, size), _pieces(copy, size), strict=True))
        except (SourceError, OSError, ValueError):
            return False

    return [name for name, size in examine_side_files(source).sizes.items() if not same(name, size)]


def needed_files(directory: str | Path) -> tuple[FileState, ...]:
    """Config, tokenizer and whatever else the model is another one without, as they are now, by their content; none where
    they cannot be read. Between runs they may change: what depends on them has their content in its hash.
    """
    try:
        sizes = {"config.json": os.stat(Path(directory) / "config.json").st_size, **examine_side_files(directory).sizes}
        names = sorted(name for name, size in sizes.items() if size <= (_limit(name) or -1))
        states = [replace(file_states([Path(directory) / name])[0], name=name) for name in names]
        return tuple(replace(s, stamp="") for s in Hashing(states, Path(directory)).result())
    except (OSError, SourceError):
        return ()


def _limit(name: str) -> int | None:
    """Bytes that a file may have without which the model is another one; None for any other file."""
    return NEEDED["chat_template.jinja"] if name.startswith(f"{TEMPLATES}/") else NEEDED.get(name)


def _found(source: Path) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, what it is if it is no file) of everything but folders, and of the templates in theirs."""
    for name, mode, size, what in _entries(source):
        if name == TEMPLATES and stat.S_ISDIR(mode):
            try:
                inside = list(_entries(source / name))
            except OSError as e:
                yield name, 0, f"a folder: {e.strerror or e}"
                continue
            templates = [x for x in inside if TEMPLATE.fullmatch(x[0]) and not stat.S_ISDIR(x[1])]
            yield from ((f"{name}/{inner}", size, what) for inner, _, size, what in templates)
        elif name != "config.json" and not NOT_SIDE_FILES.fullmatch(name) and not stat.S_ISDIR(mode):
            yield name, size, what


def _entries(directory: Path) -> Iterator[tuple[str, int, int, str]]:
    """(name, mode, bytes, what it is if it is neither file nor folder)"""
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                found = entry.stat()
            except OSError as e:
                yield entry.name, 0, 0, f"a link: {e.strerror or e}" if entry.is_symlink() else str(e.strerror or e)
                continue
            known = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
            yield entry.name, found.st_mode, found.st_size, "" if known else file_kind(found.st_mode)


def _is_pointer(path: Path, size: int) -> bool:
    """Whether git left its pointer in the place of a file: the model would go into the output without it."""
    if not POINTER_BYTES[0] <= size <= POINTER_BYTES[1]:
        return False
    try:
        with open_regular(path) as f:
            return f.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _beyond_total(sizes: dict[str, int]) -> list[str]:
    """Names that are more than an output takes; what a model needs goes first, then the smallest."""
    out, total, count = [], 0, 0
    for name in sorted(sizes, key=lambda n: (n not in NEEDED, sizes[n], n)):
        if count < MOST_FILES and total + sizes[name] <= TOTAL_BYTES:
            count, total = count + 1, total + sizes[name]
        else:
            out.append(name)
    return out


def _left_out(names: list[str], why: str) -> str:
    if not names:
        return ""
    return f"not copied into the output, {why}: {some(names)}"


def _too_large(path: Path, size: int, most: int) -> SourceError:
    text = f"{path}: {size} bytes; larger than {most} bytes, which such a file may have"
    return SourceError(text, "is it the file that its name says? fetch it again")


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    """The content of a file that had ``size`` bytes when it was looked at. Raises SourceError."""
    try:
        with open_regular(path) as f:
            left = size
            while piece := f.read(min(PIECE_BYTES, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
    except OSError as e:
        raise unreadable(SourceError, path, e, "was the model changed meanwhile?") from e
    if left:
        raise SourceError(f"{path}: was written to while it was copied", "run the same command again")
