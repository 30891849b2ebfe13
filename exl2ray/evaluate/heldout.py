"""Text for evaluations that is no part of the built-in calibration set: prose, code, letters, notes, three languages."""

from __future__ import annotations

from fnmatch import fnmatch
from importlib import resources

import torch
from torch import Tensor

from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError

DEFAULT_LENGTH = 512  # tokens of a row: the text is short, and several rows give an error bar
KINDS = {
    "code": ("*.py", "*.go"),
    "stories": ("the-den*", "the-hen*", "the-wardrobe*"),
    "essays": ("the-level*", "why-*", "garden_*"),
    "technical": ("hash_*", "heat_*", "router_*"),
    "letters, law, news": ("complaint_*", "court_*", "lease_*"),
    "German and Spanish": ("de_*", "es_*"),
}  # names of the documents of each kind


def _documents() -> list[tuple[str, str]]:
    """(name, text), in the order of their names."""
    folder = resources.files("exl2ray.evaluate") / "heldout"
    files = sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.name)
    return [(p.name, p.read_text(encoding="utf-8").strip("\n")) for p in files]


def heldout_text() -> str:
    """All documents, in the order of their names, a blank line between two."""
    return "\n\n".join(text for _, text in _documents())


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


def heldout_kinds(
    tokenizer: ModelTokenizer,
    rows: Tensor,  # (R, T), of `heldout_rows` or the first of them
) -> dict[str, Tensor]:
    """Kind of text -> (R, T) bool: which tokens are of it; kinds without any are left out.

    Where a document ends is known to a token: a tokenizer may join its last characters with the first of the next one.
    """
    documents = _documents()
    beginnings = ["\n\n".join(text for _, text in documents[:i]) for i in range(1, len(documents))]
    ends = torch.tensor([len(tokenizer.encode(text)) for text in beginnings], dtype=torch.int64)
    owners = torch.bucketize(torch.arange(rows.numel()), ends, right=True).reshape(rows.shape)
    out = {}
    for kind, patterns in KINDS.items():
        own = [i for i, (name, _) in enumerate(documents) if any(fnmatch(name, p) for p in patterns)]
        out[kind] = torch.isin(owners, torch.tensor(own))
    return {kind: tokens for kind, tokens in out.items() if bool(tokens[:, 1:].any())}
