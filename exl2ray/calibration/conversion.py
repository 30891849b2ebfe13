"""Vocabularies that are no ``tokenizer.json``: SentencePiece's tokenizer.model, vocab.json with merges.txt, tiktoken files.

The transformers library converts them, if it is installed, in a child process with limits and without the network. Nothing
is written into the model's folder.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from exl2ray.calibration.limited import MIB, ChildError, LimitedProcess
from exl2ray.calibration.vocabulary_forms import check_form
from exl2ray.errors import SourceError
from exl2ray.formats.json_file import read_bounded, refuse_substitute

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
OTHERS = ("vocab.json", "tekken.json", "tiktoken.model")
SAMPLES = (
    "The house stood at the end of the street, and nobody had lived there for years.",
    "Das Haus stand am Ende der Straße; Äpfel lagen im Gras.",
    "for (int i = 0; i < 10; i++) { total += values[i]; }",
    "She wrote: 'In 1987, 3.5 million people watched it.'",
    "def area(r):\n    return 3.14159 * r ** 2",
    "Можно ли это прочитать?",
    "今日は天気がいいですね。",
    "Ça va, naïve? No: façade.",
)
MAX_BYTES = 32 * MIB
MEMORY_BYTES = 1400 * MIB
SECONDS, SECONDS_PER_MIB = 10.0, 4.0  # of which three go to importing transformers


def vocabulary_files(root: Path) -> list[str]:
    """Names of files in ``root`` that a tokenizer could be made of."""
    found = [name for name in (*SENTENCEPIECE, *OTHERS) if os.path.lexists(root / name)]
    return found + (["merges.txt"] if os.path.lexists(root / "merges.txt") else [])


def converted_json(root: Path) -> tuple[bytes, list[str]]:
    """Content of the tokenizer.json that transformers makes of ``root``, and warnings.

    Raises SourceError when there is nothing to convert, or it cannot be converted: what is there, and the one thing to do.
    """
    files = vocabulary_files(root)
    usable = [name for name in files if name != "merges.txt"]
    if not usable or (usable == ["vocab.json"] and "merges.txt" not in files):
        beside = f" (there is {' and '.join(files)}, which is not enough)" if files else ""
        raise SourceError(
            f"tokenizer not found: {root / 'tokenizer.json'}{beside}", "download tokenizer.json into the model's folder"
        )
    size = sum(len(_checked(root / name)) for name in files)
    what = f"{root}: no tokenizer.json, only {' and '.join(files)}"
    child = LimitedProcess("convert")
    try:
        answer, blobs = child.ask(
            {"op": "convert", "directory": os.path.abspath(root)},
            cpu_seconds=SECONDS + SECONDS_PER_MIB * size / MIB, memory_bytes=MEMORY_BYTES, answer_bytes=256 * MIB,
        )  # fmt: skip
    except ChildError as e:
        if "mistral-common" in e.reason:  # transformers is there
            text = f"{what}, of Mistral; converting it needs that publisher's package"
            raise SourceError(text, _install_hint(root, "mistral-common")) from e
        if e.reason.startswith(("ModuleNotFoundError", "ImportError")):
            raise SourceError(f"{what}; converting it needs transformers: {e.reason}", _install_hint(root)) from e
        if "`tiktoken` is required" in e.reason:
            text = f"{what}, of tiktoken; converting it needs that package"
            raise SourceError(text, _install_hint(root, "tiktoken")) from e
        raise SourceError(f"{what}; transformers cannot convert it: {e.reason}", _command_hint(root)) from e
    finally:
        child.close()
    warnings = []
    if answer["differing"]:
        warnings.append(
            f"{what}: as transformers converts it, {answer['differing']} of {len(SAMPLES)} sample lines get other ids than "
            "SentencePiece gives them, which ExLlamaV2 uses where there is a tokenizer.model"
        )
    return blobs[0], warnings


def _checked(path: Path) -> bytes:
    data = read_bounded(path, MAX_BYTES)
    refuse_substitute(data, str(path), SourceError)
    if not data:
        raise SourceError(f"{path}: is empty", "download the file again")
    check_form(path, data)
    return data


def _install_hint(root: Path, package: str = "'exl2ray[sentencepiece]'") -> str:
    return f"pip install {package} and run again, or where transformers is installed: {_command(root)}"


def _command_hint(root: Path) -> str:
    return f"convert it where the model can be loaded: {_command(root)}"


def _command(root: Path) -> str:
    directory = repr(str(root))
    load = f"AutoTokenizer.from_pretrained({directory})"
    return f"python -c {shlex.quote(f'from transformers import AutoTokenizer; {load}.save_pretrained({directory})')}"


def backend_json(directory: str) -> tuple[str, int]:
    """In the child: the converted tokenizer as JSON, and how many of SAMPLES get other ids from SentencePiece.

    Raises what transformers raises, ImportError if a library is missing.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no form that tokenizer.json could hold")
    return str(backend.to_str()), _differing(directory, backend)


def _differing(directory: str, backend: Any) -> int:
    path = next((p for name in SENTENCEPIECE if (p := Path(directory) / name).is_file()), None)
    if path is None:
        return 0
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        return 0
    original = SentencePieceProcessor(model_file=str(path))
    return sum(original.encode(text) != backend.encode(text, add_special_tokens=False).ids for text in SAMPLES)
