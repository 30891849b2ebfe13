"""Text for evaluations that is no part of the built-in calibration set: prose, code, letters, notes, three languages."""

from __future__ import annotations

from importlib import resources

import torch
from torch import Tensor

from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError

DEFAULT_LENGTH = 512  # tokens of a row: the text is short, and several rows give an error bar


def heldout_text() -> str:
    """All documents, in the order of their names, a blank line between two."""
    folder = resources.files("exl2ray.evaluate") / "heldout"
    documents = sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.name)
    return "\n\n".join(p.read_text(encoding="utf-8").strip("\n") for p in documents)


def heldout_rows(tokenizer: ModelTokenizer, length: int = DEFAULT_LENGTH) -> Tensor:
    """Int64 (rows, length) of the text, cut one after the other; what does not fill a row is left out.

    Raises CalibrationError if the text does not fill a row.
    """
    ids = tokenizer.encode(heldout_text())
    rows = len(ids) // length
    if rows < 1:
        raise CalibrationError(
            f"the built-in evaluation text has {len(ids)} tokens, a row takes {length}", "use shorter rows, or --tokens"
        )
    return torch.from_numpy(ids[: rows * length].reshape(rows, length).copy())
