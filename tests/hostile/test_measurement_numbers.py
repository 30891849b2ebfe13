"""measurement.json with numbers, lists and names that no measuring leaves: refused, and never allocated by."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from small_sources import write_source

from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import QParams
from exl2ray.formats.measurement import Measurement, ModuleProfile, OptionProfile
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModuleSpec
from exl2ray.quant.qparams import option_tables

Json = dict[str, Any]
MLP, ATTENTION = "model.layers.0.mlp", "model.layers.1.self_attn"
AT_ALL_COSTS = 1e308


def profile(module: ModuleSpec) -> ModuleProfile:
    """A module whose options are the better the more bits they have, as if it had been measured for --allocation linear."""
    losses = {"1:2b_32g s4": 0.5, "1:4b_128g s4": 0.03, "1:8b_128g s4": 0.0001}
    extra = {
        "linears": {x.role: {"losses": losses} for x in module.linears},
        "sensitivity": {x.role: [0.01, 0.4] for x in module.linears},
    }
    key, mode = module.profile_key.rsplit(".", 1)
    if not module.quantized:
        return ModuleProfile(key, mode, extra=extra)
    (table,) = option_tables({x.role for x in module.linears})
    options = []
    for row in table.rows:
        params: dict[str, QParams] = dict(zip(table.roles, row, strict=True))
        bits = sum(params[x.role].bits_of(x) for x in module.linears)
        weights = sum(x.in_features * x.padded_out for x in module.linears)
        options.append(OptionProfile(1 - 2.0 ** -(bits / weights), bits, params))
    return ModuleProfile(key, mode, tuple(options), extra=extra)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def sound(model: Path) -> Json:
    modules = [m for m in load_spec(SourceModel(model)).modules if m.kind != "embedding"]
    profiles = tuple(profile(m) if m.linears else ModuleProfile(*m.profile_key.rsplit(".", 1)) for m in modules)
    found: Json = json.loads(Measurement(profiles, len(modules)).to_bytes())
    return found


def test_the_measurement_is_sound_as_it_is(model: Path, sound: Json, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(sound))
    for allocation in ("linear", "module"):
        run = exl2ray("solve", "-i", model, "-m", tmp_path / "m.json", "-b", "4", "--allocation", allocation)
        run.ends_with(0, "achieved 3.9" if allocation == "module" else "achieved ")
        assert "Warning" not in run.text


def _lists(m: Json) -> list[list[Json]]:
    return [v for v in m["measurement"].values() if isinstance(v, list)]


def _sensitivities(value: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        for entry in m["exl2ray"].values():
            entry["sensitivity"] = {role: value for role in entry["sensitivity"]}

    return change


def _sensitivity(value: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["exl2ray"][MLP]["sensitivity"]["up_proj"] = value

    return change


def _losses(**changes: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["exl2ray"][MLP]["linears"]["up_proj"].update(changes)

    return change


def _linear(value: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["exl2ray"][MLP]["linears"]["up_proj"] = value

    return change


def _named(name: str) -> Callable[[Json], None]:
    return _losses(losses={"1:4b_128g s4": 0.1, name: 0.2})


def _option(**changes: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["measurement"][ATTENTION][3].update(changes)

    return change


def _params(**changes: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["measurement"][ATTENTION][3]["q_proj"].update(changes)

    return change


def _accuracies(value: float) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        for options in _lists(m):
            for o in options:
                o["accuracy"] = value

    return change


def _more_options(m: Json) -> None:
    for key, options in m["measurement"].items():
        if isinstance(options, list):
            m["measurement"][key] = options * 100


def _nested(m: Json) -> None:
    m["measurement"][MLP] = [m["measurement"][MLP]]


def _as_entry(value: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["measurement"][MLP] = value

    return change


def _extra(value: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["exl2ray"][MLP] = value

    return change


def _index(value: Any) -> Callable[[Json], None]:
    def change(m: Json) -> None:
        m["last_module_idx"] = value

    return change


LINEAR: dict[str, tuple[Callable[[Json], None], str]] = {  # --allocation linear
    "sensitivities 0": (_sensitivities([0, 0]), "the sensitivities of all linears are 0"),
    "sensitivities 0 at some error": (_sensitivities([0.0, 0.5]), "the sensitivities of all linears are 0"),
    "sensitivities tiny": (_sensitivities([1e-308, 0.5]), "the sensitivities of all linears are 0"),
    "sensitivities overflow": (_sensitivities([AT_ALL_COSTS, 1e-308]), "the sensitivity is not"),
    "sensitivities that overflow together": (_sensitivities([1e20, 1e-20]), "a sensitivity of KL 1e+20"),
    "sensitivity without error": (_sensitivity([0.1, 0]), "at a squared error of 0"),
    "sensitivity negative": (_sensitivity([-1, 0.5]), "up_proj: the sensitivity is not [KL, squared error]"),
    "sensitivity NaN": (_sensitivity([float("nan"), 0.5]), "is NaN, which is not a JSON number"),
    "sensitivity infinite": (_sensitivity([0.5, float("inf")]), "is Infinity, which is not a JSON number"),
    "sensitivity true": (_sensitivity([True, 0.5]), "the sensitivity is not"),
    "sensitivity of one number": (_sensitivity([0.5]), "the sensitivity is not"),
    "sensitivity a text": (_sensitivity("0.5"), "the sensitivity is not"),
    "sensitivity huge": (_sensitivity([10**290, 1]), "the sensitivity is not"),
    "loss negative": (_losses(losses={"1:4b_128g s4": -0.1}), "a loss or shape is not a number from 0"),
    "loss huge": (_losses(losses={"1:4b_128g s4": 1e300}), "a loss or shape is not a number from 0"),
    "loss a text": (_losses(losses={"1:4b_128g s4": "0"}), "a loss or shape is not a number from 0"),
    "no losses": (_losses(losses={}), "no losses of options"),
    "a linear a text": (_linear("x"), "up_proj: no losses of options"),
    "a linear nothing": (_linear(None), "up_proj: no losses of options"),
    "losses a list": (_losses(losses=[1, 2]), "no losses of options"),
    "losses of many options": (_losses(losses={f"1:4b_{32 * i}g s4": 0.1 for i in range(1, 2000)}), "there are at most"),
    "shape of zeros": (_losses(shape=[0, 0]), "all of it is 0"),
    "shape of nothing": (_losses(shape=[]), "all of it is 0"),
    "shape huge": (_losses(shape=[1e308, 1e308]), "a loss or shape is not a number"),
    "shape too long": (_losses(shape=[1.0] * 100_000), "a shape of 100000 pieces"),
    "shape an object": (_losses(shape={"a": 1}), "the shape is no list"),
    "option of no form": (_named("best"), "a loss of 'best', which is no option"),
    "option of a long name": (_named("x" * 1_000_000), "xxx..., which is no option"),
    "option of another width": (_named("1:7b_32g s4"), "which the format does not have"),
    "option with groups of 0": (_named("1:4b_0g s4"), "which the format does not have"),
    "option with a share of NaN": (_named("nan:4b_32g s4"), "which the format does not have"),
    "option with groups of 10^30": (_named(f"1:4b_{32 * 10**30}g s4"), "which the format does not have"),
    "option of part of the rows": (_named("0.5:4b_32g s4"), "which the format does not have"),
    "linears a list": (_extra({"linears": [], "sensitivity": {}}), "no linears"),
    "sensitivity of no linear": (_extra({"linears": {}, "sensitivity": []}), "no "),
}  # fmt: skip
MODULE: dict[str, tuple[Callable[[Json], None], str]] = {  # --allocation module
    "options x 100": (_more_options, "options; a module has at most 64"),
    "accuracy 1 everywhere": (_accuracies(1.0), "all options of each module have the same accuracy"),
    "accuracy 0 everywhere": (_accuracies(0.0), "all options of each module have the same accuracy"),
    "accuracy above 1": (_option(accuracy=1.5), "accuracy is 1.5, not a number from 0 to 1"),
    "accuracy negative": (_option(accuracy=-1e308), "accuracy is -1e+308"),
    "accuracy a text": (_option(accuracy="a" * 100_000), "not a number from 0 to 1"),
    "bits huge": (_option(total_bits=10**290), "total_bits is 1000000"),
    "bits negative": (_option(total_bits=-1), "total_bits is -1, not a positive integer"),
    "bits of another model": (_option(total_bits=12345), "total_bits is 12345; the model's shapes give"),
    "width 7": (_params(bits=[7], bits_prop=[1], group_size={"7": 32}), "are not strictly falling members"),
    "shares beyond 1": (_params(bits_prop=[0.9, 0.9]), "bits_prop"),
    "share NaN": (_params(bits_prop=[float("nan"), 1]), "is NaN, which is not a JSON number"),
    "groups of 10^290": (_params(group_size={"3": 10**290, "2": 64}), "group_size"),
    "groups negative": (_params(group_size={b: -32 for b in "234568"}), "group_size"),
    "a long list of widths": (_params(bits=[4] * 100_000), "q_proj"),
    "options in a list": (_nested, "must be an object, is a list"),
    "no options": (_as_entry([]), "must be a non-empty list"),
    "an object for a list": (_as_entry({"0": {}}), "must be a non-empty list"),
    "a number for a list": (_as_entry(3), "must be a non-empty list"),
    "extra no object": (_extra([1]), "'exl2ray' must map entry keys to objects"),
    "index negative": (_index(-1), "'last_module_idx' is -1"),
    "index infinite": (_index(float("inf")), "is Infinity"),
    "an entry too many": (lambda m: m["measurement"].update({"\x1b[31m.mlp": m["measurement"][MLP]}), "1 entries are not"),
    "an entry too few": (lambda m: m["measurement"].pop(MLP), "1 modules are missing"),
    "another mode": (lambda m: m["measurement"].update({"a.b": None}), "the mode is not one of"),
    "nothing": (lambda m: m.clear(), "'measurement' is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("allocation", "case"), [*(("linear", c) for c in LINEAR), *(("module", c) for c in MODULE)])
def test_solve_refuses_it(allocation: str, case: str, model: Path, sound: Json, tmp_path: Path) -> None:
    change, words = (LINEAR if allocation == "linear" else MODULE)[case]
    spoiled = copy.deepcopy(sound)
    change(spoiled)
    (tmp_path / "m.json").write_text(json.dumps(spoiled))
    run = exl2ray("solve", "-i", model, "-m", tmp_path / "m.json", "-b", "4", "--allocation", allocation)
    run.ends_with(8, words, "m.json")
    assert len(run.err) < 3000
    assert "\x1b" not in run.err
    assert "Warning" not in run.text


@pytest.mark.parametrize("flags", [["--allocation", "linear"], []], ids=["asked for", "by default"])
@pytest.mark.parametrize("case", ["sensitivities 0", "loss negative", "a linear a text", "option of no form"])
def test_a_dry_run_refuses_it(case: str, flags: list[str], model: Path, sound: Json, tmp_path: Path) -> None:
    change, words = LINEAR[case]
    spoiled = copy.deepcopy(sound)
    change(spoiled)
    (tmp_path / "m.json").write_text(json.dumps(spoiled))
    run = exl2ray(
        "convert", "-i", model, "-o", tmp_path / "w", "-b", "4", "-m", tmp_path / "m.json", *flags,
        "--device", "cpu", "--executor", "inline", "-l", "128", "-ml", "128", "--dry-run",
    )  # fmt: skip
    run.ends_with(8, words, *([f"-m {tmp_path / 'm.json'}: "] if case != "sensitivities 0" else []))


@pytest.mark.parametrize("allocation", ["linear", "module"])
def test_bits_of_the_head_count_for_every_allocation(allocation: str, model: Path, sound: Json, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(sound))

    def solved(bits: str) -> Any:
        return exl2ray("solve", "-i", model, "-m", tmp_path / "m.json", "-b", "4", "--allocation", allocation, "-hb", bits)

    found = {bits: solved(bits).text.partition("in the decoder, ")[2].split()[0] for bits in ("3", "8")}
    assert 3 < float(found["3"]) < 4, found
    assert 8 < float(found["8"]) < 9, found
    solved("99").ends_with(2, "-hb 99: the head can have")


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "FIFO": (os.mkfifo, "a FIFO, not a regular file"),
    "of 1 TB": (lambda p: (p.touch(), os.truncate(p, 1 << 40)), "larger than"),
    "deep": (lambda p: p.write_text('{"measurement": ' + "[" * 1_000_000), "nested too deeply"),
    "key twice": (lambda p: p.write_text('{"measurement": {}, "measurement": {}}'), "appears twice"),
    "empty": (Path.touch, "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_measurement_is_named(case: str, model: Path, tmp_path: Path) -> None:
    make, words = FILES[case]
    make(tmp_path / "m.json")
    exl2ray("solve", "-i", model, "-m", tmp_path / "m.json", "-b", "4").ends_with(8, words)
