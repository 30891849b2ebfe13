"""Command lines of ExLlamaV2's convert.py, as people keep them in scripts, and what a dry run promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from bounded import Run, exl2ray
from tiny_models import write_text

from exl2ray.cli import cli
from exl2ray.convert import convert
from exl2ray.errors import FormatError, StoreError, UsageError
from exl2ray.events import Silent
from exl2ray.formats.links import outside
from exl2ray.recipe import Recipe
from exl2ray.terminal.flags import recipe_from
from exl2ray.terminal.reference_flags import REFERENCE_FLAGS

ROOT = Path(__file__).resolve().parents[2]
# usage of convert.py --help, 0.3.2: (flags, whether a value follows)
HELP = """[-i IN_DIR] [-o OUT_DIR] [-res] [-nr] [-cf COMPILE_FULL] [-c CAL_DATASET] [-b BITS] [-ss SHARD_SIZE]
          [-rs ROPE_SCALE] [-ra ROPE_ALPHA] [-hb HEAD_BITS]
          [-om OUTPUT_MEASUREMENT] [-m MEASUREMENT] [-r DATASET_ROWS] [-mr MEASUREMENT_ROWS]
          [-l LENGTH] [-ml MEASUREMENT_LENGTH] [-so] [-hsol HIDDEN_STATE_OFFLOAD_LAYERS] [-fst]"""
USAGE = dict(re.findall(r"\[(-\w+)(?: (\w+))?\]", HELP))
NOTED = {"-res": "resumed without it", "-so": "--json", "-hsol": "not needed", "-fst": "does nothing"}


def parsed(*words: str, command: str = "convert") -> click.Context:
    """The command line as the program understands it; nothing is run."""
    parent = click.Context(cli, info_name="exl2ray", token_normalize_func=lambda name: name.replace("_", "-"))
    return cli.commands[command].make_context(command, list(words), parent=parent)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_help() -> None:
    switches = {f.short for f in REFERENCE_FLAGS if f.field == "no_resume" or (f.field is None and f.type is None)}
    values = [(f.short, "" if f.short in switches else f.name.upper()) for f in REFERENCE_FLAGS]
    assert sorted(values) == sorted(USAGE.items())


@pytest.mark.parametrize("flag", REFERENCE_FLAGS, ids=lambda f: f.short)
def test_the_page_has_every_flag_and_the_program_too(flag: Any) -> None:
    page = (ROOT / "docs" / "convert-py.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{flag.short}`, `{flag.long}` |")]
    assert ("taken, with a note" in row) == bool(flag.note)
    for command in ("convert", "measure", "plan"):
        spellings = {s for p in cli.commands[command].params for s in p.opts}
        assert {flag.short, flag.long.replace("_", "-")} <= spellings, command
    assert flag.field is None or flag.field in Recipe.__dataclass_fields__


def test_the_page_has_no_other_flag() -> None:
    page = (ROOT / "docs" / "convert-py.md").read_text(encoding="utf-8").partition("## Flags")[2]
    assert re.findall(r"^\| `(-\w+)`, `--\w+` \|", page, re.MULTILINE) == list(USAGE)


# ---- spellings ------------------------------------------------------------------------------------------------------

SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    ("-ss 8192.0", {"shard_size": 8192}),
    ("-ss 1024.5", {"shard_size": 1024.5}),
    ("-ss=512", {"shard_size": 512}),
    ("-ss 0", {"shard_size": 0}),
    ("-ss -1", {"shard_size": 0}),
    ("--shard_size=-0.5", {"shard_size": 0}),
    ("-b=4", {"bits": (4.0,)}),
    ("-b4.25", {"bits": (4.25,)}),
    ("--bits=4", {"bits": (4.0,)}),
    ("--bit 4", {"bits": (4.0,)}),
    ("--bit=4", {"bits": (4.0,)}),
    ("--b 4", {"bits": (4.0,)}),
    ("--head 8", {"head_bits": 8}),
    ("-hb=8", {"head_bits": 8}),
    ("--shard 100", {"shard_size": 100}),
    ("--rope_s 4", {"rope_scale": 4.0}),
    ("--rope-a 2.5", {"rope_alpha": 2.5}),
    ("--no_r", {"no_resume": True}),
    ("-l=1024", {"length": 1024}),
    ("-l1024 -ml=512", {"length": 1024, "measurement_length": 512}),
    ("-r50 -mr 8", {"dataset_rows": 50, "measurement_rows": 8}),
    ("--dataset 50", {"dataset_rows": 50}),
    ("--measurement_r 8", {"measurement_rows": 8}),
    ("-cf=a=b", {"compile_full": "a=b"}),
    ("--compile=--bit", {"compile_full": "--bit"}),
    ("-cf --bit", {"compile_full": "--bit"}),  # a value, whatever it looks like
]


@pytest.mark.parametrize(("line", "fields"), SPELLINGS, ids=[line for line, _ in SPELLINGS])
def test_spellings_of_argparse(line: str, fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    ctx = parsed("-i", str(base), "-o", str(tmp_path / "w"), *shlex.split(line))
    assert recipe_from(ctx) == Recipe(in_dir=str(base), out_dir=str(tmp_path / "w"), **fields)


def test_a_whole_number_of_mebibytes_is_no_change_of_the_job() -> None:
    jobs = [Recipe("m", "w", shard_size=s).job({}, None)["output"] for s in (8192, 8192.0)]
    assert json.dumps(jobs[0]) == json.dumps(jobs[1])
    assert Recipe("m", "w", shard_size=1024.5).shard_bytes == 1024 * 2**20 + 2**19


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-ss nan", "-ss nan"), ("-ss -inf", "-ss -inf"), ("-ss 1e-9", "-ss 1e-09"), ("-ss x", "'-ss'"),
        ("-ss 1e300", "-ss 1e+300"), ("-hsol -3", "-hsol"), ("-hsol many", "-hsol"), ("-hb 7", "-hb 7"), ("-hb 6.5", "-hb"),
        ("-b 100", "-b 100"), ("-b nan", "-b nan"), ("-r 0", "-r 0"), ("-rs 0", "-rs 0"), ("-ra -1", "-ra -1"),
        ("--out x", "--out"), ("--m x", "--m"), ("--ro", "--ro"), ("--frobnicate", "--frobnicate"), ("-x", "-x"),
        ("-so=1", "-so"), ("-l 2.5", "-l"), ("-om a -cf b", "-om"), ("-om a -m b", "-m"), ("extra", "extra"),
    ],
)  # fmt: skip
def test_values_out_of_range_and_names_that_are_not_clear(line: str, says: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises((UsageError, click.UsageError)) as e:
        recipe_from(parsed("-i", str(base), "-o", str(tmp_path / "w"), *shlex.split(line)))
    assert says in str(getattr(e.value, "message", e.value)) or says in e.value.format_message()


# ---- whole command lines --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_text(tmp_path_factory.mktemp("data") / "text.jsonl"))


@pytest.fixture(scope="module")
def measured(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory after measuring."""
    work = tmp_path_factory.mktemp("measured") / "work"
    convert(recipe(base, work, data, output_measurement=str(work / "measurement.json")), Silent())
    return work


def recipe(base: Path, work: Path, data: Path, **fields: Any) -> Recipe:
    given = {"cal_dataset": str(data), "dataset_rows": 3, "measurement_rows": 2, "length": 128, "measurement_length": 128,
             "device": "cpu", "executor": "inline", "evaluate": "never", "quality": "reference"}  # fmt: skip
    return Recipe(str(base), str(work), **{**given, **fields})


LINES = [
    "-i MODEL -o WORK -cf OUT -b 4.5",
    "-i MODEL -o WORK -nr -om WORK/m.json",
    "-i MODEL -o WORK -nr -m MEASURED -cf OUT -b 4.0",
    "--in_dir MODEL --out_dir WORK --compile_full OUT --bits 4.65 --head_bits 6",
    "-i MODEL -o WORK -c DATA -r 4 -mr 2 -l 128 -ml 128 -b 5 -hb 8 -cf OUT -ss 8192.0",
    "-i MODEL -o WORK -b 6.0 -hb 8 -ss 1024.5 -so -hsol 4 -fst -res",
    "--in_dir MODEL --out_dir WORK --resume --no_resume --status_output --hidden_state_offload_layers 2 --fast_safetensors",
    "-i=MODEL -o=WORK -b=5.5 -ra=1.0 -rs=1.0",
    "-i MODEL -oWORK -b4 --shard_size 0",
    "--in MODEL -o WORK --bit 4.125 --hid 1",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_command_lines_of_scripts(command: str, line: str, base: Path, data: Path, measured: Path, tmp_path: Path) -> None:
    places = {"MODEL": base, "WORK": tmp_path / "w", "OUT": tmp_path / "out", "DATA": data}
    for name, path in {**places, "MEASURED": measured / "measurement.json"}.items():
        line = line.replace(name, str(path))
    words = shlex.split(line)
    if "-c" not in words:  # the built-in text has more rows than this needs
        words += ["-l", "128", "-ml", "128"]
    run = exl2ray(command, *words, "--device", "cpu", "--dry-run", "--json")
    run.ends_with(0)
    lines = [json.loads(x) for x in run.out.splitlines()]
    notes = [x["message"] for x in lines if x.get("event") == "note"] if command == "convert" else lines[0]["warnings"]
    long = {f.long: f.short for f in REFERENCE_FLAGS} | {"--hid": "-hsol"}
    given = {long.get(w, w) for w in words}
    for flag, words_of_note in NOTED.items():
        assert sum(n.startswith(f"{flag}: ") and words_of_note in n for n in notes) == (flag in given), (flag, notes)
    assert not (tmp_path / "w").exists()
    assert not (tmp_path / "out").exists()


def test_measure_takes_the_command_line_of_a_conversion(base: Path, tmp_path: Path) -> None:
    words = ["-i", base, "-o", tmp_path / "w", "-l", "128", "-ml", "128", "--device", "cpu", "--dry-run"]
    run = exl2ray("measure", *words, "-b", "3", "-b", "4", "-cf", tmp_path / "out", "-ss", "1024.5", "-hb", "6", "-so")
    run.ends_with(0, "-b, -hb, -cf, -ss: nothing that is measured depends on it", "-so: ")
    exl2ray("measure", *words, "-m", "m.json").ends_with(UsageError.exit_code, "-m reuses a measurement")


# ---- what a dry run promises ----------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def _foreign(work: Path) -> None:
    work.mkdir()
    (work / "notes.txt").write_text("mine")


def _foreign_job(work: Path) -> None:
    work.mkdir()
    (work / "job.json").write_text('{"progress": "measure_quant"}')


def _reference_folder(work: Path) -> None:
    work.mkdir()
    (work / "job_new.json").write_text('{"progress": "quant"}')
    (work / "out_tensor").mkdir()


def _file(work: Path) -> None:
    work.write_text("a file")


def _damaged(work: Path) -> None:
    job = work / "job.json"
    job.write_bytes(job.read_bytes().replace(b'"seed"', b'"sped"', 1))


def _linked(work: Path) -> None:
    shutil.rmtree(work / "logs", ignore_errors=True)
    (work.parent / "elsewhere").mkdir()
    (work / "logs").symlink_to("../elsewhere")


def _used(work: Path) -> None:
    """Another driver is at work: this process."""
    from exl2ray.store.file_names import LOCK_FILE
    from exl2ray.store.lock import Holder
    from exl2ray.store.open import open_store

    open_store(str(work)).put(LOCK_FILE, Holder.here().to_bytes())


NEW: list[tuple[str, Change]] = [
    ("foreign file", _foreign), ("foreign job", _foreign_job), ("folder of convert.py", _reference_folder), ("a file", _file),
]  # fmt: skip
OLD: list[tuple[str, Change, dict[str, Any], str]] = [
    ("other seed", lambda w: None, {"seed": 5}, "--seed: 0 -> 5"),
    ("other rows", lambda w: None, {"measurement_rows": 1}, "-mr: 2 -> 1"),
    ("other rope", lambda w: None, {"rope_scale": 2.0}, "-rs: (not set) -> 2.0"),
    ("no data", lambda w: None, {"cal_dataset": None}, "belongs to a job with other settings"),
    ("damaged", _damaged, {}, "does not match its checksum"),
    ("a link", _linked, {}, "logs: a link"),
    ("in use", _used, {}, "is in use by process"),
]


def words_of(r: Recipe) -> list[str]:
    rows = ["-c", str(r.cal_dataset), "-r", str(r.dataset_rows), "-mr", str(r.measurement_rows)] if r.cal_dataset else []
    rope = ["-rs", str(r.rope_scale)] if r.rope_scale else []
    return ["-i", r.in_dir, "-o", r.out_dir, *rows, *rope, "-l", "128", "-ml", "128", "--seed", str(r.seed),
            "--device", "cpu", "--executor", "inline", "--evaluate", "never", "--quality", "reference",
            "-b", "4"]  # fmt: skip


def told(run: Run, error: Run) -> None:
    """A dry run, or plan, ends with the status that the conversion ends with, and its words."""
    message = " ".join(error.err.partition("error: ")[2].partition("hint:")[0].split())
    assert message
    run.ends_with(error.status, message)


@pytest.mark.parametrize(("name", "make"), NEW, ids=[name for name, _ in NEW])
@pytest.mark.parametrize("restart", [[], ["-nr"]], ids=["resume", "-nr"])
def test_a_folder_that_is_not_ours(
    name: str, make: Change, restart: list[str], base: Path, data: Path, tmp_path: Path
) -> None:
    make(tmp_path / "w")
    words = [*words_of(recipe(base, tmp_path / "w", data)), *restart]
    real = exl2ray("convert", *words)
    assert real.status == StoreError.exit_code, real
    told(exl2ray("convert", *words, "--dry-run"), real)
    told(exl2ray("plan", *words), real)


@pytest.mark.parametrize(("name", "make", "fields", "says"), OLD, ids=[case[0] for case in OLD])
def test_a_job_that_cannot_go_on(
    name: str, make: Change, fields: dict[str, Any], says: str, base: Path, data: Path, measured: Path, tmp_path: Path
) -> None:
    work = Path(shutil.copytree(measured, tmp_path / "w"))
    make(work)
    before = {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}
    words = words_of(recipe(base, work, data, **fields))
    dry = exl2ray("convert", *words, "--dry-run")
    dry.ends_with(StoreError.exit_code, says)
    exl2ray("plan", *words).ends_with(StoreError.exit_code, says)
    assert {p: p.read_bytes() for p in work.rglob("*") if p.is_file()} == before
    real = exl2ray("convert", *words)
    told(dry, real)
    if name != "in use":  # starting over is another matter
        exl2ray("convert", *words, "-nr", "--dry-run").ends_with(0)
    else:
        exl2ray("convert", *words, "-nr", "--dry-run").ends_with(StoreError.exit_code, says)


def test_a_job_that_is_one_problem_of_two(base: Path, data: Path, measured: Path, tmp_path: Path) -> None:
    """The lines of its message stay lines, and values that only follow from others, or are hashes, are not shown."""
    words = words_of(recipe(base, measured, data, seed=5))
    words[words.index("-ml") + 1] = "256"
    (tmp_path / "notes.txt").write_text("")
    run = exl2ray("convert", *words, "-cf", tmp_path, "--dry-run")
    run.ends_with(UsageError.exit_code, "2 problems would stop this conversion", "holds notes.txt")
    assert "   -c: its content is another one\n" in run.err
    assert "   --seed: 0 -> 5\n" in run.err
    assert "\\n" not in run.err
    run = exl2ray("plan", *words)
    assert "   --seed: 0 -> 5\n" in run.out


def test_a_job_that_goes_on(base: Path, data: Path, measured: Path) -> None:
    """After measuring any bitrate may be named; plan finds the model in the job, as convert does."""
    words = words_of(recipe(base, measured, data))
    exl2ray("convert", *words, "--dry-run").ends_with(0)
    exl2ray("plan", *words).ends_with(0)
    exl2ray("plan", "-o", measured, "--device", "cpu", "-c", data).ends_with(0, "no problem found")
    exl2ray("plan", "-b", "4").ends_with(UsageError.exit_code, "-i is missing")


@pytest.mark.parametrize("where", ["file/m.json", "file/sub", "folder.json"])
def test_a_measurement_that_could_not_be_written(where: str, base: Path, data: Path, tmp_path: Path) -> None:
    """It would come up after all the measuring is done."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    words = [*words_of(recipe(base, tmp_path / "w", data)), "-om", str(tmp_path / where)]
    for command in ("convert", "measure", "plan"):
        exl2ray(command, *words, "--dry-run").ends_with(StoreError.exit_code, "-om", "directory")
    assert not (tmp_path / "w").exists()


def test_a_measurement_does_not_take_the_place_of_another_file(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "notes.json").write_text("mine")
    os.mkfifo(tmp_path / "pipe.json")
    for name, says in (("config.json", "no measurement"), ("notes.json", "no measurement"), ("pipe.json", "a FIFO")):
        words = [*words_of(recipe(base, tmp_path / "w", data)), "-om", str(tmp_path / name)]
        exl2ray("measure", *words, "--dry-run").ends_with(StoreError.exit_code, name, says)
    (tmp_path / "m.json").write_text('{"measurement": {}}')
    words = [*words_of(recipe(base, tmp_path / "w", data)), "-om", str(tmp_path / "m.json")]
    exl2ray("measure", *words, "--dry-run").ends_with(0)


def test_a_store_of_another_kind_is_refused_before_work(base: Path, data: Path, tmp_path: Path) -> None:
    words = [*words_of(recipe(base, tmp_path / "w", data)), "-o", "http://host/work", "-cf", str(tmp_path / "out")]
    for command in ("plan", "convert"):
        exl2ray(command, *words, "--dry-run").ends_with(StoreError.exit_code, "cannot store under http://")


def test_a_directory_that_is_a_link_to_itself(base: Path, data: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for flags in (("-o", loop, "-cf", tmp_path / "o"), ("-o", tmp_path / "w", "-cf", loop)):
        words = [*words_of(recipe(base, tmp_path / "w", data)), *map(str, flags)]
        result = exl2ray("convert", *words, "--dry-run")
        assert result.status == StoreError.exit_code, str(result)
    assert outside(loop, tmp_path) is None


def test_an_empty_measurement(base: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("\n")
    words = ["-i", base, "-o", tmp_path / "w", "-m", tmp_path / "m.json", "--device", "cpu", "-l", "128", "-ml", "128"]
    exl2ray("convert", *words, "--dry-run").ends_with(FormatError.exit_code, "m.json: is empty", "-om")
