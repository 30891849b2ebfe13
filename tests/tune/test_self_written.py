"""Text that the source writes itself: batches say what single rows would, turns take their turn, pieces are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rounded_models import write_rounded
from tiny_models import write_model
from tokenizers import Tokenizer

from exl2ray.calibration.data.sources import local_source
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.datasets import text_source
from exl2ray.errors import CalibrationError, StoreError, UsageError
from exl2ray.evaluate.forward import open_model
from exl2ray.evaluate.generate import Draft, Generator
from exl2ray.events import Silent
from exl2ray.formats.target import Owner, locked
from exl2ray.store.open import open_store
from exl2ray.tune import run
from exl2ray.tune.documents import Kind
from exl2ray.tune.rows import naming
from exl2ray.tune.run import Settings, tune
from exl2ray.tune.written import check_weights, self_written

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template, whose marks are tokens of their own."""
    root = write_model(tmp_path_factory.mktemp("writer") / "source")
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(root / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


def test_cold_rows_are_greedy_whatever_their_neighbours(model: Path) -> None:
    generator = Generator(open_model(model), CPU)
    prompts = [[5, 9, 200], [7], [40, 41, 42, 43, 44, 45, 46]]
    found = generator.sampled([Draft(p, 1e-4) for p in prompts], 24, frozenset(), 0)
    for prompt, ids in zip(prompts, found, strict=True):
        greedy = generator.greedy(prompt)
        assert ids == prompt + [next(greedy) for _ in range(24 - len(prompt))]
    warm = [Draft([5], 1.0)] * 2
    first, second = generator.sampled(warm, 40, frozenset(), 1)
    assert first != second, "rows of one beginning are drawn apart"
    assert generator.sampled(warm, 40, frozenset(), 1) == [first, second]
    assert generator.sampled(warm, 40, frozenset(), 2) != [first, second]


def test_a_row_ends_or_goes_on_with_the_next_turn(model: Path) -> None:
    generator = Generator(open_model(model), CPU)
    stops = frozenset(range(3, 259, 4))  # so many tokens that turns are short
    alone, talking = generator.sampled([Draft([300 - 50], 2.0), Draft([300 - 50], 2.0, ((11, 12), (13,)))], 60, stops, 0)
    assert len(talking) == 60
    assert alone[-1] in stops or len(alone) == 60
    assert not stops & set(alone[1:-1])
    ends, position = [], 1
    while position < 60:  # what follows a stop is a turn's beginning, the two in turn
        if talking[position] in stops:
            wanted = (11, 12) if len(ends) % 2 == 0 else (13,)
            assert tuple(talking[position + 1 : position + 1 + len(wanted)]) == wanted[: 59 - position]
            ends.append(position)
            position += len(wanted)
        position += 1
    assert len(ends) > 2


def test_pieces_are_kept_and_the_text_is_the_same_again(model: Path, tmp_path: Path) -> None:
    opened = open_model(model)

    def write(root: Path, tokens: int, seed: int = 0) -> list[Kind]:
        with load_tokenizer(model, opened.source.config, opened.vocab_size) as tokenizer:
            return self_written(opened, tokenizer, tokens, 24, seed, CPU, open_store(str(root)), "written", Silent())

    def flat(kinds: list[Kind]) -> dict[str, list[int]]:
        return {k.name: np.concatenate(k.documents).tolist() for k in kinds}

    whole = write(tmp_path / "a", 8000)
    assert [k.name for k in whole] == ["self: chat", "self: continued", "self: token"]
    assert 8000 <= sum(k.tokens for k in whole) < 15_000
    chat, continued, token = (max(k.documents, key=len) for k in whole)
    assert len(chat) <= 24 >= len(continued)
    assert chat[0] == 1, "a chat begins with the template's mark"
    pieces = sorted((tmp_path / "a" / "written" / "tensors").iterdir())
    assert len(pieces) >= 2
    before = pieces[0].stat().st_mtime_ns
    pieces[-1].write_bytes(b"torn")  # what a kill may leave, or worse
    assert flat(write(tmp_path / "a", 8000)) == flat(whole)
    assert pieces[0].stat().st_mtime_ns == before, "what is there is not written again"
    other = write(tmp_path / "b", 1000, seed=1)
    assert not any(np.array_equal(a.documents[0], b.documents[0]) for a, b in zip(whole, other, strict=True))
    assert len(token) > 1


def test_a_model_is_tuned_on_a_mixture(model: Path, tmp_path: Path) -> None:
    exl2 = write_rounded(model, tmp_path / "exl2")
    shutil.copy(model / "tokenizer_config.json", exl2)
    sources = (text_source("self:6k", local_source), text_source("builtin", local_source))
    settings = Settings(str(exl2), str(model), str(tmp_path / "out"), sources, tokens=3000, length=48, step_tokens=480)
    found = tune(settings, CPU, Silent())
    assert {"self: chat", "self: continued", "code", "multilingual"} <= set(found.before)
    assert [p.name for p in (tmp_path / "out" / ".exl2ray-tune").iterdir()] == ["written"]
    events = Silent()
    assert tune(settings, CPU, events).after == found.after
    assert [f["message"] for n, f in events.events if n == "note"][-1].endswith("has the tuned model already")
    opened = open_model(model)
    check_weights(opened, 1 << 30)
    with pytest.raises(UsageError, match=r"all of its weights on one GPU: 193 kB, of 100 kB"):
        check_weights(opened, 100_000)


@pytest.mark.parametrize("wrong", ["self:some", "self:-1", "self:0", "self:", "self:11G"])
def test_a_count_that_is_none_is_told_with_its_flag(wrong: str) -> None:
    with pytest.raises(UsageError, match=f"^--tune-text {wrong}: ") as caught, naming("--tune-text"):
        text_source(wrong, local_source)
    assert caught.value.hint.startswith("self:COUNT, ")


@pytest.fixture
def unwritten(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of a tuning whose source must not begin to write."""

    def written(*_: Any) -> list[Kind]:
        raise AssertionError("text was written before what is cheap was checked")

    monkeypatch.setattr(run, "self_written", written)
    exl2 = write_rounded(model, tmp_path / "exl2")
    shutil.copy(model / "tokenizer_config.json", exl2)

    def get(*places: str, **changes: Any) -> Settings:
        sources = tuple(text_source(place, local_source) for place in places or ("self:6k",))
        small = {"tokens": 3000, "length": 48, "step_tokens": 480, **changes}
        return Settings(str(exl2), str(model), str(tmp_path / "out"), sources, **small)

    return get


def test_nothing_is_written_for_an_output_that_is_not_ours(unwritten: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"-o .*out: holds notes\.txt"):
        tune(unwritten(), CPU, Silent())


def test_nothing_is_written_for_an_output_where_another_one_writes(
    unwritten: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = unwritten()
    owner = Owner(open_model(settings.directory).source.fingerprint(), settings.directory, flag="-o")
    with locked(tmp_path / "out", owner), pytest.raises(StoreError, match="another conversion is writing there"):
        tune(settings, CPU, Silent())


def test_nothing_is_written_where_a_tuning_with_other_settings_is_finished(unwritten: Callable[..., Settings]) -> None:
    tune(unwritten("builtin"), CPU, Silent())
    for other in (unwritten(), unwritten(seed=1), unwritten("builtin", "self:1k")):
        with pytest.raises(StoreError, match="tuned with other settings"):
            tune(other, CPU, Silent())


def test_nothing_is_written_beside_text_that_is_too_little(unwritten: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(CalibrationError, match=r"bad\.jsonl"):
        tune(unwritten("self", str(tmp_path / "bad.jsonl")), CPU, Silent())
    assert not (tmp_path / "out").exists()


def test_no_more_is_written_than_is_tuned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(run, "self_written", lambda source, tokenizer, tokens, *_: (asked.append(tokens), [])[1])
    monkeypatch.setattr(run, "open_store", lambda root: None)
    for place in ("self:1000000000", "self", "self:2k"):
        settings = Settings(directory="", reference="", output="x", sources=(text_source(place, local_source),), tokens=8192)
        reporter = Silent()
        run._written(settings, 512, SimpleNamespace(source=None), None, CPU, reporter)  # type: ignore[arg-type]
        assert len(reporter.events) == (place == "self:1000000000")
    assert asked == [8192, 8192, 2000]
