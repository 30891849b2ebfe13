"""Whole evaluations of small models: fp16, EXL2, BOS, windows, and what must be refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation import evaluate
from safetensors.torch import load_file, save_file

from exl2ray.errors import CalibrationError, FormatError, NumericError, SourceError, UsageError
from exl2ray.evaluate import forward
from exl2ray.evaluate.compare import evaluate_many
from exl2ray.evaluate.forward import RunOptions, logit_batches, open_model, run_model
from exl2ray.evaluate.metrics import score
from exl2ray.formats.exl2 import PackedLinear

Twins = tuple[Path, Path]


@pytest.fixture
def edited(tmp_path: Path, twins: Twins) -> Any:
    """A copy of a directory with one tensor or some config keys changed."""

    def edit(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
        copy = shutil.copytree(directory, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        weights = {**load_file(copy / "model.safetensors"), **(tensors or {})}
        save_file(weights, copy / "model.safetensors")
        settings = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**settings, **config}))
        return copy

    return edit


def test_an_exl2_model_equals_its_dequantised_twin(twins: Twins, ids: torch.Tensor) -> None:
    fp16, exl2 = twins
    result = evaluate(exl2, fp16, ids, "cpu")
    assert result.kl is not None
    assert result.top1 is not None
    assert result.kl.value == 0
    assert result.top1.value == 1
    assert result.nll == result.reference_nll
    assert result.predictions == 5 * 23
    logits = run_model(exl2, ids, "cpu").logits(slice(None), slice(None))
    assert logits.shape == (5, 24, 260)  # stored as 288 columns, of which the padding would count as words


def test_a_reference_that_is_quantised_itself_is_told(twins: Twins, other: Path, ids: torch.Tensor) -> None:
    """Its KL divergence is with the errors of another conversion, and looked like that from the source."""
    fp16, exl2 = twins
    told = f"--reference {exl2} is an EXL2 model itself"
    assert told in "\n".join(evaluate(other, exl2, ids, "cpu").warnings)
    assert "EXL2 model itself" not in "\n".join(evaluate(exl2, fp16, ids, "cpu").warnings)


def test_the_figures_are_those_of_the_logits(twins: Twins, other: Path, ids: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    result = evaluate(other, twins[0], ids, "cpu", keep_positions=True)
    with torch.inference_mode():
        q, p = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(ids).logits[:, :-1].double().log_softmax(-1)
            for d in (other, twins[0])
        )
    nll = -q.gather(-1, ids[:, 1:, None])[..., 0]
    kl = (p.exp() * (p - q)).sum(-1)
    assert result.nll.value == pytest.approx(float(nll.mean()), rel=1e-5)
    assert result.perplexity.value == pytest.approx(float(nll.mean().exp()), rel=1e-4)
    assert result.kl is not None
    assert result.kl.value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result.top1 is not None
    assert result.top1.value == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))
    assert result.nll_increase is not None
    assert result.reference_nll is not None
    assert result.nll_increase.value == pytest.approx(result.nll.value - result.reference_nll.value)
    assert result.positions is not None
    assert result.positions.kl is not None
    assert float((result.positions.kl - kl).abs().max()) < 1e-4
    assert json.loads(json.dumps(result.to_json()))["kl"]["value"] == result.kl.value


@pytest.mark.parametrize(("batch_tokens", "logits_at_once"), [(1, 1), (24, 260 * 5), (70, 260 * 23 * 2), (10**6, 10**8)])
def test_batch_sizes_change_nothing(
    twins: Twins, other: Path, ids: torch.Tensor, batch_tokens: int, logits_at_once: int
) -> None:
    outputs = [run_model(d, ids, "cpu", RunOptions(batch_tokens=batch_tokens)) for d in (other, twins[0])]
    seen = torch.zeros(5, 23, dtype=torch.int64)
    for batch in logit_batches(*outputs, logits_at_once):
        seen[batch.rows, batch.positions] += 1
        assert batch.logits.numel() <= max(logits_at_once, 260)
        assert batch.reference is not None
        assert batch.reference.shape == batch.logits.shape
    assert torch.equal(seen, torch.ones_like(seen))
    scores = score(*outputs, ids, logits_at_once)
    whole = score(*(run_model(d, ids, "cpu") for d in (other, twins[0])), ids)
    assert scores.kl is not None
    assert whole.kl is not None
    torch.testing.assert_close(scores.nll, whole.nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.kl, whole.kl, rtol=1e-3, atol=1e-5)


def test_one_module_is_in_memory_at_a_time(twins: Twins, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(block() is not None for block in alive))
        block = load_block(*args, **kwargs)
        alive.append(weakref.ref(block))
        return block

    load_block = forward.load_block
    monkeypatch.setattr(forward, "load_block", counting)
    output = run_model(twins[1], ids, "cpu")
    assert len(alive) == len(output.model.spec.modules) == 7
    assert most == 0
    assert alive[-1]() is output.head


def test_many_models_share_the_reference(twins: Twins, other: Path, ids: torch.Tensor) -> None:
    fp16, exl2 = twins
    done: list[tuple[Path, int, int]] = []
    results = evaluate_many([exl2, other], fp16, ids, "cpu", progress=lambda *args: done.append(args))
    assert [d[0] for d in done] == [fp16] * 7 + [exl2] * 7 + [other] * 7
    assert [d[1:] for d in done[:7]] == [(i + 1, 7) for i in range(7)]
    alone = evaluate(other, fp16, ids, "cpu")
    assert [r.model for r in results] == [exl2, other]
    assert (results[1].kl, results[1].nll, results[1].size) == (alone.kl, alone.nll, alone.size)
    assert results[0].reference_seconds == results[1].reference_seconds
    without = evaluate(other, None, ids, "cpu")
    assert without.nll == alone.nll
    assert (without.kl, without.reference, without.reference_perplexity) == (None, None, None)


def stored_bits(linear: PackedLinear) -> int:
    return 8 * sum(t.nbytes for t in linear.tensors().values())


def test_sizes(twins: Twins, ids: torch.Tensor) -> None:
    fp16, exl2 = (evaluate(d, None, ids, "cpu").size for d in twins)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert fp16.linears_bpw == fp16.head_bpw == 16
    assert fp16.parameters == exl2.parameters == weights + 2 * 64 * 260 + 5 * 64
    assert fp16.file_bytes == (twins[0] / "model.safetensors").stat().st_size
    assert exl2.file_bpw == 8 * (twins[1] / "model.safetensors").stat().st_size / exl2.parameters
    source = open_model(twins[1]).source
    packed = [source.linear(key) for key in source.keys() if "lm_head" not in key]  # type: ignore[attr-defined]
    assert exl2.linears_bpw == sum(stored_bits(p) for p in packed) / weights
    head = source.linear("lm_head")  # type: ignore[attr-defined]
    assert exl2.head_bpw == stored_bits(head) / (64 * 288)


def test_a_tied_head_counts_once(edited: Any, twins: Twins, ids: torch.Tensor) -> None:
    tied = edited(twins[0], tie_word_embeddings=True)
    weights = load_file(tied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors")
    result = evaluate(tied, twins[0], ids, "cpu")
    assert result.size.parameters == evaluate(twins[0], None, ids, "cpu").size.parameters - 64 * 260
    assert result.kl is not None
    assert result.kl.value > 0.01


def test_windows_give_later_tokens_their_context(twins: Twins) -> None:
    text = torch.randint(0, 260, (40,), generator=torch.Generator().manual_seed(2))
    windows = text.unfold(0, 16, 4)
    result = evaluate(twins[0], None, windows, "cpu", stride=4, keep_positions=True)
    assert result.predictions == 39
    scores = result.positions
    assert scores is not None
    expected = [float(v) for v in scores.nll[0]] + [float(v) for row in scores.nll[1:] for v in row[-4:]]
    assert result.nll.value == pytest.approx(sum(expected) / 39)
    whole = evaluate(twins[0], None, windows[:1], "cpu")
    assert whole.nll.value == pytest.approx(sum(expected[:15]) / 15)
    assert whole.nll.standard_error is None
    with pytest.raises(CalibrationError, match="not windows that start 5 tokens apart"):
        evaluate(twins[0], None, windows, "cpu", stride=5)
    with pytest.raises(UsageError, match="--stride 17"):
        evaluate(twins[0], None, windows, "cpu", stride=17)


def gemma(directory: Path) -> Path:
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32, "vocab_size": 90}
    config = GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, bos_token_id=7, initializer_range=0.3)
    GemmaForCausalLM(config).half().save_pretrained(directory)
    return directory


def test_bos_is_context_where_the_family_needs_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = gemma(tmp_path / "gemma")
    ids = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    result = evaluate(model, None, ids, "cpu", keep_positions=True)
    with torch.inference_mode():
        with_bos = torch.cat([torch.full((3, 1), 7), ids], dim=1)
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(with_bos).logits[:, 1:-1]
    nll = -logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert result.bos
    assert result.predictions == 33
    assert result.positions is not None
    assert float((result.positions.nll - nll).abs().max()) < 1e-3


def test_a_missing_bos_is_refused_where_the_family_needs_it(tmp_path: Path) -> None:
    model = gemma(tmp_path / "gemma")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": None}))
    with pytest.raises(SourceError, match="tokenizer not found"):
        open_model(model)
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": 90}))
    with pytest.raises(SourceError, match="bos_token_id is 90"):
        open_model(model)


def test_vocabularies_must_be_of_one_size(edited: Any, twins: Twins, ids: torch.Tensor) -> None:
    weights = load_file(twins[0] / "model.safetensors")
    smaller = {n: weights[n][:200].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}
    cut = edited(twins[0], smaller, vocab_size=200)
    with pytest.raises(SourceError, match=r"has 260 words, --reference .* 200"):
        evaluate(twins[1], cut, ids, "cpu")
    with pytest.raises(CalibrationError, match=r"outside the 200 words .* in row \d at position \d"):
        evaluate(cut, None, torch.full((2, 5), 200), "cpu")


def test_broken_weights_stop_the_run(edited: Any, twins: Twins, ids: torch.Tensor) -> None:
    key = "model.layers.1.mlp.down_proj.q_scale_max"
    huge = edited(twins[1], {key: torch.full((2,), 65504.0, dtype=torch.float16)})
    with pytest.raises(NumericError, match=r"layers.1.mlp, rows 0 to 4"):
        evaluate(huge, None, ids, "cpu")
    head = edited(twins[1], {"lm_head.q_scale_max": torch.full((2,), 65504.0, dtype=torch.float16)})
    with pytest.raises(NumericError, match=r"logits"):
        evaluate(head, None, ids, "cpu")
    scales = torch.full((2,), float("nan"), dtype=torch.float16)
    with pytest.raises(FormatError, match="q_scale_max"):
        evaluate(edited(twins[1], {key: scales}), None, ids, "cpu")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"shape \(5,\)"),
        (torch.zeros(0, 5, dtype=torch.int64), r"shape \(0, 5\)"),
        (torch.zeros(5, 1, dtype=torch.int64), r"shape \(5, 1\)"),
        (torch.zeros(5, 5), "float32"),
        (torch.full((5, 5), -1), "the first is -1 in row 0 at position 0"),
    ],
)
def test_unusable_tokens(twins: Twins, tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        evaluate(twins[0], None, tokens, "cpu")


def test_directories_and_devices_must_exist(twins: Twins, ids: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        evaluate(tmp_path / "nothing", None, ids, "cpu")
    with pytest.raises(UsageError, match="--device nonsense"):
        evaluate(twins[0], None, ids, "nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda"):
            evaluate(twins[0], None, ids, "cuda")
    with pytest.raises(UsageError, match="--model"):
        evaluate_many([], twins[0], ids, "cpu")


def test_long_rows_and_useless_models_are_warned_about(twins: Twins) -> None:
    result = evaluate(twins[0], None, torch.arange(257)[None] * 89 % 260, "cpu")
    assert len(result.warnings) == 2
    assert "rows of 257 tokens" in result.warnings[0]
    assert "for 256" in result.warnings[0]
    assert "guessing among 260 words" in result.warnings[1]


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(twins: Twins, other: Path, ids: torch.Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    exl2, fp16 = twins[1], other
    cpu, gpu = (evaluate(exl2, fp16, ids, device) for device in ("cpu", "cuda"))
    assert cpu.kl is not None
    assert gpu.kl is not None
    assert gpu.nll.value == pytest.approx(cpu.nll.value, rel=1e-3)
    assert gpu.kl.value == pytest.approx(cpu.kl.value, rel=2e-2)
