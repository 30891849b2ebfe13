"""The bitrate for a card: cache sizes by hand, the largest that fits and not one step more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from header_models import LLAMA_8B, write_header_model

from exl2ray.allocation.knapsack import nearest_reachable, reachable_range
from exl2ray.allocation.planning import below_tables, reachable_slots
from exl2ray.errors import BudgetError, UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import find_arch, load_spec
from exl2ray.model.hyper import Hyper, resolve_hyper
from exl2ray.plan.fit import STEP, allowance_bytes, best_fit, cache_size, check_fit
from exl2ray.plan.sizes import Freedom, size_range
from exl2ray.quant.qparams import LOW_GROUPS, low_options
from exl2ray.units import parse_count, parse_size

GIB = 1 << 30
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208, "rms_norm_eps": 1e-6,
    "sliding_window": 1024, "sliding_window_pattern": 6, "max_position_embeddings": 131072, "rope_theta": 1e6,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
}  # fmt: skip


def hyper(config: dict[str, Any]) -> Hyper:
    return resolve_hyper(find_arch(config), config)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9), ("24 gib", 24 * GIB), ("23.5G", 23_500_000_000), ("800M", 800_000_000), ("1024", 1024),
        ("2Ti", 2 << 40),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--fit") == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "24 GX", "lots", "24GB!", "1e9", "9" * 400 + "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--fit .*not a size"):
        parse_size(text, "--fit")


def test_numbers_of_tokens() -> None:
    assert [parse_count(t, "--tokens") for t in ("1M", "512k", "4.5m", "10G", "7")] == [10**6, 512_000, 4_500_000, 10**10, 7]
    for text, says in (("0", "not a number"), ("x", "not a number"), ("11G", "at most 10G"), ("9" * 400, "not a number")):
        with pytest.raises(UsageError, match=f"--tokens .*{says}") as e:
            parse_count(text, "--tokens")
        assert len(e.value.message) < 100


@pytest.mark.parametrize(("cache", "bits"), [("fp16", 16), ("q8", 8.5), ("q6", 6.5), ("q4", 4.5)])
def test_cache_of_shared_heads(cache: str, bits: float) -> None:
    """Llama 3 8B: 32 layers with 8 key/value heads of 128, whatever the 32 query heads."""
    assert cache_size(hyper(LLAMA_8B), 32768, cache) == int(2 * 32 * 8 * 128 * 32768 * bits / 8)
    one_head = hyper({**LLAMA_8B, "num_key_value_heads": 1})
    assert cache_size(one_head, 32768, cache) == cache_size(hyper(LLAMA_8B), 4096, cache)


def test_cache_of_sliding_windows() -> None:
    """Every sixth of Gemma 3's layers sees everything; the others 1024 tokens."""
    h = hyper(GEMMA)
    assert sum(h.sliding) == 40
    full, windowed = (cache_size(h, 32768, "fp16", w) for w in (False, True))
    assert full == 2 * 48 * 8 * 256 * 32768 * 2
    assert windowed == 2 * 8 * 256 * 2 * (8 * 32768 + 40 * 1024)
    assert cache_size(h, 1000, "fp16", True) == cache_size(h, 1000, "fp16"), "a context shorter than the window"


@pytest.mark.parametrize(
    ("memory", "context", "cache"), [(8 * GIB, 8192, "fp16"), (7 * 10**9, 32768, "q4"), (9 * GIB, 32768, "q8")]
)
def test_the_largest_that_fits_and_no_step_more(llama_8b: Path, memory: int, context: int, cache: str) -> None:
    source = SourceModel(llama_8b)
    spec = load_spec(source)
    fit = best_fit(spec, source, memory, context, cache, Freedom(), 0)
    assert fit.bits is not None
    assert fit.cache_bytes == cache_size(spec.hyper, context, cache)
    embeddings = 128256 * 4096 * 2
    assert fit.host_bytes == embeddings

    def needed(bits: float) -> int:
        return size_range(spec, source, bits, Freedom(), 0).high_bytes - embeddings + fit.cache_bytes + allowance_bytes(spec)

    assert needed(fit.bits) <= memory < needed(fit.bits + STEP)
    assert fit.weight_bytes == size_range(spec, source, fit.bits, Freedom(), 0).high_bytes - embeddings
    check_fit(fit, 2.0)


def test_a_large_card_gets_the_ceiling_and_a_small_one_nothing(llama_70b: Path) -> None:
    source = SourceModel(llama_70b)
    spec = load_spec(source)
    assert best_fit(spec, source, 200 * GIB, 8192, "q4", Freedom(), 0).bits == 8.03, "the option tables end at 8.0342"
    small = best_fit(spec, source, 16 * GIB, 8192, "q4", Freedom(), 0)
    assert small.bits is None
    with pytest.raises(BudgetError, match=r"--fit 17\.18 GB: the smallest weights \(2\.0108 bits .*\) take 18\.04 GB"):
        check_fit(small, 2.0108)


def test_what_the_user_wants_of_single_linears_costs_bitrate(tmp_path: Path) -> None:
    from exl2ray.allocation.overrides import parse_overrides

    source = SourceModel(write_header_model(tmp_path / "m", {**LLAMA_8B, "num_hidden_layers": 4}, 1))
    spec = load_spec(source)
    wanted = parse_overrides(("*.down_proj=8",), spec)
    plain, held = (best_fit(spec, source, 3 * GIB, 8192, "fp16", Freedom(overrides=w), 0) for w in ((), wanted))
    assert plain.bits == held.bits, "the budget is the same"
    tight = 1_650_000_000
    plain, held = (best_fit(spec, source, tight, 2048, "fp16", Freedom(overrides=w), 0) for w in ((), wanted))
    assert plain.bits is not None
    assert held.bits is None, "with down_proj at 8 bits the smallest model is larger"


def test_floor_of_a_7b_shape(tmp_path: Path) -> None:
    config = {**LLAMA_8B, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
    spec = load_spec(SourceModel(write_header_model(tmp_path / "7b", config, 1)))
    low, high = reachable_range(reachable_slots(spec))
    overhead = 4 / LOW_GROUPS[-1] + 32 / 4096  # scales, and permutations
    assert 2.0 + overhead - 0.003 < low < 2.06
    assert below_tables(spec, 2.13)
    assert not below_tables(spec, 2.25)
    slots = reachable_slots(spec)
    assert [nearest_reachable(b, slots) for b in (2.0, 2.02, 8.0, 9.0)] == [2.014, 2.02, 8.0, 8.037]
    assert high < 8.04
    assert [q.desc for q in low_options()][-1] == "1:2b_512g s4"
