"""Bitrates that no row of the option tables reaches: refused with the nearest that works, or made of pure 2 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_helpers import assert_sound, messages, recipe, run
from tiny_models import write_model

import exl2ray.transformers  # noqa: F401  # the plugin that lets transformers load the output
from exl2ray.allocation.knapsack import reachable_range
from exl2ray.allocation.planning import allocate, allocate_linears, linear_groups, option_bits, within_reach
from exl2ray.commands.allocations import solve
from exl2ray.evaluate.forward import run_model
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.measurement import read_measurement
from exl2ray.model.arch import load_spec


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, wide enough for groups of more than 128 rows."""
    return write_model(tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=640, num_hidden_layers=1)


@pytest.mark.parametrize("allocation", ["linear", "module"])
def test_the_nearest_bitrate_is_taken_and_its_model_loads_everywhere(wide: Path, tmp_path: Path, allocation: str) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "{bpw}"
    settings = {"allocation": allocation, "nearest": True, "head_bits": 8, "compile_full": str(out)}
    summary, reporter = run(wide, tmp_path / "work", bits=(2.0, 2.2), **settings)
    assert "-b 2 is out of reach of this model: --nearest takes 2.117" in messages(reporter, "note")
    assert [o.bits for o in summary.outputs] == [2.117, 2.2]
    for output in summary.outputs:
        assert_sound(wide, Path(str(output.directory)))
        assert output.bits - 0.1 < output.achieved_bpw <= output.bits
    low = Path(str(summary.outputs[0].directory))
    packed = Exl2Model(low)
    layouts = {x.key: packed.linear(x.key).layout for x in load_spec(SourceModel(wide)).linears if "layers" in x.key}
    assert {b for x in layouts.values() for b in x.bits} == {2}
    assert max(n for x in layouts.values() for n in x.rows) >= 256
    ids = torch.randint(3, 259, (2, 48), generator=torch.Generator().manual_seed(0))
    ours = run_model(low, ids, "cpu").logits(slice(None), slice(None))
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(low, dtype=torch.float32)(ids).logits
    assert torch.allclose(ours, theirs.float(), atol=1e-3)

    spec, measurement = load_spec(SourceModel(wide)), read_measurement(tmp_path / "work" / "measurement.json")
    assert max(len(options) for p in measurement.profiles for options in p.slots()) == 19, "the low ones are not measured"
    (solution,) = solve(str(wide), str(tmp_path / "work" / "measurement.json"), [2.2], "squared", 2.0, allocation, 8)
    assert solution.achieved_bpw == pytest.approx(summary.outputs[1].achieved_bpw)
    floor = reachable_range([s for m in spec.modules for s in option_bits(m)])[0]
    if allocation == "module":
        usual = allocate(spec, measurement, floor)[1]
    else:
        usual = allocate_linears(spec, linear_groups(spec, measurement), floor)[1]
    assert not any(max(q.group_sizes) > 128 for q in usual.values()), "what the tables reach is as it always was"


def test_nearest_says_nothing_where_nothing_is_asked(wide: Path, tmp_path: Path) -> None:
    asked = recipe(wide, tmp_path, bits=(2.0, 2.05), nearest=True)
    assert within_reach(asked)[0].bits == (2.117,), "two that become the same are one"
    assert within_reach(recipe(wide, tmp_path, bits=(2.0,))) == (recipe(wide, tmp_path, bits=(2.0,)), [])
    (wide.parent / "none").mkdir()
    (wide.parent / "none" / "config.json").write_text(json.dumps({}))
    broken = recipe(wide.parent / "none", tmp_path, bits=(2.0,), nearest=True)
    assert within_reach(broken) == (broken, []), "the checks of a conversion say what is wrong"
