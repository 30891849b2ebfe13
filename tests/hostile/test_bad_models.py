"""Models and measurements that convert without an error into something bad: each is named, and sound ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_models import DOWN, EMBED, HEAD, LAYER, QUERY, Edit, Tensors, doubts, edited, fill, parquet, recipe, run
from bounded import exl2ray
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, VOCAB, byte_tokenizer, write_model

from exl2ray.convert import convert
from exl2ray.events import Silent
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import Stored
from exl2ray.plan.flat import Part, flat_parts
from exl2ray.plan.problems import examine
from exl2ray.report.facts import read_facts
from exl2ray.report.page import render

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


# ---- tensors that hold nothing ------------------------------------------------------------------------------------------


def half_of_the_rows(tensors: Tensors) -> None:
    tensors[DOWN][HIDDEN // 2 :] = 0


def frequent_rows(name: str) -> Edit:
    space = byte_tokenizer().token_to_id("Ġ")

    def edit(tensors: Tensors) -> None:
        tensors[name][space] = 0

    return edit


EMPTY: dict[str, tuple[Edit, list[str]]] = {
    "a layer": (fill(LAYER), ["9 tensors", "one value throughout", "nothing is left of layer 1", QUERY]),
    "all layers": (fill("model.layers."), ["18 tensors", "nothing is left of layers 0, 1"]),
    "a projection": (fill(QUERY), ["1 tensor of", f"{QUERY} (0)"]),
    "an MLP": (fill(LAYER + "mlp"), ["3 tensors", DOWN]),
    "a constant": (fill(QUERY, 0.25), [f"{QUERY} (0.25)"]),
    "the head": (fill(HEAD), [f"{HEAD} (0)"]),
    "the embedding": (fill(EMBED), [f"{EMBED} (0)"]),
    "an embedding of one value": (fill(EMBED, 1.0), [f"{EMBED} (1)"]),
    "the last norm": (fill("model.norm"), ["model.norm.weight (0)"]),
    "a norm of a layer": (fill(LAYER + "input_layernorm"), [f"{LAYER}input_layernorm.weight (0)"]),
    "half of a projection": (half_of_the_rows, ["long runs", f"{DOWN} (50%)"]),
    "the row of a frequent token": (frequent_rows(EMBED), [f"{EMBED} holds nothing but zeros for 1 of"]),
    "the same in the head": (frequent_rows(HEAD), [f"{HEAD} holds nothing but zeros for 1 of"]),
}


@pytest.mark.parametrize("case", EMPTY)
def test_empty_tensors_are_named(case: str, tiny: Path, text: str, tmp_path: Path) -> None:
    edit, words = EMPTY[case]
    (found,) = doubts(edited(tiny, tmp_path / "m", edit), tmp_path, text)
    for word in words:
        assert word in found


def padding(tensors: Tensors) -> None:
    tensors[EMBED][VOCAB - 10 :] = 0


def pruned(tensors: Tensors) -> None:
    tensors[DOWN].view(-1, 4)[:, :2] = 0


SOUND: dict[str, Edit] = {
    "norms of ones": fill("norm", 1.0),
    "padding of the vocabulary": padding,
    "two of four values pruned": pruned,
}


@pytest.mark.parametrize("case", SOUND)
def test_what_real_models_hold_is_no_reason(case: str, tiny: Path, text: str, tmp_path: Path) -> None:
    assert doubts(edited(tiny, tmp_path / "m", SOUND[case]), tmp_path, text) == []


@pytest.mark.parametrize(
    ("family", "pattern", "value", "says"),
    [
        ("Mixtral", "experts.2.", 0.0, "experts.2.w1"), ("Mixtral", ".gate.weight", 0.0, "gate.weight (0)"),
        ("Gemma2", "model.norm", -1.0, "model.norm.weight (-1)"), ("Gemma2", "norm", 0.0, ""),
    ],
)  # fmt: skip
def test_families(family: str, pattern: str, value: float, says: str, text: str, tmp_path: Path) -> None:
    """Experts are looked at one by one; Gemma stores the weights of norms less one."""
    base = write_model(tmp_path / "base", family, **({"head_dim": 16} if family == "Gemma2" else {}))
    names = [n for n in load_file(base / "model.safetensors") if pattern in n]
    if not names:
        pytest.skip(f"this transformers saves no {pattern} of a {family}")
    found = doubts(edited(base, tmp_path / "m", fill(pattern, value)), tmp_path, text)
    assert any(says in f for f in found) if says else found == []


def test_weights_that_are_stored_as_codes_and_scales(tiny: Path, text: str, tmp_path: Path) -> None:
    def to_float8(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            weight = torch.zeros_like(tensors[name]) if name == QUERY else tensors[name]
            scale = weight.float().abs().max().clamp(min=1e-3) / 448
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.view(1, 1)

    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (found,) = doubts(edited(tiny, tmp_path / "m", to_float8, quantization_config=quantization), tmp_path, text)
    assert f"1 tensor of the source with one value throughout: {QUERY} (0)" in found


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("part", range(3))
def test_parts_of_fused_tensors(axis: int, part: int, tmp_path: Path) -> None:
    """A third of a fused tensor, by rows or by columns, is found, and only that."""
    whole = torch.randn(48, 48)
    ranges = [((16 * i, 16 * i + 16),) for i in range(3)]
    whole.narrow(axis, 16 * part, 16).zero_()
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"fused": whole.half()}, tmp_path / "model.safetensors")
    parts = [Part(Stored("fused", (48, 48), axis, r)) for r in ranges]
    found = flat_parts(SourceModel(tmp_path), parts)
    assert [(f.part, f.value) for f in found] == [(parts[part], 0.0)]


def test_a_single_other_value_is_found_wherever_it_is(tmp_path: Path) -> None:
    """What looks constant in the sample is read until the end."""
    large = torch.zeros(1024, 1024, dtype=torch.float16)
    large[1000, 1001] = 1
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"a": large, "b": torch.zeros(1024, 1024)}, tmp_path / "model.safetensors")
    parts = [Part(Stored(name, (1024, 1024))) for name in ("a", "b")]
    assert [f.part.stored.name for f in flat_parts(SourceModel(tmp_path), parts)] == ["b"]


# ---- config.json and weights --------------------------------------------------------------------------------------------


def copy_of_embedding(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBED].clone()


def nearly_a_copy(tensors: Tensors) -> None:
    copy_of_embedding(tensors)
    tensors[HEAD][200, 7] += 1


def frequencies(theta: float, count: int) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[LAYER + "self_attn.rotary_emb.inv_freq"] = theta ** -(torch.arange(count) / count)

    return edit


LONG: dict[str, Any] = {"max_position_embeddings": 32768}
NO_THETA: dict[str, Any] = {"rope_theta": None, "rope_parameters": None}
CONFIGS: dict[str, tuple[Edit | None, dict[str, Any], str]] = {
    "tied, another head": (None, {"tie_word_embeddings": True}, "is stored and is not model.embed_tokens.weight"),
    "tied, one value differs": (nearly_a_copy, {"tie_word_embeddings": True}, "the stored one is used"),
    "tied, a copy": (copy_of_embedding, {"tie_word_embeddings": True}, ""),
    "untied, a copy": (copy_of_embedding, {"tie_word_embeddings": False}, ""),
    "long context without base": (None, {**LONG, **NO_THETA}, "no rope_theta"),
    "long context with base": (None, {**LONG, "rope_parameters": None, "rope_theta": 5e5}, ""),
    "short context without base": (None, NO_THETA, ""),
    "stored frequencies": (frequencies(1e4, 8), {}, ""),
    "of another base": (frequencies(1e6, 8), {}, "made for rope_theta 1e+06"),
    "of other heads": (frequencies(1e4, 16), {}, "made for heads of 32 channels"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_beside_weights(case: str, tiny: Path, text: str, tmp_path: Path) -> None:
    edit, config, says = CONFIGS[case]
    found = doubts(edited(tiny, tmp_path / "m", edit, **config), tmp_path, text)
    assert len(found) == bool(says), found
    assert all(says in f for f in found)


def test_the_head_that_is_used_is_that_of_transformers(tiny: Path, tmp_path: Path) -> None:
    """Beside tie_word_embeddings transformers takes a stored head that differs, as the warning says."""
    import transformers

    model = edited(tiny, tmp_path / "m", None, tie_word_embeddings=True)
    head = transformers.AutoModelForCausalLM.from_pretrained(model).lm_head.weight
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the warning says what transformers 5 does")
    assert torch.equal(head.half(), load_file(model / "model.safetensors")[HEAD])
    assert load_spec(SourceModel(model)).linears[-1].weight.name == HEAD


# ---- measurements -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tiny: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """measurement.json of the tiny model."""
    path = tmp_path_factory.mktemp("measured") / "m.json"
    convert(recipe(tiny, path.parent / "work", text, output_measurement=str(path)), Silent())
    return path


MEASURED_OF: dict[str, tuple[Edit | None, dict[str, Any], str]] = {
    "the same, elsewhere": (None, {}, ""),
    "settings of generation": (None, {"eos_token_id": 5, "transformers_version": "9"}, ""),
    "other weights": (fill(QUERY, 0.5), {}, "another model"),
    "another base of RoPE": (None, {"rope_theta": 5e5, "rope_parameters": None}, "another config.json"),
}


@pytest.mark.parametrize("case", MEASURED_OF)
def test_measurements_of_another_model(case: str, tiny: Path, text: str, measured: Path, tmp_path: Path) -> None:
    edit, config, says = MEASURED_OF[case]
    model = edited(tiny, tmp_path / "m", edit, **config)
    found = [d for d in doubts(model, tmp_path, text, measurement=str(measured)) if "-m" in d]
    assert len(found) == bool(says), found
    assert all(says in f for f in found)
    solved = exl2ray("solve", "-i", model, "-m", measured, "-b", "4")
    solved.ends_with(0, *([f"warning: {found[0]}"] if found else []))
    assert ("warning" in solved.text) == bool(found)


def test_a_measurement_with_another_scale_of_rope(tiny: Path, text: str, measured: Path, tmp_path: Path) -> None:
    scaled = tmp_path / "scaled.json"
    convert(recipe(tiny, tmp_path / "work", text, output_measurement=str(scaled), rope_scale=8.0), Silent())
    assert json.loads(scaled.read_text())["exl2ray"]["source"]["rope"] == "-rs 8"
    for path, flags, says in (
        (measured, {}, ""), (scaled, {"rope_scale": 8.0}, ""), (measured, {"rope_scale": 8.0}, "neither -rs nor -ra"),
        (scaled, {}, "measured with -rs 8"), (scaled, {"rope_scale": 8.0, "rope_alpha": 2.0}, "-rs 8 -ra 2"),
    ):  # fmt: skip
        looked = examine(recipe(tiny, tmp_path / "other", text, measurement=str(path), **flags))
        found = [d for d in looked.doubts if "-m was measured" in d]
        assert len(found) == bool(says), (path, flags, found)
        assert all(says in f for f in found)


def test_a_measurement_that_does_not_say_of_what(tiny: Path, text: str, measured: Path, tmp_path: Path) -> None:
    """As the reference writes it, which ignores what we add."""
    found = json.loads(measured.read_text())
    assert set(found["exl2ray"]["source"]) == {"weights", "config"}
    del found["exl2ray"]
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(found))
    looked = examine(recipe(tiny, tmp_path / "work", text, measurement=str(plain)))
    assert looked.doubts == []
    assert "does not say of which model" in looked.notes[0]


def test_an_allocation_without_use_for_its_budget(tiny: Path, measured: Path, tmp_path: Path) -> None:
    """All modules but one lose nothing by this measurement, with whatever option."""
    found = json.loads(measured.read_text())
    for options in [o for o in found["measurement"].values() if o][1:]:
        for option in options:
            option["accuracy"] = 1.0
    path = tmp_path / "m.json"
    path.write_text(json.dumps(found))
    exl2ray("solve", "-i", tiny, "-m", path, "-b", "6", "--json").ends_with(0, "of its budget unused")
    sound = exl2ray("solve", "-i", tiny, "-m", measured, "-b", "6", "--json")
    sound.ends_with(0)
    assert json.loads(sound.out)["solutions"][0]["warnings"] == []


def test_sensitivities_of_nothing(tiny: Path, text: str, tmp_path: Path) -> None:
    """One linear matters by this measurement, so that all others get the fewest bits."""
    own = tmp_path / "linear.json"
    convert(recipe(tiny, tmp_path / "work", text, output_measurement=str(own), allocation="linear"), Silent())
    found = json.loads(own.read_text())
    exl2ray("solve", "-i", tiny, "-m", own, "-b", "6", "--json").ends_with(0, '"warnings": []')
    for key, entry in found["exl2ray"].items():
        for role in entry.get("sensitivity", ()):
            if (key, role) != ("model.layers.1.self_attn", "k_proj"):
                entry["sensitivity"][role] = [0, 0]
    own.write_text(json.dumps(found))
    words = ("of its budget unused", "14 of 15 linears have no effect on the model", "model.layers.0.self_attn.q_proj")
    exl2ray("solve", "-i", tiny, "-m", own, "-b", "6").ends_with(0, *words)
    again, _ = run(recipe(tiny, tmp_path / "again", text, measurement=str(own), allocation="linear", bits=(6.0,)))
    assert any("of its budget unused" in w for w in again.warnings)
    assert any("14 of 15 linears" in w for w in again.warnings)


# ---- who is told --------------------------------------------------------------------------------------------------------


def test_the_end_repeats_what_concerns_the_result(tiny: Path, text: str, tmp_path: Path) -> None:
    """A random model without its last norm: told when found and at the end, on the card, in the report, after a resume."""
    model = edited(tiny, tmp_path / "m", fill("model.norm"))
    job = recipe(model, tmp_path / "work", text, compile_full=str(tmp_path / "out"))
    summary, reporter = run(job)
    assert len(summary.warnings) == 2
    assert "model.norm.weight (0)" in summary.warnings[0]
    assert f"no better than guessing among {VOCAB} tokens" in summary.warnings[1]
    told = [f["message"] for name, f in reporter.events if name == "warning"]
    assert [told.count(w) for w in summary.warnings] == [1, 1]
    assert reporter.events[-1][0] == "done"
    assert reporter.events[-1][1]["warnings"] == list(summary.warnings)
    card = (tmp_path / "out" / "README.md").read_text()
    page, _ = render(read_facts(str(tmp_path / "work")))
    assert "## Warnings of the conversion" in card
    assert "no better than guessing" in card
    assert str(tmp_path) not in card.split("## How it was made")[0]
    assert "no better than guessing" in page
    assert "model.norm.weight (0)" in page
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again, reporter = run(job)
    assert again.warnings == summary.warnings
    assert reporter.events[-1][1]["warnings"] == list(summary.warnings)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == files
    assert len(read_facts(str(tmp_path / "work"), ()).warnings) == 2


def test_the_console_ends_with_them(tiny: Path, text: str, tmp_path: Path) -> None:
    arguments = ("convert", "-i", tiny, "-o", tmp_path / "work", "-b", "4", "-l", "128", "-ml", "128", "-c", text,
                 "-r", "4", "-mr", "2", "--device", "cpu", "--executor", "inline", "--quality", "reference")  # fmt: skip
    done = exl2ray(*arguments, seconds=60)
    done.ends_with(0, "no better than guessing")
    last = done.out.splitlines()[-2:]
    assert last[0].startswith("warning: the source model has perplexity")
    assert last[1].endswith("with 1 warning: read above")
    again = exl2ray(*arguments, "--json", seconds=60)
    assert json.loads(again.out.splitlines()[-1])["warnings"] == [last[0].removeprefix("warning: ")]


def test_plan_lists_them(tiny: Path, tmp_path: Path) -> None:
    model = edited(tiny, tmp_path / "m", fill(QUERY), tie_word_embeddings=True)
    words = (f"{QUERY} (0)", "is stored and is not")
    arguments = ("-l", "128", "-ml", "128", "-c", parquet(tmp_path / "rows.parquet", "a" * 9000), "-r", "4", "-mr", "2")
    planned = exl2ray("plan", "-i", model, "-b", "4", "--device", "cpu", *arguments)
    planned.ends_with(0, *words, "1 distinct token")
