"""--set and patch: what the user wants for single linears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from convert_helpers import Quiet, contents, items, messages, recipe, run, stages

from exl2ray.allocation.overrides import overridden, parse_override, parse_overrides, smallest_option
from exl2ray.cli import cli
from exl2ray.convert import patch
from exl2ray.errors import UsageError
from exl2ray.events import Silent
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.summary import inspect_directory
from exl2ray.formats.verify import verify_directory
from exl2ray.model.arch import load_spec
from exl2ray.quant.qparams import head_option, parse

V = "model.layers.*.self_attn.v_proj=6"


def widths(directory: Path) -> dict[str, list[int]]:
    """Linear -> widths of its runs of groups."""
    out = {}
    for x in inspect_directory(directory).linears:
        out[x.key] = [int(part.split(" x ")[1].split("b/")[0]) for part in x.layout.split(" + ")]
    return out


def test_a_minimum_is_kept_within_the_budget(quiet: Quiet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary, _ = run(quiet.model, tmp_path / "work", overrides=(V,), compile_full=str(out))
    found = widths(out)
    assert all(min(w) >= 6 for key, w in found.items() if key.endswith("v_proj"))
    assert min(min(w) for key, w in found.items() if not key.endswith("v_proj")) < 6
    assert summary.outputs[0].achieved_bpw <= 4.0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["overrides"] == [V]
    assert not verify_directory(out)
    plain = widths(quiet.outputs[4.0])
    assert any(min(w) < 6 for key, w in plain.items() if key.endswith("v_proj")), "else this test shows nothing"


def test_an_exact_option_and_the_head(quiet: Quiet, tmp_path: Path) -> None:
    option = "0.25:5b_32g/0.75:3b_32g"
    first = "model.layers.0.mlp.down_proj"
    chosen = (f"{first}={option}", "lm_head=8")
    out = tmp_path / "out"
    run(quiet.model, tmp_path / "work", overrides=chosen, compile_full=str(out))
    found = widths(out)
    assert found[first] == [5, 3]
    assert found["lm_head"] == [8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v_proj", "PATTERN=BITS"),
        ("=6", "PATTERN=BITS"),
        ("x=", "PATTERN=BITS"),
        ("x=7", "bits are 2, 3, 4, 5, 6, 8"),
        ("x=six", "not of the form"),
        ("x=0.5:4b_64g/0.5:5b_64g", "widths fall"),
        ("x=0.5:4b_64g/0.4:3b_64g", "add up to 1"),
        ("x=1:4b_48g", "multiples of 32"),
        ("x=1:7b_64g", "widths are"),
        ("re:[=6", "unterminated"),
        ("re:a{99999999999999}=3", "too large"),
        ("x=\u00b2", "not of the form"),
        ("x=" + "9" * 5000, "not of the form"),
        ("x=nan:4b_128g", "add up to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        parse_override(text)
    assert e.value.hint


def test_patterns(llama: Path) -> None:
    spec = load_spec(SourceModel(llama))
    with pytest.raises(UsageError, match="matches none of"):
        parse_overrides(["model.layers.99.*=6"], spec)
    overrides = parse_overrides(["*=4", "re:.*\\.(q|k)_proj=6", "*.0.*.k_proj=1:3b_64g"], spec)
    low = parse("1:3b_64g")
    chosen = {x.key: overridden(overrides, x, low) for x in spec.linears}
    assert chosen["model.layers.0.self_attn.k_proj"] == low
    assert min(chosen["model.layers.1.self_attn.k_proj"].bits) == 6
    assert min(chosen["model.layers.0.self_attn.v_proj"].bits) == 4
    assert overridden(overrides, spec.linears[0], parse("1:8b_128g")) == parse("1:8b_128g"), "wide enough as it is"


def test_a_pattern_that_takes_for_ever_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exl2ray.allocation.overrides.MATCHING_SECONDS", 0.5)
    spec = load_spec(SourceModel(llama))
    with pytest.raises(UsageError, match=r"--set re:\(\.\+\)\+z=6: the regular expression did not finish within") as e:
        parse_overrides(["re:(.+)+z=6"], spec)
    assert "simplify it" in str(e.value.hint)
    assert parse_overrides(["re:(.+)+j=6"], spec)[0].keys


def test_the_smallest_option_that_will_do(llama: Path) -> None:
    linears = {x.role: x for x in load_spec(SourceModel(llama)).modules[1].linears}
    assert smallest_option(linears["v_proj"], 5) == parse("1:5b_64g")
    assert smallest_option(linears["q_proj"], 2) == parse("0.05:3b_64g/0.95:2b_64g")
    head = load_spec(SourceModel(llama)).modules[-1].linears[0]
    assert smallest_option(head, 5) == head_option(5)


def test_patch_quantises_only_what_changes(quiet: Quiet, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(quiet.model, work, bits=(4.0, 5.0), compile_full=str(tmp_path / "out-{bpw}"))
    base = recipe(quiet.model, work, bits=(4.0, 5.0), compile_full=str(tmp_path / "out-{bpw}"))
    before = contents(tmp_path / "out-5.0")
    reporter = Silent()
    summary = patch(base, ["*.1.*.v_proj=8"], reporter, (4.0,), str(tmp_path / "patched"))
    assert items(reporter) == ["quantize 4.0: model.layers.1.self_attn", "quantize 4.0: lm_head.linear"]
    old, new = widths(tmp_path / "out-4.0"), widths(tmp_path / "patched")
    assert {key for key in old if old[key] != new[key]} == {"model.layers.1.self_attn.v_proj"}
    assert new["model.layers.1.self_attn.v_proj"] == [8]
    assert not verify_directory(tmp_path / "patched")
    assert summary.outputs[0].achieved_bpw > 4.0 - 0.01
    assert contents(tmp_path / "out-5.0") == before
    again = Silent()
    patch(base, ["*.1.*.v_proj=8"], again, (4.0,), str(tmp_path / "patched"))
    assert items(again) == [], "done already"
    assert stages(again) == [], "written already"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "output.safetensors").write_bytes(b"of somebody else")
    refused = Silent()
    with pytest.raises(UsageError, match="not written there by exl2ray"):
        patch(base, ["*.0.*.v_proj=8"], refused, (4.0,), str(tmp_path / "taken"))
    assert items(refused) == []
    assert (tmp_path / "taken" / "output.safetensors").read_bytes() == b"of somebody else"
    nothing = Silent()
    patch(base, ["*.1.*.v_proj=2"], nothing, (4.0,), str(tmp_path / "same"))
    assert any("as --set asks already" in m for m in messages(nothing, "note"))
    assert contents(tmp_path / "same")["output.safetensors"] == contents(tmp_path / "out-4.0")["output.safetensors"]


def test_patch_needs_a_finished_conversion(quiet: Quiet, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(quiet.model, work, output_measurement=str(tmp_path / "m.json"))
    with pytest.raises(UsageError, match="not quantised yet"):
        patch(recipe(quiet.model, work), ["*.v_proj=6"], Silent())


def test_patch_from_the_command_line(quiet: Quiet, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    run(quiet.model, work, compile_full=str(out))
    job = (work / "job.json").read_bytes()
    result = CliRunner().invoke(cli, ["patch", "-o", str(work), "--set", "*.0.*.o_proj=8", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert (work / "job.json").read_bytes() == job  # the conversion is what it was
    assert widths(out)["model.layers.0.self_attn.o_proj"] == [8]
    wrong = CliRunner().invoke(cli, ["patch", "-o", str(work), "--set", "*.0.*.o_proj=8", "-b", "3"])
    assert wrong.exit_code == UsageError.exit_code
    assert wrong.output.startswith(f"error: -b 3: the conversion in {work} has 4")
