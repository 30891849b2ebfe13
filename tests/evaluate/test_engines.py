"""Other programs that answer in chat: transformers, and ExLlamaV2 by a stand-in with the interface of 0.3.2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from exl2ray.cli import cli
from exl2ray.commands import engines
from exl2ray.errors import FormatError, SourceError, UsageError
from exl2ray.evaluate.chat import Panel
from exl2ray.evaluate.forward import RunOptions, open_model
from exl2ray.evaluate.generate import Generator
from exl2ray.formats.summary import inspect_directory
from exl2ray.publish.card import model_card, of_directory

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
PROMPT = [5, 9, 200, 77, 30]


def test_transformers_says_the_same(twins: tuple[Path, Path]) -> None:
    for directory in twins:  # fp16, and its EXL2 twin with packed linears
        model = open_model(directory)
        found = islice(engines.engine("transformers", model, "cpu", RunOptions()).greedy(PROMPT), 20)
        assert list(found) == list(islice(Generator(model, "cpu").greedy(PROMPT), 20))


@pytest.mark.parametrize(
    ("found", "words"), [([1], "not an object"), ({"quant_method": "gptq"}, "says 'gptq'")]
)
def test_packed_weights_under_another_config_are_called_so(
    found: Any, words: str, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(twins[1], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config if found is None else {**config, "quantization_config": found}))
    with pytest.raises(FormatError, match=f"those of an EXL2 model.*{words}") as refused:
        open_model(tmp_path / "model")
    assert "config.json" in str(refused.value.hint)


def test_packed_weights_need_no_word_of_config(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """As the first versions of ExLlamaV2 wrote them, which does not read quantization_config."""
    old = Path(shutil.copytree(twins[1], tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    model = open_model(old)
    assert model.quantized
    assert "has no quantization_config" in model.notes[-1]
    assert list(islice(Generator(model, "cpu").greedy(PROMPT), 20)) == list(
        islice(Generator(open_model(twins[1]), "cpu").greedy(PROMPT), 20)
    )
    card = of_directory(inspect_directory(old))
    assert (card.bits, card.rows) == (card.achieved_bpw, 0)
    assert card.head_bits > 0
    assert "calibration" not in model_card(card)
    (old / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert open_model(old).quantized


class Job:
    """Arguments as ExLlamaV2's examples give them."""

    def __init__(self, *, input_ids: torch.Tensor, max_new_tokens: int, gen_settings: Any, stop_conditions: list[Any]):
        assert (input_ids.dim(), stop_conditions) == (2, [])
        assert (gen_settings.top_k, gen_settings.temperature, gen_settings.token_repetition_penalty) == (1, 1.0, 1.0)
        self.ids, self.most = input_ids[0].tolist(), max_new_tokens


class DynamicGenerator:
    """Yields what the own forward pass finds, some tokens at a time, as results of ``iterate``."""

    def __init__(self, *, model: Any, cache: Any, tokenizer: Any, max_batch_size: int, paged: bool) -> None:
        assert (model.loaded, tokenizer.config is model.config, max_batch_size, paged) == (True, True, 1, False)
        assert cache.max_seq_len % 256 == 0
        self.inner = Generator(open_model(model.config.model_dir), "cpu")
        self.jobs: list[Job] = []
        self.cleared = 0

    def enqueue(self, job: Job) -> None:
        self.jobs.append(job)
        self.tokens: Iterator[int] = islice(self.inner.greedy(job.ids), job.most)
        self.started = False

    def num_remaining_jobs(self) -> int:
        return len(self.jobs)

    def iterate(self) -> list[dict[str, Any]]:
        if not self.started:
            self.started = True
            return [{"stage": "started"}, {"stage": "prefill"}, {"stage": "streaming", "text": "", "eos": False}]
        tokens = list(islice(self.tokens, 2))
        if not tokens:
            self.jobs.clear()
            return [{"stage": "streaming", "eos": True}]
        return [{"stage": "streaming", "text": "?", "eos": False, "token_ids": torch.tensor([tokens])}]

    def clear_queue(self) -> None:
        self.jobs.clear()
        self.cleared += 1


@pytest.fixture
def exllamav2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as far as it is documented; a machine with a GPU too old for flash-attn."""

    class Config:
        def __init__(self, model_dir: str) -> None:
            self.model_dir, self.checked = model_dir, False

        def arch_compat_overrides(self) -> None:
            self.checked = True

    class Model:
        def __init__(self, config: Config) -> None:
            if "broken" in config.model_dir:
                raise ValueError(" ## Could not find lm_head.*\nin model")
            self.config, self.loaded = config, False

        def load_autosplit(self, cache: Any) -> None:
            assert cache.lazy
            self.loaded = True

    module, generator = ModuleType("exllamav2"), ModuleType("exllamav2.generator")
    module.generator = generator  # type: ignore[attr-defined]
    module.__dict__.update(
        ExLlamaV2Config=Config, ExLlamaV2=Model, ExLlamaV2Tokenizer=lambda config: SimpleNamespace(config=config),
        ExLlamaV2Cache=lambda model, max_seq_len, lazy: SimpleNamespace(max_seq_len=max_seq_len, lazy=lazy),
    )  # fmt: skip
    settings = type("Settings", (), {"temperature": 0.8, "top_k": 50, "top_p": 0.8, "token_repetition_penalty": 1.025})
    generator.__dict__.update(
        ExLlamaV2DynamicJob=Job, ExLlamaV2DynamicGenerator=DynamicGenerator,
        ExLlamaV2Sampler=SimpleNamespace(Settings=settings),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "exllamav2", module)
    monkeypatch.setitem(sys.modules, "exllamav2.generator", generator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    return module


def test_exllamav2_is_driven_as_documented(exllamav2: ModuleType) -> None:
    panel = Panel([str(DEMO)], "cpu")  # the own forward pass
    question = (("user", "The harbour"),)
    *_, (expected,) = panel.ask([question], 9)
    run = CliRunner().invoke(
        cli, ["chat", str(DEMO), str(DEMO), "--engine", "exllamav2", "--prompt", "The harbour", "--max-tokens", "9", "--json"]
    )
    assert run.exit_code == 0, run.output
    first, second = json.loads(run.stdout.splitlines()[-1])["answers"]
    assert first["text"] == second["text"] == expected.text
    assert first["tokens"] == 9
    model = open_model(DEMO)
    found = engines.engine("exllamav2", model, "auto", RunOptions())
    assert isinstance(found, engines.ExLlamaV2)
    for _ in range(2):  # one conversation after the other, left in the middle
        stream = found.greedy(PROMPT)
        assert list(islice(stream, 5)) == list(islice(Generator(model, "cpu").greedy(PROMPT), 5))
        stream.close()  # type: ignore[attr-defined]
        assert found._generator.num_remaining_jobs() == 0
    found._tokens = 8
    assert len(list(found.greedy(PROMPT))) == 3  # what the cache has left
    with pytest.raises(UsageError, match="the cache of --engine exllamav2 holds"):
        next(found.greedy([7] * 8))


def test_what_cannot_be_done_is_said(
    exllamav2: ModuleType, twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(DEMO)

    def refused(name: str, says: str, device: str = "auto", options: RunOptions | None = None) -> None:
        with pytest.raises(UsageError, match=says):
            engines.engine(name, model, device, options or RunOptions())

    refused("exllamav2", "runs on CUDA GPUs", device="cpu")
    refused("exllamav2", "takes RoPE from config.json", options=RunOptions(rope_alpha=2.0))
    (tmp_path / "broken").symlink_to(twins[0])
    with pytest.raises(SourceError, match="broken: ExLlamaV2 cannot load it:  ## Could not find"):
        engines.engine("exllamav2", open_model(tmp_path / "broken"), "auto", RunOptions())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("exllamav2", "runs on CUDA GPUs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "exllamav2", None)
    refused("exllamav2", "import of exllamav2 halted")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("transformers", "halted")
    run = CliRunner().invoke(cli, ["chat", str(DEMO), "--engine", "vllm", "--prompt", "x"])
    assert run.exit_code == 2
    assert "exllamav2" in run.output
