"""Configs beside transformers, changed key by key: nothing differs without a word."""

from __future__ import annotations

import compare_configs
import pytest


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("LlamaForCausalLM", ["is_causal", "layer_types", "logit_scale", "rope_scaling"]),
        ("Mistral3ForConditionalGeneration", ["rope_theta", "sliding_window", "layer_types"]),
        ("Qwen3MoeForCausalLM", ["layer_types", "use_sliding_window"]),
        ("Gemma3ForCausalLM", ["attn_logit_softcapping", "final_logit_softcapping"]),
    ],
)
def test_what_differs_is_told(family: str, keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_configs.main([family, "--keys", *keys]) == 0, capsys.readouterr().out
    assert not capsys.readouterr().out.startswith("0 changes")


def test_what_is_not_told_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = compare_configs.ours
    monkeypatch.setattr(compare_configs, "ours", lambda path, ids: (ours(path, ids)[0], ()))
    assert compare_configs.main(["LlamaForCausalLM", "--keys", "logit_scale"]) == 1
    assert "silent LlamaForCausalLM: logit_scale 0.5: " in capsys.readouterr().out
