"""What a resume takes from the job of its work directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import stored_job
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.errors import StoreError, UsageError
from exl2ray.publish import base_model
from exl2ray.recipe import HEAD_BITS, SETTINGS, Recipe
from exl2ray.store.workdir import WorkDir
from exl2ray.terminal.flags import stored_settings


def make_job(recipe: Recipe, **identity: object) -> None:
    job = stored_job(recipe, **identity)
    WorkDir.create_or_resume(recipe.out_dir, job, resume=True, versions={}).close()


def test_a_resume_from_another_folder_writes_where_the_job_was_to(run, fake, job_args, tmp_path, monkeypatch):
    """The model came to lie in a folder of that name below the other one."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_job(Recipe(in_dir=job_args[1], out_dir=job_args[3], bits=(3.0,), compile_full="out/{bpw}"))
    monkeypatch.chdir(tmp_path / "there")
    assert run("convert", "-o", job_args[3]).exit_code == 0
    assert fake.recipes[0].output_dir(3.0) == str(tmp_path / "here" / "out" / "3.0")


def test_a_resume_from_another_folder_tunes_on_the_text_of_the_job(run, fake, job_args, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = ("texts/a.parquet:body", "builtin", "self:64k", "hf://owner/name", "/b.txt")
    make_job(Recipe(job_args[1], job_args[3], bits=(3.0,), compile_full="out/{bpw}", tune="1M", tune_text=text))
    monkeypatch.chdir(tmp_path)
    assert run("convert", "-o", job_args[3]).exit_code == 0
    assert fake.recipes[0].tune_text == (str(tmp_path / "here" / text[0]), *text[1:])


def test_resume_needs_only_the_work_directory(run, fake, job_args, tmp_path):
    (tmp_path / "m.json").write_bytes(b"")
    stored = Recipe(
        in_dir=job_args[1],
        out_dir=job_args[3],
        bits=(3.0, 5.5),
        head_bits=8,
        compile_full=str(tmp_path / "out" / "{bpw}"),
        length=1024,
        measurement=str(tmp_path / "m.json"),
        rope_alpha=2.0,
        propagate="reference",
        seed=3,
        chat_rows=False,
        shard_size=0,
    )
    make_job(stored)
    assert run("convert", "-o", job_args[3]).exit_code == 0
    assert fake.recipes == [stored]
    assert run("convert", "-o", job_args[3], "--bits", "4", "--reuse", "--device", "cpu").exit_code == 0
    assert fake.recipes[1] == replace(stored, bits=(4.0,), reuse=True, device="cpu")
    # the default, given on the command line, counts as given
    assert run("convert", "-o", job_args[3], "-hb", "6").exit_code == 0
    assert fake.recipes[2] == replace(stored, head_bits=6)
    # with -i the command line stands alone
    assert run("convert", *job_args).exit_code == 0
    assert fake.recipes[3] == Recipe(in_dir=job_args[1], out_dir=job_args[3])


BEGUN = {
    "nearest": True, "source_cache": "1GB", "device": "cpu", "gpus": 2, "ray_address": "auto", "executor": "ray",
    "score_rows": 3, "evaluate": "always", "eval_text": "text.txt", "checkpoint_seconds": 5.0,
}  # fmt: skip
COMMANDS = {"in_dir", "out_dir", "no_resume", "reuse"}  # of which job, and what is to become of it


def test_every_field_comes_back_with_the_work_directory():
    """What is made is hashed, how it is made is remembered; -c has its own way, as there may be several."""
    assert {n for n, s in SETTINGS.items() if s.kept} == {*BEGUN, "output_measurement"}
    assert {n for n, s in SETTINGS.items() if not s.job and not s.kept} <= {*COMMANDS, "cal_dataset"}


@pytest.mark.parametrize("flags", [[], ["-nr"]], ids=str)
def test_how_a_job_was_begun_comes_back_too(run, fake, job_args, monkeypatch, tmp_path, flags):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    stored = Recipe(in_dir=job_args[1], out_dir=job_args[3], **BEGUN)
    make_job(stored)
    wanted = replace(stored, no_resume=bool(flags), eval_text=str(tmp_path / "text.txt"))
    monkeypatch.chdir("/")
    result = run("convert", "-o", job_args[3], *flags)
    assert result.exit_code == 0
    assert fake.recipes == [wanted]
    said = "--nearest --source-cache 1GB --device cpu --gpus 2 --ray-address auto --executor ray --score-rows 3"
    assert f"from the job, as it was run before: {said} --evaluate always" in " ".join(result.output.split())
    other = ["--evaluate", "never", "--device", "auto", "--executor", "auto", "--score-rows", "2"]
    assert run("convert", "-o", job_args[3], *flags, *other).exit_code == 0
    assert fake.recipes[1] == replace(wanted, evaluate="never", device="auto", executor="auto", score_rows=2)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert run("convert", "-o", job_args[3], *flags, "--allocation", "module").exit_code == 0
    assert fake.recipes[2] == replace(wanted, ray_address=None, allocation="module", score_rows=None)
    assert "from the job" not in run("convert", *job_args, "--device", "cpu").output


def test_how_a_job_is_run_is_compared_with_nothing(job_args):
    before = Recipe(in_dir=job_args[1], out_dir=job_args[3], **BEGUN)
    make_job(before)
    make_job(replace(before, evaluate="never", gpus=None))
    found = WorkDir.read_job(job_args[3]).job["output"]["run"]
    assert "gpus" not in found
    assert found["evaluate"] == "never"
    make_job(Recipe(in_dir=job_args[1], out_dir=job_args[3]))
    assert "run" not in WorkDir.read_job(job_args[3]).job["output"]


def test_where_a_measurement_goes_comes_back(run, fake, job_args, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    place, own = str(tmp_path / "m.json"), f"{job_args[3]}/measurement.json"
    make_job(Recipe(in_dir=job_args[1], out_dir=job_args[3], output_measurement="m.json"))
    for command in ("measure", "convert"):
        assert run(command, "-o", job_args[3]).exit_code == 0
        assert fake.recipes[-1].output_measurement == place
    assert run("measure", "-o", job_args[3], "-om", "other.json").exit_code == 0
    assert fake.recipes[-1].output_measurement == "other.json"
    for flags in (["-b", "4"], ["-cf", "out"]):  # the measurement is gone on with
        assert run("convert", "-o", job_args[3], *flags).exit_code == 0
        assert fake.recipes[-1].output_measurement is None
    make_job(Recipe(in_dir=job_args[1], out_dir=job_args[3], output_measurement=own))
    assert run("convert", "-o", job_args[3]).exit_code == 0
    assert fake.recipes[-1].output_measurement is None
    assert run("measure", "-o", job_args[3]).exit_code == 0
    assert fake.recipes[-1].output_measurement == own


@pytest.mark.parametrize(
    ("entry", "says"),
    [([1], "output.run is (1,); a mapping is needed"), ({"device": 3}, "output.run.device is 3; a text is needed"),
     ({"score_rows": "x"}, "output.run.score_rows is 'x'; a whole number or null is needed")],
)  # fmt: skip
def test_a_job_that_remembers_something_else_is_damaged(run, fake, job_args, entry, says):
    recipe = Recipe(in_dir=job_args[1], out_dir=job_args[3])
    job = stored_job(recipe)
    job["output"]["run"] = entry
    WorkDir.create_or_resume(recipe.out_dir, job, resume=True, versions={}).close()
    result = run("convert", "-o", job_args[3])
    assert result.exit_code == 7
    assert says in result.stderr
    assert "hint: job.json is damaged" in result.stderr


def test_resume_of_a_measurement(run, fake, job_args):
    make_job(Recipe(in_dir=job_args[1], out_dir=job_args[3], measurement_length=512, seed=7))
    assert run("measure", "-o", job_args[3]).exit_code == 0
    assert (fake.recipes[0].measurement_length, fake.recipes[0].seed) == (512, 7)


def test_resume_with_calibration_data_of_its_own(run, fake, job_args, tmp_path):
    data = tmp_path / "data.parquet"
    data.write_bytes(b"")
    stored = Recipe(in_dir=job_args[1], out_dir=job_args[3], cal_dataset=str(data), dataset_rows=9, measurement_rows=2)
    make_job(stored)
    result = run("convert", "-o", job_args[3])
    assert result.exit_code == 2
    assert "-c" in result.stderr
    assert run("convert", "-o", job_args[3], "-c", str(data)).exit_code == 0
    assert fake.recipes == [stored]


def test_resume_finds_calibration_data_that_the_job_names(run, fake, job_args, tmp_path):
    data = tmp_path / "data.parquet"
    data.write_bytes(b"")
    stored = Recipe(in_dir=job_args[1], out_dir=job_args[3], cal_dataset=str(data))
    make_job(stored, cal_dataset=str(data))
    assert run("convert", "-o", job_args[3]).exit_code == 0
    assert fake.recipes == [stored]


def test_nothing_to_resume(run, fake, job_args, tmp_path):
    result = run("convert", "-o", str(tmp_path / "new"))
    assert result.exit_code == 2
    assert "-i is missing" in result.stderr
    assert not (tmp_path / "new").exists()
    assert run("convert").exit_code == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    assert run("convert", "-o", str(tmp_path / "other")).exit_code == StoreError.exit_code
    make_job(Recipe(in_dir=str(tmp_path / "moved"), out_dir=job_args[3]))
    result = run("convert", "-o", job_args[3])
    assert result.exit_code == 2
    assert str(tmp_path / "moved") in result.stderr
    assert fake.recipes == []


def test_a_job_without_a_place_of_its_model(tmp_path):
    make_job(Recipe(in_dir="m", out_dir=str(tmp_path)), in_dir=None)
    with pytest.raises(UsageError, match="-i is missing"):
        stored_settings(str(tmp_path))


def test_every_stored_setting_exists_in_a_job():
    tuned = {"compile_full": "o", "tune": "1M", "tune_text": "t", "builtin_text": "all"}
    job = stored_job(Recipe(in_dir="m", out_dir="w", overrides=("*.v_proj=6",), rotate=True, score_rows=2, **tuned))
    for setting in SETTINGS.values():
        for section, name in (entry.split(".") for entry in setting.job):
            assert name in job[section]


@settings(max_examples=15, deadline=None)
@given(
    bits=st.lists(st.floats(2, 9), min_size=1, max_size=3, unique=True),
    head_bits=st.sampled_from(HEAD_BITS),
    length=st.integers(1, 20).map(lambda n: 128 * n),
    rope_scale=st.none() | st.floats(0.1, 8),
    seed=st.integers(0, 9),
    chat_rows=st.booleans(),
    objective=st.sampled_from(["squared", "norm", "product"]),
    damping=st.floats(0.01, 1),
)
def test_a_resumed_job_is_the_stored_one(tmp_path_factory: pytest.TempPathFactory, **chosen):
    root: Path = tmp_path_factory.mktemp("job")
    recipe = Recipe(in_dir="m", out_dir=str(root), **{**chosen, "bits": tuple(chosen["bits"])})
    make_job(recipe)
    again = Recipe(out_dir=str(root), **stored_settings(str(root)))
    assert stored_job(again) == stored_job(recipe)


CARDS = (
    {}, {"head_bits": 6}, {"head_bits": 8}, {"quality": "reference"}, {"quality": "reference", "head_bits": 6},
    {"quality": "reference", "head_bits": 4}, {"allocation": "module"}, {"allocation": "linear", "head_bits": 6},
    {"dataset_rows": 7, "measurement_rows": 3}, {"cal_dataset": "d.parquet", "dataset_rows": 7}, {"cal_dataset": ("a", "b")},
    {"measurement": "m.json"}, {"shard_size": 0}, {"sweeps": 2, "target_correction": 0.5}, {"rotate": True, "seed": 5},
    {"objective": "norm", "objective_power": 3.0}, {"overrides": ("*.v_proj=6", "*=4")}, {"bits": (3.0, 4.0)},
    {"chat_rows": False, "moe_all_experts": True, "rope_scale": 2.0, "propagate": "reference"},
)  # fmt: skip


@pytest.mark.parametrize("changes", CARDS, ids=str)
def test_a_resume_has_the_same_card(changes, job_args):
    """Else a finished job would write it anew, in turn with -o alone and with all flags."""
    asked = Recipe(in_dir=job_args[1], out_dir=job_args[3], **changes)
    places = list(asked.calibration_data)
    make_job(asked, **({"cal_dataset": places[0] if len(places) == 1 else places} if places else {}))
    resumed = Recipe(**{"out_dir": job_args[3], **stored_settings(job_args[3])})
    assert base_model.command(resumed, 4.0, None) == base_model.command(asked, 4.0, None)
    assert base_model.settings(resumed) == base_model.settings(asked)
