"""Flags of the recipe: spelling, defaults, what a resume takes from the work directory."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import click
import pytest
from cli_helpers import stored_job
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.cli import cli
from exl2ray.errors import StoreError, UsageError
from exl2ray.publish import base_model
from exl2ray.recipe import HEAD_BITS, SECTIONS, SETTINGS, Recipe
from exl2ray.store.workdir import WorkDir
from exl2ray.terminal.flags import CONVERT_ONLY, MEASURE_FIELDS, stored_settings

# Short and long flags of the reference converter.
REFERENCE = {
    "in_dir": ("-i", "--in_dir"),
    "out_dir": ("-o", "--out_dir"),
    "no_resume": ("-nr", "--no_resume"),
    "compile_full": ("-cf", "--compile_full"),
    "output_measurement": ("-om", "--output_measurement"),
    "measurement": ("-m", "--measurement"),
    "cal_dataset": ("-c", "--cal_dataset"),
    "length": ("-l", "--length"),
    "dataset_rows": ("-r", "--dataset_rows"),
    "measurement_length": ("-ml", "--measurement_length"),
    "measurement_rows": ("-mr", "--measurement_rows"),
    "bits": ("-b", "--bits"),
    "head_bits": ("-hb", "--head_bits"),
    "shard_size": ("-ss", "--shard_size"),
    "rope_alpha": ("-ra", "--rope_alpha"),
    "rope_scale": ("-rs", "--rope_scale"),
}
VALUES = {
    "compile_full": "out",
    "length": "1024",
    "dataset_rows": "7",
    "measurement_length": "512",
    "measurement_rows": "3",
    "bits": "3.5",
    "head_bits": "8",
    "shard_size": "0",
    "rope_alpha": "2.5",
    "rope_scale": "4",
}


def test_every_field_is_a_flag_with_help_and_the_recipes_default():
    params = {p.name: p for p in cli.commands["convert"].params}
    for field in fields(Recipe):
        option = params[field.name]
        assert isinstance(option, click.Option)
        assert option.help == SETTINGS[field.name].help
        assert option.help
        assert SETTINGS[field.name].flag in option.opts


def test_defaults_are_those_of_the_recipe(run, fake, job_args):
    assert run("convert", *job_args).exit_code == 0
    assert fake.recipes == [Recipe(in_dir=job_args[1], out_dir=job_args[3])]


def test_sections_of_the_help_hold_every_field_once():
    help_text = CliRunner().invoke(cli.commands["convert"], ["--help"]).output
    for title in SECTIONS:
        assert f"\n{title}:\n" in help_text
    for setting in SETTINGS.values():
        assert setting.section in SECTIONS
        assert len(re.findall(rf"^  (-\w+, )?{setting.long}\b(?!-)", help_text, re.MULTILINE)) == 1, setting.name
    assert sorted([*CONVERT_ONLY, *MEASURE_FIELDS]) == sorted(SETTINGS)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("spelling", ["short", "underscores", "dashes", "equals"])
def test_flags_of_the_reference(run, fake, job_args, name, spelling):
    short, long = REFERENCE[name]
    flag = {"short": short, "underscores": long, "dashes": "--" + long[2:].replace("_", "-"), "equals": long}[spelling]
    value = VALUES[name]
    given = [f"{flag}={value}"] if spelling == "equals" else [flag, value]
    result = run("convert", *job_args, *given)
    assert result.exit_code == 0, result.stderr
    plain = Recipe(in_dir=job_args[1], out_dir=job_args[3])
    kind = type(getattr(plain, name)) if getattr(plain, name) is not None else {"compile_full": str}.get(name, float)
    wanted = (float(value),) if name == "bits" else kind(value)
    assert fake.recipes == [replace(plain, **{name: wanted})]


@pytest.mark.parametrize("flag", ["-nr", "--no_resume", "--no-resume"])
def test_no_resume(run, fake, job_args, flag):
    assert run("convert", *job_args, flag).exit_code == 0
    assert fake.recipes[0].no_resume


def test_paths_that_must_exist(run, fake, job_args, tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"")
    (tmp_path / "m.json").write_bytes(b"")
    args = ["--cal_dataset", str(tmp_path / "data.parquet"), "--measurement", str(tmp_path / "m.json")]
    assert run("convert", *job_args, *args).exit_code == 0
    assert (fake.recipes[0].cal_dataset, fake.recipes[0].measurement) == (args[1], args[3])
    for flag, short in (("--cal_dataset", "-c"), ("--measurement", "-m")):
        result = run("convert", *job_args, flag, str(tmp_path / "nowhere"))
        assert result.exit_code == 2
        assert f"{short} {tmp_path / 'nowhere'}: does not exist" in result.stderr
    result = run("convert", "-i", str(tmp_path / "nowhere"), "-o", "w")
    assert result.exit_code == 2
    assert "-i " in result.stderr
    assert len(fake.recipes) == 1


def test_bits_may_be_repeated_and_glued(run, fake, job_args):
    assert run("convert", *job_args, "-b", "4", "-b3.5", "-cf", "out/{bpw}").exit_code == 0
    assert fake.recipes[0].bits == (4.0, 3.5)
    assert fake.recipes[0].output_dir(3.5) == "out/3.5"


def test_other_flags(run, fake, job_args):
    flags = ["--no_chat_rows", "--device", "cpu", "--gpus", "2", "--ray_address", "auto", "--propagate", "reference"]
    assert run("convert", *job_args, *flags, "-res").exit_code == 0
    recipe = fake.recipes[0]
    assert (recipe.chat_rows, recipe.device, recipe.gpus) == (False, "cpu", 2)
    assert (recipe.ray_address, recipe.propagate) == ("auto", "reference")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-b", "1"], "-b 1:"),
        (["-b", "4", "-b", "4"], "given twice"),
        (["-b", "4", "-b", "3", "-cf", "x"], "{bpw}"),
        (["-hb", "7"], "-hb 7"),
        (["-l", "100"], "-l 100"),
        (["-mrr", "3"], "unexpected extra argument"),
        (["-b", "four"], "'-b'"),
        (["--device", "tpu"], "--device"),
        (["--bir", "3"], "--bir"),
        (["--out", "x"], "--out"),
        (["-om", "m.json", "-cf", "x"], "-om"),
        (["surplus"], "surplus"),
        (["-cf", ""], "-cf is empty"),
        (["-c", "text.jsonl", "-c", ""], "-c is empty"),
        (["-m", "/dev/null"], "-m /dev/null: is no file"),
        (["--damping", "0"], "must be more than 0"),
        (["--seed", str(1 << 64)], "a whole number of at most 64 bits"),
        (["-ss", "1e30"], "from 0.001 to 1073741824"),
    ],
)
def test_wrong_flags_are_named(run, fake, job_args, args, says):
    result = run("convert", *job_args, *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""
    assert fake.recipes == []


EMPTY = (["inspect", ""], ["verify", "x", "-i", ""], ["publish", "x", "", "--repo", "a/b"], ["status", ""],
         ["report", "x", "-o", ""], ["tune", "x", "--reference", "y", "-o", ""], ["eval", "x", "--text", ""], ["chat", ""],
         ["doctor", "-o", ""])  # fmt: skip


@pytest.mark.parametrize("args", EMPTY, ids=lambda a: a[0])
def test_an_empty_path_is_not_the_current_directory(run, args):
    result = run(*args)
    assert result.exit_code == 2
    assert "is empty" in result.stderr
    assert "hint: is a variable of the shell not set?" in result.stderr


LONG = "n" * 300
TOO_LONG = (["inspect", LONG], ["verify", f"x/{LONG}"], ["eval", "x/" * 2100], ["chat", "x", LONG],
            ["report", "x", "-o", LONG], ["tune", "x", "--reference", LONG, "-o", "y"], ["publish", LONG, "--repo", "a/b"],
            ["doctor", "-o", LONG],
            ["measure", "-i", "x", "-o", "w", "-om", LONG], ["convert", "-i", "x", "-o", "w", "-m", LONG])  # fmt: skip


@pytest.mark.parametrize("args", TOO_LONG, ids=lambda a: a[0])
def test_a_path_that_no_file_system_takes(run, args):
    result = run(*args)
    assert result.exit_code == 2
    assert "has 300 bytes" in result.stderr or "paths have at most 4095" in result.stderr
    assert "hint: give a shorter one" in result.stderr


def test_numbers_of_an_evaluation_that_cannot_be(run, tmp_path):
    for flags, says in ((["--length", "0"], "--length 0: at least 2"), (["--rows", "0"], "--rows 0: at least 1")):
        assert says in run("eval", str(tmp_path), *flags).stderr


EARLY = (["convert", "-i", "x", "-o", "w"], ["measure", "-i", "x", "-o", "w"], ["plan", "-i", "x"], ["patch", "-o", "w"],
         ["submit", "--", "convert", "-i", "x", "-o", "w"])  # fmt: skip


@pytest.mark.parametrize("args", EARLY, ids=lambda a: a[0])
@pytest.mark.parametrize("value", ["=3", "x=9", "re:(=3"])
def test_an_override_that_cannot_be_is_refused_before_anything_is_looked_at(run, args, value):
    result = run(*args, "--set", "*.v_proj=6", "--set", value)
    assert result.exit_code == 2
    assert f"--set {value}: " in result.stderr
    assert "hint: " in result.stderr


@pytest.mark.parametrize("repo", ["me", "me/", "/me", "a/b/c", "a b/c"])
@pytest.mark.parametrize("args", [["convert", "-i", "x"], ["plan", "-i", "x"], ["submit", "--", "convert", "-i", "x"]])
def test_a_repository_without_an_owner_is_refused_before_anything_is_looked_at(run, args, repo):
    result = run(*args, "--publish", repo)
    assert result.exit_code == 2
    assert f"--publish {repo}: not the name of a repository" in result.stderr
    assert "OWNER/NAME" in result.stderr


def test_a_patch_of_what_is_no_work_directory(run, tmp_path):
    result = run("patch", "-o", str(tmp_path), "--set", "*=4")
    assert result.exit_code == 7
    assert "it has no job.json\n  hint: give that of a finished conversion" in result.stderr


def test_measure_writes_into_the_work_directory_or_where_asked(run, fake, job_args, tmp_path):
    assert run("measure", *job_args).exit_code == 0
    assert fake.recipes[0].output_measurement == str(tmp_path / "work" / "measurement.json")
    assert run("measure", *job_args, "-om", "there.json").exit_code == 0
    assert fake.recipes[1].output_measurement == "there.json"
    result = run("measure", *job_args, "-b", "4", "-cf", "x")
    assert result.exit_code == 0
    assert "-b, -cf: nothing that is measured depends on it" in result.stdout + result.stderr
    assert fake.recipes[2].bits == Recipe(in_dir="m", out_dir="w").bits
    assert run("measure", *job_args, "-m", "m.json").exit_code == 2
    result = run("measure", job_args[0], job_args[1], "-o", "s3://bucket/work")
    assert result.exit_code == 2
    assert "-om" in result.stderr


def make_job(recipe: Recipe, **identity: object) -> None:
    job = stored_job(recipe, **identity)
    WorkDir.create_or_resume(recipe.out_dir, job, resume=True, versions={}).close()


def test_resume_needs_only_the_work_directory(run, fake, job_args, tmp_path):
    (tmp_path / "m.json").write_bytes(b"")
    stored = Recipe(
        in_dir=job_args[1],
        out_dir=job_args[3],
        bits=(3.0, 5.5),
        head_bits=8,
        compile_full="out/{bpw}",
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


def test_fields_without_a_default_are_the_two_directories():
    assert [f.name for f in fields(Recipe) if f.default is MISSING] == ["in_dir", "out_dir"]


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
