"""Planned bytes are the bytes of the files; without a measurement they lie between the bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from header_models import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_model

from exl2ray.allocation.overrides import overridden, parse_overrides
from exl2ray.allocation.planning import allocate, choose
from exl2ray.convert import convert
from exl2ray.events import Silent
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.measurement import Measurement, ModuleProfile, OptionProfile, read_measurement
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.sizes import Freedom, OutputSize, exact_size, freedom_of, size_range
from exl2ray.quant.qparams import head_option, option_tables
from exl2ray.recipe import Recipe

HEAD_BITS = 6


def planned(
    model: Path, measurement: Measurement, bits: float, limit_bytes: int, wanted: tuple[str, ...] = ()
) -> tuple[OutputSize, OutputSize]:
    """(exact, range)"""
    source = SourceModel(model)
    spec = load_spec(source)
    overrides = parse_overrides(wanted, spec)
    _, params = allocate(spec, measurement, bits, overrides=overrides)
    head = spec.modules[-1].linears[0]
    params[head.key] = overridden(overrides, head, head_option(HEAD_BITS))
    between = size_range(spec, source, bits, Freedom(overrides=overrides), limit_bytes)
    return exact_size(spec, source, bits, params, limit_bytes), between


def converted(model: Path, root: Path, text: Path, **changes: Any) -> Measurement:
    """Converts with a few rows into root/out-<bpw>."""
    recipe = Recipe(
        str(model), str(root / "work"), compile_full=str(root / "out-{bpw}"), cal_dataset=str(text), dataset_rows=3,
        measurement_rows=2, length=128, measurement_length=128, device="cpu", executor="inline",
        **{"quality": "reference", "evaluate": "never", **changes},
    )  # fmt: skip
    convert(recipe, Silent())
    return read_measurement(root / "work" / "measurement.json")


def files(directory: Path) -> tuple[int, ...]:
    return tuple(p.stat().st_size for p in sorted(directory.glob("*.safetensors")))


def test_a_model_takes_the_planned_bytes_in_every_shard(text: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocab_size=9000)  # the embedding fills a shard
    measurement = converted(model, tmp_path, text, bits=(4.0, 5.5), shard_size=1)
    for bits in (4.0, 5.5):
        exact, between = planned(model, measurement, bits, 1 << 20)
        assert len(exact.files) == 2
        assert exact.files == files(tmp_path / f"out-{bits}")
        assert between.low_bytes <= sum(exact.files) <= between.high_bytes


@pytest.mark.parametrize("family", ["Qwen2", "Mixtral", "Cohere", "Gemma2"])
def test_biases_experts_parallel_blocks_and_tied_heads(family: str, text: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family, **({"tie_word_embeddings": True} if family == "Gemma2" else {}))
    wanted = ("*.v_proj=8",)
    measurement = converted(model, tmp_path, text, bits=(5.0,), overrides=wanted)
    exact, between = planned(model, measurement, 5.0, 0, wanted)
    assert exact.files == files(tmp_path / "out-5.0")
    assert between.low_bytes <= sum(exact.files) <= between.high_bytes


def made_up(spec: ModelSpec, errors: list[float]) -> Measurement:
    """A measurement where more bits are always better; ``errors`` say by how much, in turn."""
    profiles, n = [], 0
    for module in spec.modules[1:]:
        key, mode = module.profile_key.rsplit(".", 1)
        if not module.quantized:
            profiles.append(ModuleProfile(key, mode))
            continue
        (table,) = option_tables({x.role for x in module.linears})
        options = []
        for row in table.rows:
            params = dict(zip(table.roles, row, strict=True))
            bits = sum(params[x.role].bits_of(x) for x in module.linears)
            options.append((bits, params))
        order = sorted({b for b, _ in options})
        scale, fall = errors[n % len(errors)], 0.3 + 0.6 * errors[(n + 1) % len(errors)]
        n += 1
        found = [OptionProfile(1 - 0.5 * scale * fall ** order.index(b), b, p) for b, p in options]
        profiles.append(ModuleProfile(key, mode, tuple(found)))
    return Measurement(tuple(profiles), len(spec.modules) - 1)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.floats(2.85, 8.6),
    errors=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
    limit=st.sampled_from([0, 300_000, 1 << 20]),
)
def test_bounds_hold_for_any_measurement(bits: float, errors: list[float], limit: int) -> None:
    spec = load_spec(SourceModel(DEMO))
    exact, between = planned(DEMO, made_up(spec, errors), bits, limit)
    assert between.packed_low_bytes <= exact.packed_low_bytes <= between.packed_high_bytes
    assert between.low_bytes <= exact.low_bytes <= between.high_bytes
    assert exact.achieved_bpw is not None
    assert exact.achieved_bpw <= bits


def test_bounds_are_tight_for_large_models(llama_70b: Path) -> None:
    source = SourceModel(llama_70b)
    found = size_range(load_spec(source), source, 4.0, Freedom(), 8192 << 20)
    assert 0 < found.high_bytes - found.low_bytes < 0.004 * found.high_bytes
    assert not found.exact


def test_linears_chosen_one_by_one(text: Path, tmp_path: Path) -> None:
    """--allocation linear: any option for any linear, and a head that competes for the same bytes."""
    model = write_model(tmp_path / "model", "Mixtral")
    measurement = converted(model, tmp_path, text, bits=(4.0,), allocation="linear")
    source = SourceModel(model)
    spec = load_spec(source)
    for head_bits in (None, 6):
        recipe = Recipe(str(model), "", allocation="linear", head_bits=head_bits)
        for bits in (4.0, 5.5, 7.9):
            exact = exact_size(spec, source, bits, choose(spec, measurement, bits, recipe).params, 0)
            between = size_range(spec, source, bits, freedom_of(recipe, ()), 0)
            assert between.low_bytes <= exact.low_bytes <= between.high_bytes, (head_bits, bits)
            assert (between.held_bpw is None) == (head_bits is None)
            assert between.held_bpw is None or between.held_bpw[0] <= (exact.head_bpw or 0) <= between.held_bpw[1]
            if bits == 4.0 and head_bits is None:
                assert exact.files == files(tmp_path / "out-4.0")
