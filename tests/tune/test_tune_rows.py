"""What is held out: by kind and by document, a tenth, never what is trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_model

from exl2ray.calibration.data.sources import local_source
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.datasets import text_source
from exl2ray.errors import CalibrationError
from exl2ray.formats.hf import SourceModel
from exl2ray.tune.documents import Kind, builtin_kinds, kinds_of_files, part
from exl2ray.tune.judge import WATCHED
from exl2ray.tune.mixture import PASSES
from exl2ray.tune.rows import Batches, check_text, tuning_rows
from exl2ray.tune.settings import Settings

LENGTH = 64
BUILT_IN = ["web", "articles", "code", "stories", "chat", "formats", "multilingual", "technical"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m", "Llama")


def text_of(decoded: str) -> str:
    """Of tokens that are bytes."""
    return decoded.replace(" ", "").replace("\u0120", " ").replace("\u010a", "\n")


def kind(*lengths: int) -> Kind:
    """Documents whose tokens are all different: document d has d * 10000, d * 10000 + 1, ..."""
    return Kind("k", [np.arange(n) + 10000 * d for d, n in enumerate(lengths)])


@pytest.mark.parametrize("lengths", [[100] * 50, [30, 700, 31, 900, 32, 33, 34] * 5, [20] * 200])
def test_documents_are_held_out_whole(lengths: list[int]) -> None:
    total = sum(lengths)
    found = part(kind(*lengths), total // 10, 16, seed=3)
    assert not found.cut
    assert total // 10 <= sum(map(len, found.held)) <= total // 5
    assert sum(map(len, found.held)) + sum(map(len, found.trained)) == total
    ids = [{int(d[0]) // 10000 for d in docs} for docs in (found.trained, found.held)]
    assert not ids[0] & ids[1]
    assert len(ids[0]) + len(ids[1]) == len(lengths)
    assert [len(d) for d in found.held] == [lengths[int(d[0]) // 10000] for d in found.held]


def test_of_a_long_document_passages_with_a_gap_on_both_sides() -> None:
    found = part(kind(40_000), 4000, 100, seed=0)
    assert found.cut
    assert [len(p) for p in found.held] == [1000] * 4
    trained = {int(i) for ids in found.trained for i in ids}
    for passage in found.held:
        assert not trained & set(range(int(passage[0]) - 100, int(passage[-1]) + 101))
    assert len(trained) == 40_000 - 4000 - 7 * 100  # nothing follows the last one


def test_copies_of_what_is_held_out_are_not_trained_on() -> None:
    one = Kind("k", [np.arange(100) + 10000 * (d % 10) for d in range(20)])
    found = part(one, 200, 16, seed=0)
    held = {int(d[0]) for d in found.held}
    assert held
    assert not held & {int(d[0]) for d in found.trained}


def test_rows_of_files(model: Path, tmp_path: Path) -> None:
    talks = [{"text": chr(97 + i % 26) * 300} for i in range(78)]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"text": t["text"] + str(i)}) for i, t in enumerate(talks)))
    (tmp_path / "book.txt").write_text("\n".join(f"{i:05d} " * 9 for i in range(400)))
    sources = [local_source(str(tmp_path / name)) for name in ("talks.jsonl", "book.txt")]
    source = SourceModel(model)
    with load_tokenizer(model, source.config, source.config["vocab_size"]) as tokenizer:
        rows = tuning_rows(sources, tokenizer, 16 * 1024, LENGTH, source.config["vocab_size"])
        again = tuning_rows(sources, tokenizer, 16 * 1024, LENGTH, source.config["vocab_size"])
        decoded = [text_of(tokenizer.process.decode(row)) for row in rows.held_ids.tolist()]
        trained = " ".join(text_of(tokenizer.process.decode(row)) for row in rows.ids.tolist())
    assert rows.ids.shape == (256, LENGTH)
    assert all(12 <= rows.held_kinds.count(kind) <= 15 for kind in ("talks.jsonl", "book.txt"))
    watched = [k for k in rows.held_kinds if k not in ("talks.jsonl", "book.txt")]
    assert {k: watched.count(WATCHED + k) for k in BUILT_IN} == dict.fromkeys(BUILT_IN, 2), "the others are not lost sight of"
    assert len(watched) == 2 * len(BUILT_IN)
    assert (again.ids == rows.ids).all()
    assert (again.held_ids == rows.held_ids).all()
    assert [n for n in rows.notes if "passages" in n] == ["book.txt: documents are long; passages of one are held out, "
                                                         "apart from what is trained on"]  # fmt: skip
    assert "trained on this text alone: with --text builtin beside it other kinds of text gain, too" in rows.notes
    for text, name in zip(decoded, rows.held_kinds, strict=True):
        if name == "book.txt":
            numbers = {n for n in text.split() if len(n) == 5}
            assert numbers, repr(text)
            assert not numbers & set(trained.split())


def numbered(folder: Path, **lines: int) -> list[Any]:
    """Text files whose lines are all different, so many in each."""
    for name, count in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(f"{name} line {i} of {count}" for i in range(count)))
    return [local_source(str(folder / f"{name}.txt")) for name in lines]


def test_what_one_source_lacks_comes_from_the_others(model: Path, tmp_path: Path) -> None:
    """A half for each of two was read, and the longer one gone through twice where there was more of it."""
    sources, source = numbered(tmp_path, small=20, large=2000), SourceModel(model)
    with load_tokenizer(model, source.config, source.config["vocab_size"]) as tokenizer:
        small, large = kinds_of_files(sources, tokenizer, 10_000)
        both = kinds_of_files(sources, tokenizer, 200)
        all_there_is = kinds_of_files(sources, tokenizer, 10**7)
    assert small.tokens + large.tokens == 10_000
    assert small.tokens == all_there_is[0].tokens < 1000, "all of it"
    assert [kind.tokens for kind in both] == [100, 100]
    assert 10_000 < all_there_is[1].tokens < 10**6


def test_each_place_of_text_is_a_kind_whatever_it_is_called(model: Path, tmp_path: Path) -> None:
    """Files of one name were one kind with one share; a folder "mean" took the place of the mean of all, one called as text
    that is only watched counted for nothing, and a name that is not UTF-8 ended the tuning."""
    names, source = ["a/x.txt", "b/x.txt", "mean", "chat", "built-in web", "self: chat", "\udcff"], SourceModel(model)
    for name in names:
        file = tmp_path / (name if name.endswith(".txt") else f"{name}/text.txt")
        file.parent.mkdir()
        file.write_text("\n".join(f"line {i} of {name!a}" for i in range(500)))
    sources = [local_source(str(tmp_path / name)) for name in (*names, "b/x.txt")]
    with load_tokenizer(model, source.config, source.config["vocab_size"]) as tokenizer:
        kinds = kinds_of_files(sources, tokenizer, 10**6)
        rows = tuning_rows(sources, tokenizer, 160 * LENGTH, LENGTH, source.config["vocab_size"])
    called = ["x.txt", "x.txt (2)", "file mean", "file chat", "file built-in web", "file self: chat", r"\udcff"]
    assert [kind.name for kind in kinds] == called
    assert [name for name in dict.fromkeys(rows.held_kinds) if not name.startswith(WATCHED)] == called


def test_copies_in_other_files_and_of_passages_are_not_trained_on_either(model: Path, tmp_path: Path) -> None:
    """They were, and what is held out seemed better than unseen text is. One text in many copies left
    nothing, and ended in a traceback."""
    texts = ["\n".join(f"line {i} of document {d}" for i in range(100)) for d in range(12)]
    places, source = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "one.jsonl"], SourceModel(model)
    for place, documents in zip(places, (texts, texts[::-1], texts[:1] * 30), strict=True):
        place.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    a, b, one = (local_source(str(place)) for place in places)
    size = source.config["vocab_size"]
    with load_tokenizer(model, source.config, size) as tokenizer:
        rows = tuning_rows([a, b], tokenizer, 400 * LENGTH, LENGTH, size)
        parts = [ids.tolist() for ids in (rows.ids, rows.held_ids)]
        decoded = ["".join(text_of(tokenizer.process.decode(row)) for row in part) for part in parts]
        trained, held = (set(re.findall(r"line \d+ of document \d+\n", text)) for text in decoded)
        assert len(trained) > 300
        assert len(held) > 20
        assert not trained & held
        copies = tuning_rows([one, a], tokenizer, 400 * LENGTH, LENGTH, size)
        assert len(copies.ids) > 100
        few = r"tokens, and \d+ in copies of its documents; at least 20 rows of 512"
        with pytest.raises(CalibrationError, match=few):
            check_text([one], tokenizer, 512, size, None, "-c")
        with pytest.raises(CalibrationError, match=few):
            tuning_rows([one], tokenizer, 4000, 512, size)


def test_many_kinds_with_hardly_any_text(model: Path, tmp_path: Path) -> None:
    """All of it was held out, and the tuning ended in a traceback, after the conversion with --tune."""
    sources, source = numbered(tmp_path, **{f"k{i}": 9 for i in range(12)}), SourceModel(model)
    nothing = "of 12 kinds of text none has a row of 64 tokens left beside what is held out"
    size = source.config["vocab_size"]
    with load_tokenizer(model, source.config, size) as tokenizer:
        with pytest.raises(CalibrationError, match=nothing):
            check_text(sources, tokenizer, LENGTH, size, None, "--tune-text")
        with pytest.raises(CalibrationError, match=nothing):
            tuning_rows(sources, tokenizer, 4000, LENGTH, size)


def test_a_kind_with_little_text_comes_several_times(model: Path, tmp_path: Path) -> None:
    sources, source = numbered(tmp_path, small=100, large=4000), SourceModel(model)
    with load_tokenizer(model, source.config, source.config["vocab_size"]) as tokenizer:
        rows = tuning_rows(sources, tokenizer, 512 * LENGTH, LENGTH, source.config["vocab_size"])
        few = tuning_rows(sources, tokenizer, 20 * LENGTH, LENGTH, source.config["vocab_size"])
        decoded = [text_of(tokenizer.process.decode(row)) for row in rows.ids.tolist()]
    assert rows.ids.shape == (512, LENGTH)
    assert len({tuple(row) for row in rows.ids.tolist()}) > 500, "cut elsewhere each time"
    whole = {name: re.findall(rf"{name} line \d+ of", "|".join(decoded)) for name in ("small", "large")}
    lines = {name: Counter(found) for name, found in whole.items()}
    assert set(lines["small"].values()) <= set(range(1, PASSES + 1)), "what a cut goes through is in none whole"
    assert sum(lines["small"].values()) > 2 * len(lines["small"])
    assert set(lines["large"].values()) == {1}
    assert len({tuple(row) for row in few.ids.tolist()}) == len(few.ids), "nor what there is enough of"
    assert not any("were asked for" in note for note in rows.notes)


def test_what_the_source_wrote_comes_once_where_there_is_other_text(model: Path, tmp_path: Path) -> None:
    sources, source = numbered(tmp_path, large=4000, few=100), SourceModel(model)
    with load_tokenizer(model, source.config, source.config["vocab_size"]) as tokenizer:
        large, few = kinds_of_files(sources, tokenizer, 10**6)
        written = [replace(few, name="self: chat")]
        rows = tuning_rows(sources[:1], tokenizer, 512 * LENGTH, LENGTH, source.config["vocab_size"], written=written)
        alone = tuning_rows(sources[1:], tokenizer, 150 * LENGTH, LENGTH, source.config["vocab_size"], written=written)
        decoded = [text_of(tokenizer.process.decode(row)) for row in rows.ids.tolist()]
    assert len(decoded) == 512
    assert set(Counter(text for text in decoded if "few" in text).values()) == {1}
    assert sum("large" in text for text in decoded) > 400, "more than its half"
    assert len(alone.ids) == 150, "and again where there is not enough"
    assert large.tokens > 512 * LENGTH


def test_files_and_the_builtin_text_share_evenly(model: Path, tmp_path: Path) -> None:
    """However many kinds one of them has."""
    sources, source = [*numbered(tmp_path, large=9000), text_source("builtin")], SourceModel(model)
    with load_tokenizer(model, source.config, source.config["vocab_size"]) as tokenizer:
        rows = tuning_rows(sources, tokenizer, 1024 * LENGTH, LENGTH, source.config["vocab_size"])
        decoded = [text_of(tokenizer.process.decode(row)) for row in rows.ids.tolist()]
    assert sum(text.count("large") >= 2 for text in decoded) == len(decoded) // 2 == 512


def test_the_builtin_text_by_kind(model: Path) -> None:
    source = SourceModel(model)
    with load_tokenizer(model, source.config, source.config["vocab_size"]) as tokenizer:
        kinds = builtin_kinds(tokenizer, 0)
        rows = tuning_rows((), tokenizer, 4000, 256, source.config["vocab_size"])
    assert [k.name for k in kinds] == BUILT_IN
    assert set(rows.held_kinds) == {k.name for k in kinds}, "each has its own held-out rows, and need not be watched"
    assert len(rows.ids) >= 16


@pytest.mark.parametrize(
    ("weights", "given", "rows", "tokens", "rate"),
    [
        (135_000_000, {}, 1000, 4096, 2e-3 / 2**0.5),
        (7_000_000_000, {}, 1000, 8192, 2e-3),
        (7_000_000_000, {}, 4, 2048, 1e-3),  # there is no more text
        (7_000_000_000, {"step_tokens": 2048}, 1000, 2048, 1e-3),
        (1_000_000, {"step_tokens": 65536}, 1000, 65536, 2e-3),
        (1_000_000, {"step_tokens": 10**400}, 80, 40960, 2e-3),
        (1_000_000, {"length": 16384, "rate": 0.01}, 1000, 16384, 0.01),
    ],
)
def test_steps_and_rates_follow_from_model_and_text(
    weights: int, given: dict[str, Any], rows: int, tokens: int, rate: float
) -> None:
    settings = Settings("directory", "reference", "output", **given).for_model(weights, 4.0).for_rows(rows, 4.0, weights)
    assert settings.rows_of_a_step(rows) * settings.row_length == tokens
    assert settings.rate == pytest.approx(rate)
    assert settings.gain_rate == pytest.approx(2e-3 * min(1, tokens / 8192) ** 0.5)
    assert settings.for_model(10**12, 2.0).for_rows(10**6, 8.0, 10**12) == settings, "what is decided stays"


@pytest.mark.parametrize(
    ("bits", "weights", "length", "rate"),
    [
        (2.2, 135_000_000, 256, 2e-3),
        (3.25, 135_000_000, 256, 2e-3),
        (3.26, 135_000_000, 512, 2e-3 / 2**0.5),
        (2.5, 7_000_000_000, 256, 2e-3),  # no higher than what was tried
    ],
)
def test_few_bits_have_shorter_rows_and_a_higher_rate(bits: float, weights: int, length: int, rate: float) -> None:
    settings = Settings("directory", "reference", "output")
    found = settings.for_model(weights, bits).for_rows(1000, bits, weights)
    assert found.length == length
    assert found.rate == pytest.approx(rate)
    assert found.gain_rate == pytest.approx(2e-3 * min(1, (found.step_tokens or 0) / 8192) ** 0.5), "that of norms stays"
    assert replace(settings, length=48).for_model(weights, bits).length == 48


@pytest.mark.parametrize(
    ("weights", "given", "steps"),
    [
        (135_000_000, {}, 2 * 976),
        (999_999_999, {"step_tokens": 8192}, 976),
        (10**9, {}, 488),  # a quarter of an hour for a 7B
        (7_000_000_000, {"passes": 3}, 3 * 488),
        (135_000_000, {"passes": 1}, 976),
    ],
)
def test_small_models_go_over_the_text_twice(weights: int, given: dict[str, Any], steps: int) -> None:
    rows = 4_000_000 // 512 + 1
    asked = Settings("directory", "reference", "output", tokens=4_000_000, **given).for_model(weights, 4.0)
    settings = asked.for_rows(rows, 4.0, weights)
    assert settings.steps(rows) == pytest.approx(steps, abs=2)
    assert settings.for_rows(rows, 4.0, 10**12) == settings, "what is decided stays"
    assert asked.for_rows(rows // 2, 4.0, weights).passes == given.get("passes", 1), "it is gone through again as it is"
    seen = torch.cat(list(Batches(rows, settings.rows_of_a_step(rows), settings.steps(rows), 0))).bincount(minlength=rows)
    assert set(seen.tolist()) <= {settings.passes, (settings.passes or 0) - 1}, "what is less than a step is left out"


@pytest.mark.parametrize(("bits", "less"), [(2.0, 1), (4.0, 1), (5.0, 2), (6.35, 5.1), (8.0, 16)])
def test_norms_move_less_where_errors_are_small(bits: float, less: float) -> None:
    settings = Settings("directory", "reference", "output", step_tokens=8192).for_rows(1000, bits, 10**9)
    assert settings.rate == pytest.approx(2e-3)
    assert settings.gain_rate == pytest.approx(2e-3 / less, rel=0.01)
    assert replace(settings, gain_rate=0.1).for_rows(1000, bits, 10**9).gain_rate == 0.1, "what was asked for"


@pytest.mark.parametrize(("rows", "size", "steps"), [(7, 3, 40), (5, 5, 9), (1, 1, 4), (10, 4, 2), (64, 7, 33)])
def test_the_order_of_rows_is_that_of_all_passes_at_once(rows: int, size: int, steps: int) -> None:
    """What is trained goes on with the same rows, whoever made its checkpoint."""
    generator = torch.Generator().manual_seed(3)
    passes = -(-steps * size // rows)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(passes)])
    expected = [order[i * size : (i + 1) * size].tolist() for i in range(steps)]
    found = Batches(rows, size, steps, 3)
    assert [t.tolist() for t in found] == expected
    assert [found[i].tolist() for i in reversed(range(steps))] == expected[::-1]
    assert Batches(rows, size, steps, 3)[steps - 1].tolist() == expected[-1], "in the middle of a tuning that goes on"
    with pytest.raises(IndexError):
        found[steps]


def test_the_order_of_many_steps_is_made_as_it_is_come_to() -> None:
    found = Batches(1000, 8, 10**12, 0)
    assert len({int(i) for step in range(125) for i in found[step]}) == 1000
