"""``exl2ray architectures``: every family of the table, in words."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from exl2ray.cli import cli
from exl2ray.commands.architectures import describe
from exl2ray.model.table import ARCHITECTURES


def output(*args: str) -> str:
    result = CliRunner().invoke(cli, ["architectures", *args])
    assert result.exit_code == 0
    return result.stdout


def test_table_lists_every_family_with_its_differences() -> None:
    text = output()
    for arch in ARCHITECTURES.values():
        assert f"\n{arch.name} " in text
        assert all(difference in text for difference in arch.loader_differences)


@pytest.mark.parametrize(
    ("name", "norm", "mlp", "rope", "head", "particular"),
    [
        ("LlamaForCausalLM", "RMS", "gated, silu", "neox", "config", ()),
        ("MixtralForCausalLM", "RMS", "experts, silu", "neox", "config", ()),
        ("CohereForCausalLM", "Layer", "gated, silu", "gptj", "tied",
         ("parallel block", "Layer norm on q and k if use_qk_norm", "needs BOS")),
        ("GPT2LMHeadModel", "Layer, bias", "plain, gelu_tanh", "learned positions", "tied",
         ("q, k, v in one matrix", "weights stored (in, out)", "bias on q, k, v", "bias on o", "bias in the MLP")),
        ("Qwen3ForCausalLM", "RMS", "gated, silu", "neox", "config", ("RMS norm on q and k",)),
    ],
)  # fmt: skip
def test_families_in_words(name: str, norm: str, mlp: str, rope: str, head: str, particular: tuple[str, ...]) -> None:
    f = describe(ARCHITECTURES[name])
    assert (f.norm, f.mlp, f.rope, f.head, f.particular) == (norm, mlp, rope, head, particular)


def test_json() -> None:
    found = {f["name"]: f for f in json.loads(output("--json"))["architectures"]}
    assert list(found) == list(ARCHITECTURES)
    assert {n for n, f in found.items() if f["moe"]} == {n for n, a in ARCHITECTURES.items() if a.moe}
    assert found["Gemma3ForCausalLM"]["particular"][0] == "written as Gemma3ForConditionalGeneration"
    assert found["LlavaForConditionalGeneration"]["multimodal"] is True
    assert "q/k norm" in found["Qwen3ForCausalLM"]["loader_differences"][0]


def test_sentences_break_between_words_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exl2ray.terminal.console.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "60")
    sentences = output()[output().index("head: tied = ") :]
    assert max(map(len, sentences.splitlines())) < 60
    assert all(arch.name in sentences for arch in ARCHITECTURES.values() if arch.loader_differences)
