"""Flags of the recipe: spelling, defaults, what is refused."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, replace
from itertools import pairwise

import click
import pytest
from click.testing import CliRunner

from exl2ray.cli import cli
from exl2ray.recipe import SECTIONS, SETTINGS, Recipe
from exl2ray.terminal.flags import CONVERT_ONLY, MEASURE_FIELDS

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


@pytest.mark.parametrize("args", [args for args in EMPTY if "--prompts" not in args], ids=lambda a: a[0])
def test_a_dash_is_no_path(run, args):
    """`report -o -` wrote a file called -."""
    result = run(*["-" if a == "" else a for a in args])
    assert result.exit_code == 2
    assert " -: neither standard input nor output" in result.stderr
    assert "./-" in result.stderr


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


@pytest.mark.parametrize(
    "args",
    [("convert", "-i", "x", "-o", "w", "-cf", "--dry-run"), ("convert", "-i", "x", "-o", "-b", "-cf", "y"),
     ("eval", "x", "--reference", "--json"), ("report", "w", "-o", "--paths"),
     ("publish", "x", "--repo", "a/b", "--message", "--dry-run")],
)  # fmt: skip
def test_a_flag_is_not_the_value_of_another_one(run, fake, args):
    result = run(*args)
    flag, value = next(pair for pair in pairwise(args) if pair[0].startswith("-") and pair[1].startswith("-"))
    assert result.exit_code == 2
    assert f"{flag} {value}: a flag, where the value of {flag} is needed\n  hint: is a variable" in result.stderr
    assert not fake.recipes
    assert "a flag" not in run("verify", "./--json").stderr


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


def test_fields_without_a_default_are_the_two_directories():
    assert [f.name for f in fields(Recipe) if f.default is MISSING] == ["in_dir", "out_dir"]
