"""What the vLLM plugin knows without vLLM: which linears make up a layer, and what it refuses before vLLM starts anything."""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path

import pytest
from exl2_models import write_exl2

import exl2ray.vllm
from exl2ray.errors import FormatError
from exl2ray.vllm.files import PackedFiles

LAYER = "model.layers.0.self_attn."


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exl2(tmp_path_factory.mktemp("qwen") / "model", "Qwen2")  # q, k and v have biases


def test_parts_of_layers(qwen: Path) -> None:
    files = PackedFiles.opened(qwen)
    merged = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert files.parts(f"{LAYER}qkv_proj", merged) == [f"{LAYER}{x}_proj" for x in "qkv"]
    assert files.parts("model.layers.1.mlp.gate_up_proj", {}) == [f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up")]
    assert files.parts("lm_head", merged) == ["lm_head"]
    assert files.parts("model.visual.qkv", merged) == []
    assert len(files.left()) == 2 * 7 + 1 - 6
    del files.names[f"{LAYER}k_proj"]
    with pytest.raises(FormatError, match=r"self_attn\.k_proj is not packed"):
        files.parts(f"{LAYER}qkv_proj", merged)


def test_other_names_in_vllm_and_what_its_stream_leaves_out(qwen: Path) -> None:
    files = pickle.loads(pickle.dumps(PackedFiles.opened(qwen)))
    files.rename([f"language_model.{name}" for name in files.names])
    assert files.parts(f"language_model.{LAYER}o_proj", {}) == [f"{LAYER}o_proj"]
    patterns = [re.compile(p) for p in files.patterns()]
    left = [name for name in files.tensors() if not any(p.search(name) for p in patterns)]
    assert len(left) == 6
    assert all(name.endswith(("norm.weight", "embed_tokens.weight")) for name in left)
    assert any(p.search(f"language_model.{LAYER}q_proj.bias") for p in patterns)


def test_sizes_that_contradict_the_model(qwen: Path) -> None:
    files = PackedFiles.opened(qwen)
    files.check(f"{LAYER}k_proj", 64, 32, bias=True)
    for shape in ((64, 64, True), (96, 32, True), (64, 32, False)):
        with pytest.raises(FormatError, match="k_proj"):
            files.check(f"{LAYER}k_proj", *shape)


def test_experts(tmp_path: Path) -> None:
    files = PackedFiles.opened(write_exl2(tmp_path, "Mixtral"))
    name = "model.layers.0.block_sparse_moe.experts"
    assert files.has_experts(name)
    assert [key.rpartition(".")[2] for key in files.expert(name, 3)] == ["w1", "w3", "w2"]
    with pytest.raises(FormatError, match=r"experts\.4"):
        files.expert(name, 4)


def test_what_verify_refuses_is_refused(tmp_path: Path) -> None:
    path = write_exl2(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FormatError, match="verify"):
        PackedFiles.opened(path)


def test_a_vllm_that_is_not_known_is_left_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)  # as if it had none of the expected modules
    with caplog.at_level(logging.WARNING):
        exl2ray.vllm.register()
    assert "no EXL2 models" in caplog.text
