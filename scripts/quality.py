#!/usr/bin/env python3
"""Compare settings of `exl2ray convert` end to end: convert models with each variant, evaluate all, print one table.

    python scripts/quality.py --model demo=models/demo --variant reference: --variant "low damping:--damping 0.03" \\
        --bits 3.0 4.0 --work /tmp/quality

* A variant is NAME:"options", any that `exl2ray convert` takes; others are compared with the first one.
* Every model is converted with each variant, at each bitrate, with each draw of each calibration set. A draw is another
  selection of rows: draw d of the built-in set has seed d, draw d of a file its data rows in another order (0: as they are).
* Evaluation tokens: --heldout FILE, text of several kinds made by `quality_text.py`, with figures by kind; or --tokens FILE,
  or --tokens MODEL=FILE, or eval-tokens.npy in the model's directory.
* A variant NAME:"peer:exllamav2 -hb 6" is another quantiser, run where it is installed, else skipped (`quality_peers.py`).
* MODEL may be NAME=build: then `real_model.py` builds smollm2 or gemma3 in the work directory.
* A bitrate below what the first variant can reach is raised to that in steps of 0.01.
* With --match-bytes the other variants are asked for the bitrate at which their files are as large as the first one's: of
  all bitrates the allocation is solved, only the closest is quantised. Without, sizes that differ by more than 0.1 % are
  marked.
* Finished results are kept in --json; a second run goes on. They hold for one state of the sources of the package.

Conversions run in this process (or --jobs of them) without Ray. Variants share a measurement if their measurement settings
are the same; nothing quantised is shared. `quality_table.py` prints the table of any number of such result files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if not hasattr(np, "row_stack"):  # numba-cuda 0.30 imports it; numpy 2.5 dropped it
    np.row_stack = np.vstack

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402
import quality_peers  # noqa: E402
import quality_table  # noqa: E402
import torch  # noqa: E402
from click.core import ParameterSource  # noqa: E402
from quality_calibration import Calibration, Experiment  # noqa: E402
from quality_models import Model  # noqa: E402
from quality_sizes import matched  # noqa: E402

from exl2ray.cli import convert as convert_command  # noqa: E402
from exl2ray.errors import BudgetError, Exl2RayError, UsageError  # noqa: E402
from exl2ray.events import Silent  # noqa: E402
from exl2ray.plan.sizes import exact_size  # noqa: E402
from exl2ray.recipe import Recipe  # noqa: E402
from exl2ray.steps import tuning  # noqa: E402
from exl2ray.steps.allocating import allocate  # noqa: E402
from exl2ray.steps.measuring import measure  # noqa: E402
from exl2ray.steps.producing import produce  # noqa: E402
from exl2ray.terminal.flags import recipe_from  # noqa: E402

# Set by this script, so no part of a variant.
OURS = ("in_dir", "out_dir", "bits", "compile_full", "cal_dataset", "output_measurement", "measurement", "no_resume")
# Fields of a recipe that say where and how something runs, not what comes out.
PLACES = ("in_dir", "out_dir", "bits", "compile_full", "cal_dataset", "no_resume", "reuse", "executor", "gpus",
          "ray_address", "checkpoint_seconds", "device", "evaluate", "eval_text")  # fmt: skip
NOT_NUMERICS = {"commands", "report", "cli.py", "console.py", "live.py", "program.py", "flags.py"}  # of the package
BIT_STEP, BIT_STEPS = 0.01, 60  # to raise a bitrate that is out of reach


@dataclass(frozen=True)
class Variant:
    name: str
    options: str

    def recipe(self, model: Path, work: Path, bits: float, device: str, rows: dict[str, Any]) -> Recipe:
        """The recipe that `exl2ray convert` would run with these options; UsageError for one that is not a variant's."""
        given = ["-i", str(model), "-o", str(work), "-b", repr(bits), "--device", device, "--executor", "inline"]
        try:
            own = convert_command.make_context("convert", ["-o", "work", *shlex.split(self.options)])
            set_by = {n for n in own.params if own.get_parameter_source(n) is ParameterSource.COMMANDLINE} - {"out_dir"}
            for name in sorted(set_by & set(OURS)):
                raise UsageError(f"--variant {self.name}: {name} is set by this script", "leave it out")
            ctx = convert_command.make_context("convert", [*given, *shlex.split(self.options)])
        except (click.ClickException, ValueError) as e:
            raise UsageError(f"--variant {self.name}: {e}") from e
        return replace(recipe_from(ctx), compile_full=str(work / "out"), reuse=True, **rows)


@dataclass(frozen=True)
class Case:
    """One conversion to be judged."""

    model: str
    calibration: Calibration
    draw: int
    bits: float  # as named in the table
    variant: Variant


class Study:
    """All conversions of one command line, with the results that exist."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work, self.results = Path(args.work), Path(args.json or Path(args.work) / "results.jsonl")
        self.source = source_hash()
        self.steps_up: dict[tuple[str, float, Variant], int] = {}  # how far a bitrate had to be raised
        tokens = dict(t.split("=", 1) for t in args.tokens if "=" in t)
        common = next((t for t in args.tokens if "=" not in t), None)
        self.models = {
            name: Model(name, path, Path(tokens.get(name) or common or path / "eval-tokens.npy"), args)
            for name, path in ((name, self.built(name, given)) for name, given in (named(m, "=") for m in args.model))
        }
        self.calibrations = [Calibration.parse(c) for c in args.calibration or ["builtin"]]
        self.variants = [Variant(*named(v, ":")) for v in args.variant]
        rows = {"dataset_rows": args.cal_rows, "measurement_rows": args.measure_rows,
                "length": args.cal_length, "measurement_length": args.cal_length}  # fmt: skip
        self.rows = {name: value for name, value in rows.items() if value}
        if args.jobs > 1 and args.draws > 1 and args.match_bytes and quality_peers.peer_of(self.variants[0].options):
            raise UsageError("--jobs: later draws are made as large as the peer's only one", "leave --jobs out")
        for variant in self.variants:
            for model in self.models.values() if quality_peers.peer_of(variant.options) is None else ():
                self.recipe(Case(model.name, self.calibrations[0], 0, args.bits[0], variant))

    def built(self, name: str, given: str) -> Path:
        """The folder of a model; ``build``: made by `real_model.py`, once, below the work directory."""
        path = self.work / "models" / name if given == "build" else Path(given)
        if given == "build" and not (path / "config.json").exists():
            subprocess.run([sys.executable, str(ROOT / "scripts" / "real_model.py"), name, str(path)], check=True)
        return path

    def groups(self) -> list[list[Case]]:
        """Cases that follow each other in one process: those of a model, a calibration set and a draw."""
        a = self.args
        return [
            [Case(m, c, d, bits, v) for bits in a.bits for v in self.variants]
            for m in self.models for c in self.calibrations for d in range(a.draws)
        ]  # fmt: skip

    def recipe(self, case: Case, bits: float | None = None) -> Recipe:
        path = self.models[case.model].path
        recipe = case.variant.recipe(path, self.work / "jobs", bits or case.bits, self.args.device, self.rows)
        return case.calibration.recipe(recipe, case.draw, self.work)

    def key(self, case: Case, target: int | None) -> str:
        """What a result depends on, the sources of the package aside."""
        peer = quality_peers.peer_of(case.variant.options) is not None
        settings = case.variant.options if peer else {k: v for k, v in asdict(self.recipe(case)).items() if k not in PLACES}
        model = self.models[case.model]
        return digest([settings, case.bits, case.draw, case.calibration.identity, model.fingerprint,
                       model.tokens_sha256, self.args.device, self.args.dtype, target])  # fmt: skip

    def run(self, cases: Sequence[Case]) -> tuple[list[dict[str, Any]], list[str]]:
        """Does what is not done yet of a group, in order: the results of all, and the messages of what failed."""
        results, failed = [], []
        done = {(r["key"], r["source"] if not self.args.any_source else ""): r for r in quality_table.load([self.results])}
        first_bytes: dict[float, int] = {}
        for case in cases:
            target = self.target(case, first_bytes, done)
            key = self.key(case, target)
            result = done.get((key, self.source if not self.args.any_source else ""))
            if result is None:
                try:
                    result = {**self.convert(case, target), "key": key, "source": self.source}
                except quality_peers.Skipped as e:
                    say(f"skipped: {case.model}, draw {case.draw}, {case.bits:g} bpw, {case.variant.name}: {e}")
                    continue
                except Exception as e:  # one variant that fails must not cost the others their time on the machine
                    if not isinstance(e, Exl2RayError):
                        traceback.print_exc()
                    failed.append(f"{case.model}, {case.calibration.name}, draw {case.draw}, {case.bits:g} bpw, "
                                  f"{case.variant.name}: {type(e).__name__}: {e}")  # fmt: skip
                    say(f"FAILED {failed[-1]}")
                    continue
                append(self.results, json.dumps(result))
                say(quality_table.line(result))
            first_bytes.setdefault(case.bits, result["file_bytes"])  # if the first variant was skipped, of the next one
            results.append(result)
        return results, failed

    def target(self, case: Case, first_bytes: dict[float, int], done: dict[tuple[str, str], dict[str, Any]]) -> int | None:
        """How many bytes a file shall have. A peer has one draw, the first; all draws of others are as large as that."""
        if not self.args.match_bytes or quality_peers.peer_of(case.variant.options) is not None:
            return None
        if case.bits in first_bytes or not case.draw or quality_peers.peer_of(self.variants[0].options) is None:
            return first_bytes.get(case.bits)
        key = self.key(replace(case, draw=0, variant=self.variants[0]), None)
        found = done.get((key, self.source if not self.args.any_source else ""))
        return None if found is None else int(found["file_bytes"])

    def convert(self, case: Case, target: int | None) -> dict[str, Any]:
        """Converts and evaluates; the result without its key."""
        start, reporter = time.perf_counter(), Silent()
        if quality_peers.peer_of(case.variant.options) is not None:
            return self.of_peer(case)
        recipe = self.place(case)
        out, quantised = Path(recipe.compile_full or ""), Path(recipe.out_dir) / "quant"
        for folder in (out, quantised):
            shutil.rmtree(folder, ignore_errors=True)
        with self.opened(recipe, case, reporter) as job:
            measurement = measure(job)
            plan = allocate(job, measurement, job.recipe.bits[0])
            if target is not None:
                size = exact_size(job.spec, job.source, plan.bits, plan.params, job.recipe.shard_bytes)
                beside = size.high_bytes - plan.predicted_bytes
                plan = matched(partial(allocate, job, measurement), plan, target - beside)
            (output,) = produce(job, [plan], compile_full=tuning.place_of_solved(recipe))
        (output,) = tuning.tune_outputs(job, [output], reporter)  # --tune, or what --quality best stands for
        stages = [(f["stage"], f["seconds"]) for name, f in reporter.events if name == "end"]
        figures = self.models[case.model].judge(out)
        for folder in (quantised,) if self.args.keep else (out, quantised):
            shutil.rmtree(folder)
        return {
            "model": case.model, "calibration": case.calibration.name, "draw": case.draw, "bits": case.bits,
            "variant": case.variant.name, "options": case.variant.options, "asked_bits": plan.bits,
            "matched_bytes": target, "achieved_bpw": output.achieved_bpw, "predicted_kl": plan.predicted_kl, **figures,
            "calibration_perplexity": output.calibration_perplexity,
            "measure_seconds": round(sum(s for name, s in stages if name == "measure"), 3),
            "quantize_seconds": round(sum(s for name, s in stages if name.startswith("quantize")), 3),
            "tune_seconds": round(sum(s for name, s in stages if name == "tune"), 3), "tuned": output.tuned,
            "seconds": round(time.perf_counter() - start, 3), "machine": machine(self.args.device),
            "warnings": [f["message"] for name, f in reporter.events if name == "warning"],
        }  # fmt: skip

    def of_peer(self, case: Case) -> dict[str, Any]:
        if case.draw:
            raise quality_peers.Skipped("peers choose their own text: one draw")
        model, folder = self.models[case.model], self.work / "jobs" / f"{case.model}-{case.calibration.name}-peer"
        out = self.out(case, folder)
        figures = quality_peers.convert(model, case.variant.options, case.bits, folder, out, self.args.peer_seconds)
        if not self.args.keep:
            shutil.rmtree(out)
        return {
            "model": case.model, "calibration": case.calibration.name, "draw": 0, "bits": case.bits,
            "variant": case.variant.name, "options": case.variant.options, "asked_bits": case.bits,
            "achieved_bpw": figures.get("linears_bpw", case.bits), **figures, "measure_seconds": 0.0,
            "machine": machine(self.args.device), "warnings": [],
        }  # fmt: skip

    def place(self, case: Case) -> Recipe:
        """The recipe with a work directory that all cases with the same measurement share."""
        recipe = self.recipe(case)
        job = recipe.job({}, None)
        settings = [job["identity"], job["measure"], case.calibration.identity, case.draw]
        name = digest([self.source, self.models[case.model].fingerprint, *settings])
        folder = self.work / "jobs" / f"{case.model}-{name[:12]}"
        return replace(recipe, out_dir=str(folder), compile_full=str(self.out(case, folder)))

    def out(self, case: Case, folder: Path) -> Path:
        if not self.args.keep:
            return folder.with_name(folder.name + "-out")
        names = (case.model, case.calibration.name, f"draw{case.draw}", f"{case.bits:g}", case.variant.name)
        return self.work / "out" / "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in n) for n in names)

    def opened(self, recipe: Recipe, case: Case, reporter: Silent) -> Experiment:
        """The job; its bitrate is raised to what the option tables reach."""
        known = (case.model, case.bits, case.variant)
        for step in range(self.steps_up.get(known, 0), BIT_STEPS):
            raised = replace(recipe, bits=(round(recipe.bits[0] + step * BIT_STEP, 6),))
            try:
                job = Experiment(raised, case.calibration, reporter)
            except BudgetError:
                if step == BIT_STEPS - 1 or recipe.bits[0] > 4:
                    raise
                continue
            self.steps_up[known] = step
            return job
        raise AssertionError


def source_hash() -> str:
    """SHA-256 of what decides about results: the package's numerics and its calibration text."""
    total = hashlib.sha256()
    package = ROOT / "exl2ray"
    for path in sorted(package.rglob("*")):
        parts = path.relative_to(package).parts
        text = parts[:2] == ("calibration", "text")
        if path.is_file() and "__pycache__" not in parts and parts[0] not in NOT_NUMERICS and (text or path.suffix == ".py"):
            total.update("/".join(parts).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def named(text: str, separator: str) -> tuple[str, str]:
    name, found, value = text.partition(separator)
    if not found or not name:
        raise UsageError(f"{text!r}: expected NAME{separator}VALUE")
    return name, value


def append(path: Path, line: str) -> None:
    """One write at the end of the file: several processes may share it. A line that a kill cut short is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as f:
        end = f.seek(0, os.SEEK_END)
        f.seek(max(0, end - 1))
        cut = f.read(1) not in (b"", b"\n")
        f.write(b"\n" * cut + line.encode() + b"\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__}"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", required=True, metavar="NAME=DIR", help="source model; repeatable")
    add("--tokens", action="append", default=[], metavar="[MODEL=]FILE", help=".npy of token ids, (n,) or (rows, length)")
    add("--heldout", metavar="FILE", help="text of several kinds, of quality_text.py; --rows: of each kind")
    add("--calibration", action="append", metavar="SET",
        help="builtin (default), random, builtin-without:KIND or a Parquet file; repeatable")  # fmt: skip
    add("--variant", action="append", required=True, metavar='NAME:"OPTIONS"', help="repeatable; the first is compared with")
    add("--bits", type=float, nargs="+", default=[2.5, 3.0, 4.0])
    add("--draws", type=int, default=2, help="calibration draws (2)")
    add("--match-bytes", action="store_true", help="choose bitrates so that files are as large as the first variant's")
    add("--work", required=True, metavar="DIR", help="work directories, and results.jsonl unless --json is given")
    add("--json", metavar="FILE", help="results, one per line; appended to")
    add("--any-source", action="store_true", help="take results of other states of the sources, too")
    add("--keep", action="store_true", help="keep the converted models, in DIR/out")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the evaluation's activations")
    add("--rows", type=int, help="evaluation rows at most")
    add("--length", type=int, default=1024, help="tokens of an evaluation row, from an array without rows (1024)")
    add("--cal-rows", type=int, help="-r of every variant, for Parquet files")
    add("--measure-rows", type=int, help="-mr of every variant, for Parquet files")
    add("--cal-length", type=int, help="-l and -ml of every variant")
    add("--peer-seconds", type=float, default=1800, help="a peer that takes longer for one conversion has failed (1800)")
    add("--jobs", type=int, default=1, help="processes that share the device (1)")
    add("--threads", type=int, help="torch threads of each process")
    add("--log", metavar="FILE", help="append the table to this page, as in docs/log.md")
    add("--title", default="Quality of variants", help="heading in the log")
    return parser.parse_args(arguments)


def run_group(args: argparse.Namespace, index: int) -> tuple[list[dict[str, Any]], list[str]]:
    """``Study.run`` of group ``index`` in a process of its own."""
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // args.jobs))
    study = Study(args)
    return study.run(study.groups()[index])


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    start = time.perf_counter()
    try:
        study = Study(args)
        groups = study.groups()
    except Exl2RayError as e:
        say(f"error: {e}")
        return e.exit_code
    if args.jobs == 1:
        torch.set_num_threads(args.threads or os.cpu_count() or 1)
        done = [study.run(group) for group in groups]
    else:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            done = list(pool.map(run_group, [args] * len(groups), range(len(groups))))
    results, failed = [r for some, _ in done for r in some], [message for _, some in done for message in some]
    text = quality_table.document(results, [v.name for v in study.variants])
    print(text)
    for message in failed:
        say(f"failed: {message}")
    say(f"{time.perf_counter() - start:.0f} s in all, {len(results)} results")
    if args.log:
        command = shlex.join(["python", "scripts/quality.py", *(sys.argv[1:] if arguments is None else arguments)])
        quality_table.append_log(Path(args.log), args.title, machine(args.device), command, text)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
