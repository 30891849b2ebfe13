"""--allocation linear: what is measured for it, what is computed again, what it chooses, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import Quiet, assert_sound, items, logged, messages, recipe, run, stages, without_scores
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import write_model

from exl2ray.allocation.frontier import KERNEL_SETS, LossCurve
from exl2ray.allocation.overrides import parse_overrides
from exl2ray.allocation.planning import (
    allocate_linears,
    choose,
    has_sensitivities,
    linear_groups,
    predicted_kl,
    slot_weights,
)
from exl2ray.commands import allocations as solve
from exl2ray.errors import BudgetError, FormatError, UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import QParams, pad32
from exl2ray.formats.measurement import Measurement, read_measurement, write_measurement
from exl2ray.job_opening import FEW_SCORES
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec
from exl2ray.quant.qparams import head_option, parse
from exl2ray.recipe import Recipe

HEAD = "lm_head"


@pytest.fixture(scope="module")
def linear(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quiet]:
    """A conversion at two bitrates; not to be changed."""
    root = tmp_path_factory.mktemp("linear")
    settings = {"bits": (4.0, 6.0), "allocation": "linear", "compile_full": str(root / "out-{bpw}")}
    summary, reporter = run(llama, root / "work", **settings)
    return Quiet(llama, root / "work", {b: root / f"out-{b}" for b in (4.0, 6.0)}, summary, reporter)


@pytest.fixture(scope="module")
def measured(linear: Quiet) -> tuple[ModelSpec, Measurement]:
    return load_spec(SourceModel(linear.model)), read_measurement(linear.work / "measurement.json")


def wanted(spec: ModelSpec, **changes: Any) -> Recipe:
    return Recipe("in", "out", allocation="linear", **changes)


def size(spec: ModelSpec, params: dict[str, QParams]) -> int:
    return sum(params[x.key].layout(x.in_features).total_bits(pad32(x.out_features), x.has_bias) for x in spec.linears)


# ---- the conversion ---------------------------------------------------------------------------------------------------


def test_output_is_sound_and_no_larger_than_with_a_head_of_six_bits(linear: Quiet, tmp_path: Path) -> None:
    assert stages(linear.reporter)[:2] == ["measure", "sensitivity"]
    run(linear.model, tmp_path / "work", bits=(4.0, 6.0), compile_full=str(tmp_path / "out-{bpw}"))
    for bits, output in linear.outputs.items():
        assert_sound(linear.model, output)
        ours, usual = ((d / "output.safetensors").stat().st_size for d in (output, tmp_path / f"out-{bits}"))
        assert ours <= usual + 2048  # names of tensors aside, within the budget that the other one may leave unused
        config = json.loads((output / "config.json").read_text())["quantization_config"]
        assert config["bits"] == bits
        assert config["head_bits"] in (2, 3, 4, 5, 6, 8)
    events = logged(linear.work, "allocated")
    assert [e["allocation"] for e in events] == ["linear", "linear"]
    assert events[0]["predicted_kl"] > events[1]["predicted_kl"] > 0
    assert all(0 <= e["gap"] < 1e-3 for e in events)
    assert sum("predicted KL" in m for m in messages(linear.reporter, "note")) == 2


def test_the_measurement_stays_readable_without_our_part(linear: Quiet, quiet: Quiet) -> None:
    ours, plain = (json.loads((q.work / "measurement.json").read_text()) for q in (linear, quiet))
    assert without_scores(ours["measurement"]) == without_scores(plain["measurement"])
    assert ours["exl2ray"].pop("scores") == {"rows": FEW_SCORES}
    assert ours["last_module_idx"] == plain["last_module_idx"]
    assert set(ours) == set(plain) == {"measurement", "last_module_idx", "exl2ray"}
    assert ours["exl2ray"].pop("source") == plain["exl2ray"].pop("source")
    for key, extra in plain["exl2ray"].items():
        assert extra["linears"] == ours["exl2ray"][key]["linears"]
    assert "sensitivity" not in str(plain)
    assert set(ours["exl2ray"]["lm_head.linear"]) == {"linears", "sensitivity"}


def test_nothing_is_measured_twice(linear: Quiet, tmp_path: Path) -> None:
    shutil.copytree(linear.work, tmp_path / "work")
    before = (linear.work / "measurement.json").read_bytes()
    settings: dict[str, Any] = {"bits": (4.0, 6.0), "allocation": "linear", "compile_full": str(tmp_path / "out-{bpw}")}
    settings["reuse"] = True
    _, again = run(linear.model, tmp_path / "work", **settings)
    assert not items(again)
    lost = next((tmp_path / "work" / "measure" / "records").glob("sensitivity-1*"))
    lost.unlink()
    (tmp_path / "work" / "measurement.json").unlink()
    _, again = run(linear.model, tmp_path / "work", **settings)
    assert items(again) == ["sensitivity: gradients of rows 2, 3"]
    assert (tmp_path / "work" / "measurement.json").read_bytes() == before


def test_a_measured_directory_is_completed(linear: Quiet, quiet: Quiet, tmp_path: Path) -> None:
    """After a conversion per module only the head and the sensitivities are missing; the result is the same."""
    shutil.copytree(quiet.work, tmp_path / "work")
    settings = {"bits": (6.0,), "allocation": "linear", "reuse": True, "compile_full": str(tmp_path / "out")}
    _, reporter = run(linear.model, tmp_path / "work", **settings)
    computed = items(reporter)
    assert computed[0] == "measure: lm_head.linear"
    assert computed[1].startswith("sensitivity: ")
    assert not any(i.startswith("measure: model") for i in computed)
    found = [without_scores(json.loads((w / "measurement.json").read_text())) for w in (tmp_path / "work", linear.work)]
    assert found[0] == {**found[1], "exl2ray": {k: v for k, v in found[1]["exl2ray"].items() if k != "scores"}}
    output = linear.outputs[6.0] / "output.safetensors"
    assert (tmp_path / "out" / "output.safetensors").read_bytes() == output.read_bytes()


def test_a_measurement_file_is_enough(linear: Quiet, tmp_path: Path) -> None:
    changes = {"measurement": str(linear.work / "measurement.json"), "allocation": "linear", "bits": (6.0,)}
    _, reporter = run(linear.model, tmp_path / "work", **changes, compile_full=str(tmp_path / "out"))
    assert not {"measure", "sensitivity"} & set(stages(reporter))
    output = linear.outputs[6.0] / "output.safetensors"
    assert (tmp_path / "out" / "output.safetensors").read_bytes() == output.read_bytes()


def test_measurements_without_losses_are_refused(linear: Quiet, tmp_path: Path) -> None:
    found = read_measurement(linear.work / "measurement.json")
    theirs = replace(found, profiles=tuple(replace(p, extra={}) for p in found.profiles))
    write_measurement(tmp_path / "theirs.json", theirs)
    changes = {"measurement": str(tmp_path / "theirs.json"), "allocation": "linear"}
    with pytest.raises(FormatError, match=r"'model\.layers\.0\.self_attn', q_proj: no linears"):
        run(linear.model, tmp_path / "work", **changes)


def test_experts_share_an_option(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "Mixtral")
    run(model, tmp_path / "work", bits=(4.0,), allocation="linear", compile_full=str(tmp_path / "out"))
    assert_sound(model, tmp_path / "out")
    spec, measurement = load_spec(SourceModel(model)), read_measurement(tmp_path / "work" / "measurement.json")
    _, params = allocate_linears(spec, linear_groups(spec, measurement), 4.0)
    for module in spec.modules:
        for role in {x.role for x in module.linears}:
            assert len({params[x.key] for x in module.linears if x.role == role}) == 1


# ---- the choice -------------------------------------------------------------------------------------------------------


def test_budgets(measured: tuple[ModelSpec, Measurement]) -> None:
    spec, measurement = measured
    head = spec.modules[-1].linears[0]
    usual = head_option(6).layout(head.in_features).total_bits(pad32(head.out_features))
    last = None
    for bits in (3.8, 4.2, 5.0, 5.5, 7.0):
        free = choose(spec, measurement, bits, wanted(spec))
        fixed = choose(spec, measurement, bits, wanted(spec, head_bits=6))
        weights = sum(x.in_features * pad32(x.out_features) for m in spec.modules if m.quantized for x in m.linears)
        assert size(spec, free.params) <= int(weights * bits) + usual
        assert size(spec, fixed.params) <= int(weights * bits) + usual
        held = fixed.params[head.key]
        assert min(held.bits) >= 6, "every weight of a held head has its bits"
        assert held.bits_of(head) <= usual
        assert free.predicted_kl is not None
        assert fixed.predicted_kl is not None
        assert free.predicted_kl <= fixed.predicted_kl * 1.001
        assert last is None or free.predicted_kl < last
        last = free.predicted_kl
        assert free.predicted_kl == pytest.approx(free.allocation.objective, rel=1e-9)
        assert all(frozenset(q.bits) in KERNEL_SETS for q in free.params.values())


@pytest.mark.parametrize("held", [2, 3, 4, 5, 6, 8])
def test_a_held_head_has_its_bits_in_every_row(measured: tuple[ModelSpec, Measurement], held: int) -> None:
    spec, measurement = measured
    head = spec.modules[-1].linears[0]
    usual, weights = head_option(held), slot_weights(spec)
    chosen = choose(spec, measurement, 4.5, wanted(spec, head_bits=held)).params
    assert min(chosen[HEAD].bits) >= held
    assert chosen[HEAD].bits_of(head) <= usual.bits_of(head)
    assert size(spec, chosen) <= int(weights * 4.5) + usual.bits_of(head), "as large as with the reference's option"
    per_module = choose(spec, measurement, 4.5, replace(wanted(spec, head_bits=held), allocation="module")).params
    assert per_module[HEAD] == usual

    exact = choose(spec, measurement, 4.5, wanted(spec, head_bits=held), parse_overrides(["lm_head=1:5b_32g"], spec)).params
    assert exact[HEAD] == parse("1:5b_32g")
    assert size(spec, exact) <= int(weights * 4.5) + exact[HEAD].bits_of(head), "--set pays for itself"
    wider = choose(spec, measurement, 4.5, wanted(spec, head_bits=held), parse_overrides(["lm_head=6"], spec)).params
    assert min(wider[HEAD].bits) >= 6


def test_module_allocations_have_a_prediction_too(measured: tuple[ModelSpec, Measurement]) -> None:
    spec, measurement = measured
    per_module = choose(spec, measurement, 4.0, Recipe("in", "out", allocation="module"))
    assert per_module.predicted_kl == pytest.approx(predicted_kl(linear_groups(spec, measurement), per_module.params))
    bare = replace(measurement, profiles=tuple(replace(p, extra={}) for p in measurement.profiles))
    assert not has_sensitivities(spec, bare)
    assert choose(spec, bare, 4.0, Recipe("in", "out", allocation="module")).predicted_kl is None
    with pytest.raises(FormatError, match=r"'model\.layers\.0\.self_attn', q_proj: no linears"):
        choose(spec, bare, 4.0, wanted(spec))


def test_user_wishes_hold(measured: tuple[ModelSpec, Measurement]) -> None:
    spec, measurement = measured
    overrides = parse_overrides(["*.v_proj=5", "*.0.mlp.up_proj=1:8b_32g", "lm_head=8"], spec)
    chosen = choose(spec, measurement, 4.0, wanted(spec), overrides)
    for x in spec.linears:
        if x.role == "v_proj":
            assert min(chosen.params[x.key].bits) >= 5
    assert chosen.params["model.layers.0.mlp.up_proj"] == parse("1:8b_32g")
    assert min(chosen.params[HEAD].bits) == 8
    assert size(spec, chosen.params) <= size(spec, choose(spec, measurement, 4.0, wanted(spec)).params) * 1.01
    with pytest.raises(BudgetError):
        choose(spec, measurement, 4.0, wanted(spec), parse_overrides(["*=8"], spec))


def test_broken_sensitivities_are_named(measured: tuple[ModelSpec, Measurement]) -> None:
    spec, measurement = measured
    first = measurement.profiles[0]
    for broken in ({"q_proj": [1.0]}, {"q_proj": ["1", 2]}, {"q_proj": [-1.0, 2.0]}, {}):
        extra = {**first.extra, "sensitivity": broken}
        changed = replace(measurement, profiles=(replace(first, extra=extra), *measurement.profiles[1:]))
        with pytest.raises(FormatError, match=r"'model\.layers\.0\.self_attn', q_proj: (the|no) sensitivity"):
            linear_groups(spec, changed)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e-2), min_size=4, max_size=4),
    st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    st.floats(4.2, 7.5),
    st.booleans(),
)
@example([0.0078125] * 4, [1.0, 2.0, 1.0, 1.0], 4.953125, False)  # the best is 3 % above the hull
def test_small_models_against_every_assignment(
    measured: tuple[ModelSpec, Measurement], kl: list[float], level: list[float], bits: float, free: bool
) -> None:
    """Oracle: all combinations of a few options (given by --set to most linears) of four linears."""
    spec, measurement = measured
    keys = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", HEAD]
    exact = [f"{x.key}=1:4b_64g" for x in spec.linears if x.key not in keys]
    overrides = parse_overrides(exact, spec)
    profiles = []
    for p in measurement.profiles:
        extra = json.loads(json.dumps(p.extra))
        for i, key in enumerate(keys):
            name, role = key.rpartition(".")[0] or "lm_head.linear", key.rpartition(".")[2]
            if p.entry_key == name:
                extra["sensitivity"][role] = [kl[i], 1.0]
                extra["linears"][role] = {"losses": {"1:4b_64g s4": level[i]}}
        profiles.append(replace(p, extra=extra))
    changed = replace(measurement, profiles=tuple(profiles))
    allocation, params = allocate_linears(spec, linear_groups(spec, changed), bits, overrides, None if free else 6)
    assert allocation.total_bits <= allocation.budget_bits
    best = brute_force(spec, changed, params, keys, allocation.budget_bits, free)
    assert allocation.objective <= best * (1 + 1e-9)


def brute_force(
    spec: ModelSpec, measurement: Measurement, params: dict[str, QParams], keys: list[str], limit: int, free: bool
) -> float:
    groups = {g.linears[0].key: g for g in linear_groups(spec, measurement)}
    few = [parse(f"1:{b}b_{g}g") for b in (2, 3, 4, 5, 6, 8) for g in (32, 64)] + [parse("0.5:4b_32g/0.5:3b_32g")]

    def bits(key: str, q: QParams) -> int:
        x = groups[key].linears[0]
        return q.layout(x.in_features).total_bits(pad32(x.out_features), x.has_bias)

    def cost(key: str, q: QParams) -> float:
        curve: LossCurve = groups[key].curve
        return groups[key].sensitivity * curve.loss(q)

    rest = [k for k in groups if k not in keys]
    used, base = sum(bits(k, params[k]) for k in rest), sum(cost(k, params[k]) for k in rest)
    for_head = few if free else [head_option(6), parse("1:6b_64g"), parse("1:6b_128g")]
    tables = [[(bits(k, q), cost(k, q)) for q in (for_head if k == HEAD else few)] for k in keys]
    fitting = (sum(c for _, c in row) for row in itertools.product(*tables) if used + sum(b for b, _ in row) <= limit)
    return base + min(fitting, default=float("inf"))


def test_recipes() -> None:
    free, module = Recipe("a", "b", allocation="linear"), Recipe("a", "b", allocation="module")
    fixed = replace(free, head_bits=4)
    assert free.head_is_free
    assert not fixed.head_is_free
    assert not module.head_is_free
    assert (free.usual_head_bits, fixed.usual_head_bits, module.usual_head_bits) == (6, 4, 6)
    with pytest.raises(UsageError, match="--allocation layer"):
        Recipe("a", "b", allocation="layer")  # type: ignore[arg-type]
    assert recipe(Path("a"), Path("b"), head_bits=6).job({}, None)["quantize"]["head_bits"] == 6
    assert recipe(Path("a"), Path("b")).job({}, None)["quantize"]["head_bits"] == 6
    assert free.job({}, None)["quantize"]["head_bits"] is None


def test_solve_shows_what_a_conversion_chooses(linear: Quiet, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(linear.work / "measurement.json")
    found = solve.solve(str(linear.model), file, (4.0, 6.0), "squared", 2.0)
    events = logged(linear.work, "allocated")
    for solution, event in zip(found, events, strict=True):
        assert solution.allocation == "linear"
        assert solution.predicted_kl == event["predicted_kl"] == pytest.approx(sum(c.kl for c in solution.linears))
        assert solution.linears[-1].option == event["head"]
        assert solution.achieved_bpw == pytest.approx(event["bpw"])
    for bits in (2.0, 9.0):  # as a conversion does
        with pytest.raises(BudgetError, match=f"-b {bits:g}: this model can be"):
            solve.solve(str(linear.model), file, (bits,), "squared", 2.0)
    per_module = solve.solve(str(linear.model), file, (4.0,), "squared", 2.0, "module")[0]
    assert per_module.choices
    assert not per_module.linears
    assert per_module.predicted_kl is not None
    solve.show([found[0], per_module])
    shown = capsys.readouterr().out
    assert "lm_head" in shown
    assert shown.count("predicted KL") == 2
