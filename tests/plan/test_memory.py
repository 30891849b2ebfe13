"""Peaks of the passes: what must fit fits, what is put into main memory counts there."""

from __future__ import annotations

from pathlib import Path

import pytest
from header_models import LLAMA, MIXTRAL_8X7B, write_header_model

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.worker_memory import GPU_BASE_BYTES, Peak, RowSizes, peaks, state_bytes

GIB = 1 << 30
ROWS = RowSizes((19, 2048), (115, 2048), 19)
LLAMA_7B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000}  # fmt: skip


def peaks_of(directory: Path, gpu: int | None, corrected: bool = False) -> dict[str, Peak]:
    source = SourceModel(directory)
    return {p.stage: p for p in peaks(load_spec(source), source, ROWS, gpu, 0.12, corrected)}


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_header_model(tmp_path_factory.mktemp("headers") / "7b", LLAMA_7B, 1)


def spec_of(directory: Path) -> ModelSpec:
    return load_spec(SourceModel(directory))


def test_a_7b_model_on_8_gb(llama_7b: Path) -> None:
    """docs/log.md: limited to 7.98 GiB it converted with 8.0 GB reserved and 11.8 GB of main memory."""
    found = peaks_of(llama_7b, int(7.98 * GIB))
    for p in found.values():
        assert p.gpu_bytes is not None
        assert p.gpu_bytes <= 7.98 * GIB
    assert 9e9 < max(p.ram_bytes for p in found.values()) < 15e9
    assert "candidate weights in main memory" in found["measure"].notes
    assert "hidden states in main memory" in found["quantize"].notes


def test_corrected_targets_take_no_more_states_than_16_gb_hold(llama_7b: Path) -> None:
    """The source model's states go along; those before a module go as those after it come, two sets and not four."""
    plain, corrected = (peaks_of(llama_7b, int(7.98 * GIB), c)["quantize"].ram_bytes for c in (False, True))
    assert plain <= corrected < 13e9
    assert corrected - GPU_BASE_BYTES < 4 * state_bytes(spec_of(llama_7b), ROWS.quantize)


def test_what_leaves_the_gpu_counts_in_main_memory(llama_7b: Path) -> None:
    large, small = peaks_of(llama_7b, 141 * GIB), peaks_of(llama_7b, 8 * GIB)
    assert large["measure"].notes == large["quantize"].notes == ()
    states = state_bytes(spec_of(llama_7b), ROWS.quantize)
    assert states == 115 * 2048 * 4096 * 2
    assert small["quantize"].ram_bytes - large["quantize"].ram_bytes >= 3 * states
    mlp = 2 * (13 + 13 + 14) * 4096 * 11008
    assert small["measure"].ram_bytes - large["measure"].ram_bytes >= mlp
    assert large["measure"].ram_bytes < GPU_BASE_BYTES + GIB


def test_cpus_keep_everything_in_main_memory(llama_7b: Path) -> None:
    for p in peaks_of(llama_7b, None).values():
        assert p.gpu_bytes is None
        assert p.ram_bytes > state_bytes(spec_of(llama_7b), ROWS.quantize)


def test_experts_need_more_than_a_dense_layer(llama_7b: Path, tmp_path: Path) -> None:
    experts = peaks_of(write_header_model(tmp_path / "moe", {**MIXTRAL_8X7B, "num_hidden_layers": 2}, 1), 80 * GIB)
    dense = peaks_of(llama_7b, 80 * GIB)
    assert (experts["measure"].gpu_bytes or 0) > (dense["measure"].gpu_bytes or 0)
    assert experts["measure"].module == "model.layers.0.block_sparse_moe"


def test_the_worst_module_is_named(llama_7b: Path) -> None:
    found = peaks_of(llama_7b, 24 * GIB)
    assert found["measure"].module == "model.layers.0.mlp"
    assert found["head"].module == "lm_head.linear"


def test_states_for_the_way_back_count_where_they_are(tmp_path: Path) -> None:
    """docs/log.md: a 7B in 8 GB kept 8.7 GB of them in main memory, 10.4 GB in all with what the process is itself."""
    source = SourceModel(write_header_model(tmp_path / "7b", {**LLAMA_7B, "num_hidden_layers": 32}, 1))
    spec = load_spec(source)
    states = 16 * 512 * 4096 * 4 * 66  # before 64 halves, the norm and the head

    def peak(gpu: int | None) -> Peak:
        return next(p for p in peaks(spec, source, ROWS, gpu, 0.12, True, gradients=True) if p.stage == "sensitivity")

    small, large, cpu = peak(int(7.98 * GIB)), peak(141 * GIB), peak(None)
    assert (small.notes, large.notes) == (("hidden states in main memory",), ())
    assert small.ram_bytes - large.ram_bytes == states
    assert states + 1e9 < small.ram_bytes < 16e9
    assert small.gpu_bytes is not None
    assert small.gpu_bytes < 4e9
    assert large.gpu_bytes is not None
    assert large.gpu_bytes > states
    assert states < cpu.ram_bytes < 12e9
    assert "sensitivity" not in {p.stage for p in peaks(spec, source, ROWS, None, 0.12, True)}
