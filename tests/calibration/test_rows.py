"""The built-in rows: the table, the halves, seeds, errors, and the file they are kept in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration_helpers import TEMPLATE, train_bpe, write_model

from exl2ray.calibration.rows import Rows, RowSet, builtin_rows
from exl2ray.calibration.text import Document
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.errors import CalibrationError, SourceError

Documents = tuple[Document, ...]
MEASURE = {
    "web": 2, "articles": 3, "code": 2, "stories": 2, "chat": 1, "formats": 1, "multilingual": 3, "shuffled": 1,
    "random": 2, "technical": 2,
}  # fmt: skip
QUANTIZE = {
    "web": 12, "articles": 20, "code": 20, "stories": 9, "chat": 9, "formats": 12, "multilingual": 15, "shuffled": 5,
    "random": 2, "technical": 11,
}  # fmt: skip


def of_kind(rows: Rows, kind: str) -> torch.Tensor:
    return rows.ids[[k == kind for k in rows.kinds]]


def windows(ids: np.ndarray, n: int) -> Counter[bytes]:
    """How often each run of n tokens within a row occurs."""
    views = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int32), n, axis=1)
    return Counter(w.tobytes() for row in views for w in row)


@pytest.mark.parametrize(("row_set", "table"), [("measure", MEASURE), ("quantize", QUANTIZE)])
@pytest.mark.parametrize("noise", [False, True])
def test_table(tokenizer: ModelTokenizer, documents: Documents, row_set: RowSet, table: dict[str, int], noise: bool) -> None:
    rows = builtin_rows(tokenizer, row_set, 128, 0, 2048, noise=noise, documents=documents)
    extra = {"noise": 5 if row_set == "measure" else 30} if noise else {}
    assert Counter(rows.kinds) == {**table, **extra}
    assert sum(table.values()) == (19 if row_set == "measure" else 115)
    assert list(dict.fromkeys(rows.kinds)) == [*table, *extra]
    assert rows.ids.dtype == torch.int64
    assert rows.ids.shape == (sum(table.values()) + sum(extra.values()), 128)
    assert ((of_kind(rows, "noise") == -1).all()) if noise else int(rows.ids.min()) >= 0
    assert rows.source == "built-in"


def test_seed(tokenizer: ModelTokenizer, documents: Documents) -> None:
    one, again, other = (
        builtin_rows(tokenizer, "quantize", 256, seed, 2048, documents=documents) for seed in (5, 5, 6)
    )
    assert torch.equal(one.ids, again.ids)
    assert (one.kinds, one.source, one.notes) == (again.kinds, again.source, again.notes)
    for kind in QUANTIZE:
        assert not torch.equal(of_kind(one, kind), of_kind(other, kind))


def test_bos_and_eos(tokenizer: ModelTokenizer, documents: Documents) -> None:
    rows = builtin_rows(tokenizer, "quantize", 256, 0, 2048, documents=documents)
    for kind in ("articles", "stories", "chat"):
        starts = of_kind(rows, kind)[:, 0] == tokenizer.bos_id
        half = len(starts) // 2
        assert not starts[:half].any()
        assert starts[half:].all()
        assert (of_kind(rows, kind) == tokenizer.eos_id).any()
    for kind in ("web", "code", "formats", "multilingual", "shuffled", "technical"):
        assert not torch.isin(of_kind(rows, kind), torch.tensor([tokenizer.bos_id, tokenizer.eos_id])).any()


def test_model_without_bos_and_eos(make_tokenizer: Callable[..., ModelTokenizer], documents: Documents) -> None:
    bare = make_tokenizer(bos_token=None, eos_token=None)
    rows = builtin_rows(bare, "quantize", 256, 0, 2048, documents=documents)
    text = rows.ids[[k != "random" for k in rows.kinds]]
    assert not torch.isin(text, torch.tensor([0, 1, 2])).any()


def test_consecutive_rows_are_the_text(tokenizer: ModelTokenizer, documents: Documents) -> None:
    """Joined, the rows of a set read as whole documents one after the other."""
    rows = builtin_rows(tokenizer, "quantize", 2048, 0, 2048, documents=documents)
    text = tokenizer.decode(of_kind(rows, "code").flatten().tolist())
    written = {d.text.strip("\n") for d in documents if d.kind == "code"}
    assert set(text.split("\n\n\n")[:3]) <= written


def test_shuffled_rows_are_pieces_of_the_multilingual_rows(tokenizer: ModelTokenizer, documents: Documents) -> None:
    rows = builtin_rows(tokenizer, "measure", 512, 0, 2048, documents=documents)
    pieces = {tuple(p) for p in of_kind(rows, "multilingual").reshape(-1, 128).tolist()}
    shuffled = [tuple(p) for p in of_kind(rows, "shuffled").reshape(-1, 128).tolist()]
    assert pieces.issuperset(shuffled)
    assert len(set(shuffled)) == 4


def test_chat_template(make_tokenizer: Callable[..., ModelTokenizer], documents: Documents) -> None:
    model = make_tokenizer(bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    rows = builtin_rows(model, "quantize", 256, 0, 2048, documents=documents)
    chat = of_kind(rows, "chat")
    # The template writes <s> itself: conversations start with one, not two.
    assert not ((chat[:, :-1] == 1) & (chat[:, 1:] == 1)).any()
    assert (chat[:, 0] == 1).any()
    assert "[user] " in model.decode(chat[0].tolist())
    assert not any("plain text" in note for note in rows.notes)
    plain = builtin_rows(model, "quantize", 256, 0, 2048, documents=documents, chat_rows=False)
    assert "[user] " not in model.decode(of_kind(plain, "chat").flatten().tolist())
    assert torch.equal(of_kind(plain, "web"), of_kind(rows, "web"))


def test_broken_chat_template_is_noted(make_tokenizer: Callable[..., ModelTokenizer], documents: Documents) -> None:
    model = make_tokenizer(chat_template="{{ raise_exception('tools only') }}")
    rows = builtin_rows(model, "measure", 128, 0, 2048, documents=documents)
    assert any("plain text" in note and "tools only" in note for note in rows.notes)


def test_too_little_text_is_noted(tokenizer: ModelTokenizer, documents: Documents) -> None:
    few = [d for d in documents if d.name.startswith(("00", "de_00", "0."))]
    rows = builtin_rows(tokenizer, "quantize", 2048, 0, 2048, documents=few)
    assert rows.ids.shape == (115, 2048)
    assert any(n.startswith("code: ") and n.endswith("of 40960 tokens are generated text") for n in rows.notes)
    assert any(n.startswith("stories") and n.endswith("a second pass over the same text") for n in rows.notes)
    assert any(n.startswith("stories") and n.endswith("generated text") for n in rows.notes)
    enough = builtin_rows(tokenizer, "measure", 128, 0, 2048, documents=documents)
    assert enough.notes == ()


def test_a_set_without_documents(tokenizer: ModelTokenizer, documents: Documents) -> None:
    with pytest.raises(CalibrationError, match="no documents of kind fiction or poetry"):
        builtin_rows(
            tokenizer, "measure", 128, 0, 2048, documents=[d for d in documents if d.kind not in ("fiction", "poetry")]
        )


def test_long_rows_are_clipped_with_a_note(tokenizer: ModelTokenizer, documents: Documents) -> None:
    rows = builtin_rows(tokenizer, "measure", 4096, 0, 2048, documents=documents, max_positions=2048)
    assert rows.ids.shape == (19, 2048)
    assert rows.notes[0] == "-ml/--measurement-length 4096: rows of the built-in set have at most 2048 tokens"


@pytest.mark.parametrize(
    ("row_set", "length", "max_positions", "message"),
    [
        ("quantize", 2000, None, r"-l/--length 2000 is not a multiple of 128"),
        ("measure", 1000, None, r"-ml/--measurement-length 1000 is not a multiple of 128"),
        ("quantize", 127, None, r"-l/--length 127: .* at least 128"),
        ("measure", 0, None, r"-ml/--measurement-length 0: "),
        ("measure", -128, None, r"-ml/--measurement-length -128: "),
        ("quantize", 2048, 1024, r"-l/--length 2048 is longer than the 1024 positions"),
        ("measure", 256, 100, r"-ml/--measurement-length 256 is longer than the 100 positions"),
    ],
)
def test_unusable_lengths(
    tokenizer: ModelTokenizer, documents: Documents, row_set: RowSet, length: int, max_positions: int | None, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        builtin_rows(tokenizer, row_set, length, 0, 2048, documents=documents, max_positions=max_positions)
    assert error.value.hint


def test_ids_beyond_the_embedding(tokenizer: ModelTokenizer, documents: Documents) -> None:
    with pytest.raises(SourceError, match=r"token id \d+; the model has 300 embedding rows"):
        builtin_rows(tokenizer, "measure", 128, 0, 300, documents=documents)


@pytest.mark.parametrize("ids", [torch.zeros(2, 4), torch.zeros(4).long(), torch.zeros(3, 4).long()])
def test_rows_check_their_shape(ids: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match="expected int64"):
        Rows(ids, ("a", "b"), "x")


@pytest.fixture(scope="module", params=[4096, 32000])
def full(request: pytest.FixtureRequest, builtin: Documents, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """All 115 rows of the built-in text, with a vocabulary trained on it: the large one needs the most text."""
    size = request.param
    bpe = train_bpe([d.text for d in builtin], size)
    directory = write_model(tmp_path_factory.mktemp("bpe"), bpe, {"bos_token": "<s>", "eos_token": "</s>"})
    return builtin_rows(load_tokenizer(directory, {}, size), "quantize", 2048, 0, size)


def test_repetition_is_bounded(full: Rows) -> None:
    counts = windows(full.ids.numpy(), 8)
    assert len(counts) / counts.total() >= 0.9


def test_no_passage_more_than_twice(full: Rows) -> None:
    text = full.ids[[kind != "random" for kind in full.kinds]]
    assert max(windows(text.numpy(), 64).values()) <= 2


def test_tiny_llama(shared_dir: Path) -> None:
    model = shared_dir / "models" / "tiny-llama-7m"
    config = json.loads((model / "config.json").read_text())
    tokenizer = load_tokenizer(model, config, config["vocab_size"])
    rows = builtin_rows(tokenizer, "measure", 2048, 0, 4096, max_positions=config["max_position_embeddings"])
    assert rows.ids.shape == (19, 2048)
    assert int(rows.ids.max()) < 4096
    # Text, not noise: the written rows use far fewer different ids than uniform ones.
    assert of_kind(rows, "articles").unique().numel() < 0.6 * of_kind(rows, "random").unique().numel() * 3 / 2
