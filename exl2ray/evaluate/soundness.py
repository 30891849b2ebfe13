"""Whether an EXL2 directory can be run as well as read: the rules of its format, then its configuration and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.errors import Exl2RayError, UnknownArchitectureError
from exl2ray.evaluate.forward import open_model
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.verify import verify_directory
from exl2ray.formats.verify_rules import Problem

BEFORE = ("file", "config", "side-file")  # rules without which nothing can be said of what follows


def problems_of(directory: str | Path, expected: Mapping[str, LinearShape] | None = None) -> list[Problem]:
    """What `verify_directory` finds, and as rules ``model`` and ``tokenizer`` why a directory that keeps them could not be
    run. Of a family that is not known here, which others may well run, nothing more is said."""
    found = verify_directory(directory, expected)
    return found if any(p.rule in BEFORE for p in found) else [*found, *_unfit(Path(directory))]


def _unfit(directory: Path) -> Iterator[Problem]:
    try:
        model = open_model(directory)
    except UnknownArchitectureError:
        return
    except Exl2RayError as e:
        yield Problem.of_error(directory, "config.json", "model", e)
        return
    try:
        load_tokenizer(directory, model.source.config, model.spec.hyper.vocab_size).close()
    except Exl2RayError as e:
        yield Problem.of_error(directory, "tokenizer.json", "tokenizer", e)
