"""--quality: what it stands for, what it is stored as, and that its parts make better models of the same size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import assert_sound, contents, items, messages, recipe, run
from evaluation import evaluate
from tiny_models import write_model

from exl2ray.errors import FormatError, UsageError
from exl2ray.quality import PRESETS, Numerics, resolve
from exl2ray.recipe import Recipe

ALL = {"target_correction": 0.5, "scale_search": "feedback", "sweeps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", "Llama")


def weights(output: Path) -> dict[str, str]:
    """Digests of the shards: the model card tells the settings."""
    return {name: digest for name, digest in contents(output).items() if name.endswith(".safetensors")}


def divergence(model: Path, output: Path) -> float:
    ids = torch.randint(3, 250, (8, 128), generator=torch.Generator().manual_seed(1))
    kl = evaluate(output, model, ids, "cpu").kl
    assert kl is not None
    return kl.value


def test_presets() -> None:
    assert set(PRESETS) == {"reference", "balanced", "best"}
    assert PRESETS["reference"] == Numerics() == resolve("reference", "quantized")
    assert PRESETS["reference"].describe() == ""
    for name in ("balanced", "best"):
        assert PRESETS[name] != Numerics()  # type: ignore[index]
        assert PRESETS[name].describe()  # type: ignore[index]
    assert PRESETS["best"] == PRESETS["balanced"]  # it is tuned afterwards
    assert resolve("best", "quantized", sweeps=0).sweeps == 0
    assert resolve("best", "reference").target_correction == 0
    assert resolve("reference", "quantized", 0.3, "feedback", 1) == Numerics(0.3, "feedback", 1)


def test_the_job_tells_what_was_asked_for_and_what_it_means() -> None:
    job = Recipe("m", "w", quality="balanced", sweeps=1).job({}, None)["quantize"]
    assert (job["quality"], job["sweeps"], job["target_correction"]) == ("balanced", 1, None)
    assert job["numerics"]["sweeps"] == 1
    assert job["numerics"]["target_correction"] == PRESETS["balanced"].target_correction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": "good"}, "--quality good: one of reference, balanced, best"),
        ({"scale_search": "luck"}, "--scale-search luck: one of error, feedback"),
        ({"target_correction": 1.5}, "--target-correction 1.5: "),
        ({"target_correction": float("nan")}, "--target-correction nan: "),
        ({"target_correction": 0.5, "propagate": "reference"}, "--target-correction 0.5 needs the states"),
        ({"sweeps": -1}, "--sweeps -1: "),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe("m", "w", **changes)


def test_every_part_of_a_preset_can_be_named(model: Path, tmp_path: Path) -> None:
    """A preset with all of its parts taken back is the plain algorithm."""
    run(model, tmp_path / "a", compile_full=str(tmp_path / "out-a"))
    named = {"quality": "balanced", "target_correction": 0.0, "scale_search": "error", "sweeps": 0, "allocation": "module"}
    _, reporter = run(model, tmp_path / "b", compile_full=str(tmp_path / "out-b"), **named)
    assert weights(tmp_path / "out-a") == weights(tmp_path / "out-b")
    assert "quality balanced: options chosen per module" in messages(reporter, "note")


def test_balanced_is_the_default() -> None:
    recipe = Recipe("m", "w")
    assert recipe.quality == "balanced"
    assert recipe.numerics == PRESETS["balanced"]
    assert recipe.allocates == "linear"
    assert Recipe("m", "w", quality="reference").allocates == "module"
    assert Recipe("m", "w", allocation="module").numerics == PRESETS["balanced"]


def test_a_measurement_of_another_program_is_allocated_per_module(model: Path, tmp_path: Path) -> None:
    """The reference's files hold no sensitivities: -m goes on with what there is, unless --allocation linear is given."""
    run(model, tmp_path / "a", output_measurement=str(tmp_path / "m.json"))
    given = {"measurement": str(tmp_path / "m.json"), "quality": "balanced", "compile_full": str(tmp_path / "out")}
    _, reporter = run(model, tmp_path / "b", **given)
    assert "-m holds no sensitivities: options are chosen per module" in messages(reporter, "note")
    with pytest.raises(FormatError, match="no "):
        run(model, tmp_path / "c", **given, allocation="linear")


def test_better_models_of_the_same_size(model: Path, tmp_path: Path) -> None:
    """Each part changes the weights and no size; together they bring the model closer to its source."""
    work, found, sizes = tmp_path / "work", {}, set()
    variants: dict[str, dict[str, Any]] = {"plain": {}, "all": ALL, **{k: {k: v} for k, v in ALL.items()}}
    for name, changes in variants.items():
        out = tmp_path / name
        _, reporter = run(model, work, bits=(3.8,), reuse=True, compile_full=str(out), dataset_rows=40, **changes)
        assert bool([i for i in items(reporter) if i.startswith("measure")]) == (name == "plain")
        assert_sound(model, out)
        sizes.add(sum(p.stat().st_size for p in out.glob("*.safetensors")))
        found[name] = divergence(model, out)
    assert len(sizes) == 1
    assert len(set(found.values())) == len(found)
    assert found["all"] < 0.95 * found["plain"], found
    assert found["target_correction"] < found["plain"], found


def test_reruns_and_resumes_keep_to_the_settings(model: Path, tmp_path: Path) -> None:
    settings = {"compile_full": str(tmp_path / "out"), "quality": "balanced"}
    run(model, tmp_path / "work", **settings)
    before = weights(tmp_path / "out")
    _, reporter = run(model, tmp_path / "work", **settings)
    assert items(reporter) == []
    assert weights(tmp_path / "out") == before
    again = tmp_path / "again"
    run(model, again, **{**settings, "compile_full": str(tmp_path / "out2"), "checkpoint_seconds": 0.0})
    assert weights(tmp_path / "out2") == before
    _, reporter = run(model, again, **{**settings, "compile_full": str(tmp_path / "out2"), "reuse": True, "sweeps": 0})
    assert len(items(reporter)) == 5  # nothing quantised is taken over, the measurement is
    assert weights(tmp_path / "out2") != before


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere", "Mixtral", "Phi3"])
def test_other_architectures(family: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", family, num_hidden_layers=1)
    run(source, tmp_path / "work", compile_full=str(tmp_path / "out"), **ALL)
    assert_sound(source, tmp_path / "out")
    assert divergence(source, tmp_path / "out") < 1


def test_reference_states_keep_their_targets(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "work", compile_full=str(tmp_path / "out"), quality="balanced", propagate="reference")
    assert_sound(model, tmp_path / "out")
    assert recipe(model, tmp_path / "work", quality="balanced", propagate="reference").numerics.sweeps > 0
