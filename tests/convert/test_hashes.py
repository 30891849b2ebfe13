"""What the inputs hashes of records depend on: every setting that matters to a result, and no other.

The hashes are those under which a job, on its way through its steps, looks for what is done already.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import Quiet, calibration_file, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import write_model

from exl2ray.allocation.frontier import all_options
from exl2ray.events import Silent
from exl2ray.formats.measurement import Measurement, read_measurement
from exl2ray.quant.qparams import attention_options, mlp_options
from exl2ray.recipe import Recipe
from exl2ray.steps import Job, rows_hash
from exl2ray.steps.allocating import allocate, plan_hashes
from exl2ray.steps.measuring import measure, with_sensitivities
from exl2ray.store.records import canonical_json, hash_inputs

CALIBRATION, MEASURE, SENSITIVITY, QUANTIZE = "calibration", "measure", "sensitivity", "quantize"
ALL = {CALIBRATION, MEASURE, SENSITIVITY, QUANTIZE}


class Reached(Exception):
    """The job needs workers: it has looked for everything that it could have found."""


@dataclass(frozen=True)
class Hashes:
    """Kind -> key -> inputs hash."""

    by_kind: dict[str, dict[str, str]]

    def changed(self, other: Hashes) -> set[str]:
        """Kinds with another hash for a key that both have."""
        pairs = ((kind, key) for kind, found in self.by_kind.items() for key in found)
        return {k for k, key in pairs if other.by_kind[k].get(key, self.by_kind[k][key]) != self.by_kind[k][key]}


def hashes_of(wanted: Recipe, measured: Measurement, monkeypatch: pytest.MonkeyPatch) -> Hashes:
    """Hashes of a new job. ``measured``: a measurement without sensitivities, for the allocation per module."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in ALL}
    with monkeypatch.context() as patch, Job(wanted, Silent()) as job:
        found[CALIBRATION] = {"rows": job.calibration_sha256}

        def find(kind: str, key: str, inputs_hash: str) -> None:
            found[SENSITIVITY if key.startswith("sensitivity-") else MEASURE][key] = inputs_hash

        def workers(self: Job) -> None:
            raise Reached

        patch.setattr(job.work.records, "find", find)
        patch.setattr(Job, "workers", property(workers))
        with pytest.raises(Reached):
            measure(job)
        job.recipe = replace(wanted, allocation="linear")
        with pytest.raises(Reached):
            with_sensitivities(job, measured)
        job.recipe = replace(wanted, allocation="module", score_rows=None)
        plan = allocate(job, measured, wanted.bits[0])
        found[QUANTIZE] = {m.profile_key: h for m, h in zip(job.spec.modules, plan.hashes, strict=True)}
    return Hashes(found)


@pytest.fixture(scope="module")
def measured(quiet: Quiet) -> Measurement:
    return read_measurement(quiet.work / "measurement.json")


@pytest.fixture(scope="module")
def usual(quiet: Quiet, measured: Measurement, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hashes]:
    with pytest.MonkeyPatch.context() as patch:
        yield hashes_of(recipe(quiet.model, tmp_path_factory.mktemp("usual") / "work"), measured, patch)


# Settings of a recipe -> kinds of records that they change. The usual rows: 5 x 128 and 8 x 128 tokens of one file.
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"bits": (5.0,)}, {QUANTIZE}),
    ({"bits": (4.0, 5.0)}, set()),
    ({"head_bits": 4}, {QUANTIZE}),
    ({"overrides": ("*.1.*v_proj=8",)}, {QUANTIZE}),
    ({"dataset_rows": 9}, {CALIBRATION, QUANTIZE}),
    ({"length": 256, "dataset_rows": 5}, {CALIBRATION, QUANTIZE}),
    ({"length": 256, "dataset_rows": 4}, {CALIBRATION, QUANTIZE}),  # the same tokens, cut in another way
    ({"measurement_rows": 6}, ALL),  # the perplexities of quantised models are of these rows
    ({"measurement_length": 160, "measurement_rows": 4}, ALL),  # the same tokens, cut in another way
    ({"seed": 7}, set()),  # text of one's own is taken as it is
    ({"chat_rows": False}, set()),
    ({"cal_dataset": None}, ALL),
    ({"cal_dataset": None, "seed": 7}, ALL),
    ({"builtin_text": "all"}, set()),
    ({"rope_alpha": 2.0}, {MEASURE, SENSITIVITY, QUANTIZE}),
    ({"rope_scale": 2.0}, {MEASURE, SENSITIVITY, QUANTIZE}),
    ({"rotate": True}, {MEASURE, SENSITIVITY, QUANTIZE}),
    ({"damping": 0.2}, {MEASURE, QUANTIZE}),
    ({"allocation": "linear"}, {MEASURE}),  # scores of a few rows
    ({"allocation": "linear", "score_rows": 2}, {MEASURE}),
    ({"propagate": "reference"}, {QUANTIZE}),
    ({"target_correction": 0.3}, {QUANTIZE}),
    ({"scale_search": "feedback"}, {QUANTIZE}),
    ({"sweeps": 1}, {QUANTIZE}),
    ({"quality": "balanced"}, {MEASURE, QUANTIZE}),
    ({"moe_all_experts": True}, set()),  # the model has none
    ({"gpus": 1, "checkpoint_seconds": 0.0, "executor": "auto", "evaluate": "always", "reuse": True}, set()),
    ({"shard_size": 1, "compile_full": "out"}, set()),
]


@pytest.mark.parametrize(("changes", "expected"), CHANGES, ids=[", ".join(c) or "none" for c, _ in CHANGES])
def test_settings(
    changes: dict[str, Any], expected: set[str], quiet: Quiet, usual: Hashes, measured: Measurement, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "compile_full" in changes:
        changes = {**changes, "compile_full": str(tmp_path / "out")}
    found = hashes_of(recipe(quiet.model, tmp_path / "work", **changes), measured, monkeypatch)
    assert usual.changed(found) == expected


def test_every_setting_is_among_them() -> None:
    """A new field of Recipe has to be thought about here."""
    elsewhere = {"in_dir", "out_dir", "measurement", "output_measurement", "no_resume", "device", "ray_address",
                 "objective", "objective_power", "eval_text", "source_cache", "tune", "tune_text", "nearest"}  # fmt: skip
    assert {name for changes, _ in CHANGES for name in changes} | elsewhere == {f.name for f in fields(Recipe)}


def test_builtin_rows_depend_on_the_seed(quiet: Quiet, measured: Measurement, tmp_path: Path, monkeypatch: Any) -> None:
    found = [
        hashes_of(recipe(quiet.model, tmp_path / f"{s}", cal_dataset=None, seed=s), measured, monkeypatch) for s in (0, 1)
    ]
    assert found[0].changed(found[1]) == ALL


def test_places_do_not_matter_and_contents_do(
    quiet: Quiet, usual: Hashes, measured: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(quiet.model, tmp_path / "elsewhere"))
    data = shutil.copy(calibration_file(), tmp_path / "other.jsonl")
    found = hashes_of(recipe(model, tmp_path / "a", cal_dataset=str(data)), measured, monkeypatch)
    assert usual.changed(found) == set()
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    found = hashes_of(recipe(model, tmp_path / "b", cal_dataset=str(data)), measured, monkeypatch)
    assert usual.changed(found) == ALL - {CALIBRATION}


def test_all_experts_matter_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model", "Mixtral")
    found = []
    for flag in (False, True):
        wanted = recipe(model, tmp_path / f"{flag}", moe_all_experts=flag)
        with monkeypatch.context() as patch, Job(wanted, Silent()) as job:
            seen: dict[str, str] = {}
            patch.setattr(job.work.records, "find", lambda kind, key, h, seen=seen: seen.update({key: h}))
            patch.setattr(Job, "workers", property(lambda self: (_ for _ in ()).throw(Reached())))
            with pytest.raises(Reached):
                measure(job)
            params = {x.key: attention_options()[0][0] for x in job.spec.linears}
            found.append((seen, plan_hashes(job, params)))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(found[0][0][key] != h for key, h in found[1][0].items())
    assert not set(found[0][1]) & set(found[1][1])


# ---- chains of modules ------------------------------------------------------------------------------------------------

OPTIONS = sorted({q for row in (*attention_options(), *mlp_options(True)) for q in row}, key=lambda q: q.desc)


@pytest.fixture(scope="module")
def job(quiet: Quiet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with Job(recipe(quiet.model, tmp_path_factory.mktemp("job") / "work"), Silent()) as job:
        yield job


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_option_changes_its_module_and_all_after_it(job: Job, data: st.DataObject) -> None:
    """And nothing before it, so that what is quantised already stays; the order of the choices says nothing."""
    params = {x.key: data.draw(st.sampled_from(OPTIONS)) for x in job.spec.linears}
    before = plan_hashes(job, params)
    shuffled = dict(data.draw(st.permutations(list(params.items()))))
    assert plan_hashes(job, shuffled) == before
    linear = data.draw(st.sampled_from(job.spec.linears))
    option = data.draw(st.sampled_from([q for q in OPTIONS if q != params[linear.key]]))
    after = plan_hashes(job, {**params, linear.key: option})
    index = next(m.index for m in job.spec.modules if any(x.key == linear.key for x in m.linears))
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < index for i in range(len(before))]
    assert len(set(before)) == len(before)


def test_options_have_names_of_their_own() -> None:
    """Hashes know an option by its name."""
    options = {*all_options(), *OPTIONS}
    assert len({q.desc for q in options}) == len(options)


# ---- values -----------------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(-1, 3), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(IDS, IDS, st.integers(1, 4), st.integers(1, 4))
def test_rows_are_told_apart_by_shape_and_content(a: list[int], b: list[int], m: int, n: int) -> None:
    rows = [torch.tensor(x)[: len(x) // k * k].reshape(k, -1) for x, k in ((a, m), (b, n))]
    assert (rows_hash(rows[0]) == rows_hash(rows[1])) == torch.equal(*rows)
    assert rows_hash(rows[0].T.contiguous().T) == rows_hash(rows[0])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: shuffled(v) for k, v in reversed(value.items())}
    return tuple(map(shuffled, value)) if isinstance(value, list) else value


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_equal_values_and_no_others_have_equal_hashes(a: Any, b: Any) -> None:
    assert hash_inputs(x=a) == hash_inputs(x=shuffled(a))
    assert (hash_inputs(x=a) == hash_inputs(x=b)) == (canonical_json(a) == canonical_json(b))
    assert hash_inputs(x=a, y=b) == hash_inputs(y=b, x=a)
    if repr(a) != repr(b) and a != b:
        assert hash_inputs(x=a) != hash_inputs(x=b)
    assert hash_inputs(x=1) != hash_inputs(x=1.0) != hash_inputs(x=True)
