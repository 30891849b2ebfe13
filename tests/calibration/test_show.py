"""The summary behind ``exl2ray calibration --show``."""

from __future__ import annotations

import pytest
import torch

from exl2ray.calibration import show
from exl2ray.calibration.rows import Rows
from exl2ray.calibration.show import describe_rows, preview
from exl2ray.calibration.tokenizer import ModelTokenizer


def test_summary(tokenizer: ModelTokenizer) -> None:
    text = tokenizer.encode("the quick brown harbour and the slow ferry " * 40)[:128]
    ids = torch.stack([torch.from_numpy(text), torch.arange(128), torch.arange(128), torch.full((128,), -1)])
    view = describe_rows(Rows(ids, ("web", "random", "random", "noise"), "built-in", ("note",)), tokenizer, words=3)
    assert (view.source, view.rows, view.length, view.vocab_size, view.notes) == ("built-in", 4, 128, 2048, ("note",))
    assert [(k.kind, k.rows, k.tokens) for k in view.kinds] == [("web", 1, 128), ("random", 2, 256), ("noise", 1, 128)]
    web, uniform, noise = view.kinds
    assert web.first_words == "the quick brown"
    assert web.distinct == len(set(text.tolist()))
    assert uniform.distinct == 128
    assert (noise.distinct, noise.first_words) == (0, "")
    assert view.distinct == len({*text.tolist(), *range(128)})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two  words\n\nand more", "two words and"),
        ("x" * 44, "x" * 44),
        ("x" * 45, "x" * 41 + "..."),
        ("a" * 40 + " bcdef", "a" * 40 + "..."),  # no space before the dots
        ("\u6a4b" * 23, "\u6a4b" * 20 + "..."),  # a Han character is two columns wide
        ("e\u0301" * 44, "e\u0301" * 44),  # a combining accent none
        ("\u6a4b\ufffd\ufffd", "\u6a4b"),
        ("", ""),
    ],
)
def test_preview_fits_the_table(text: str, line: str) -> None:
    assert preview(text, words=3, columns=44) == line


def test_preview_looks_at_the_beginning_of_a_long_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(show, "_columns", lambda char: seen.append(char) or 1)
    assert preview("b" * 10_000_000, words=3, columns=44) == "b" * 41 + "..."
    assert len(seen) < 10_000
