#!/usr/bin/env python3
"""Conversions of models with random weights on 1, 2, 4, ... GPUs: times, what keeps them from N times the speed, bytes.

    python scripts/scaling.py --seconds 560 --out scaling.jsonl        what fits into 560 s, 70B and Mixtral shapes
    python scripts/scaling.py --models 70b --gpus 1 4 --compare        one model, beside the simulation
    python scripts/scaling.py --device cpu --models tiny --gpus 1 2    the same on CPUs, in a minute or two

Works: measure; reference and quantized, one bitrate with either --propagate; ladder, three bitrates. Every result is printed
as a line of JSON as soon as it is there, a table at the end; --out takes both. Work that would not end within --seconds, from
what was seen so far, is left out and listed. Exit status 1 if the number of GPUs changes a byte of measurement.json or of a
finished model, or if a run failed.

Every run has worker processes of its own and pays what a user's job pays in them (loading kernels, recording CUDA graphs),
but for their start, shown apart; Ray is started once for all of them. Kernels that were never compiled on this machine
are compiled by a small conversion beforehand. What a machine does for the first time may be slower than ever after (memory
that nobody has used, libraries on disk); --repeat 2 shows by how much.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import estimate_costs
import simulate
import torch
from observed import Observed, observe
from random_models import SHAPES, Shape, build
from ray.cluster_utils import Cluster
from scaling_run import Figure, Run, execute
from schedule_costs import Costs, ModelCosts

import exl2ray.cuda  # noqa: F401  (says where kernels are cached)
from exl2ray.driver.starting import store_bytes
from exl2ray.errors import Exl2RayError

ROOT = Path(__file__).resolve().parents[1]
WORKS = ("measure", "reference", "quantized", "ladder")
USUAL = {"measure": 1.0, "reference": 1.2, "quantized": 0.85, "ladder": 2.6}  # for work that was not seen yet
CLOSING_SECONDS = 12.0  # of the budget: ending Ray, the table
MARGIN = 1.15  # on estimates
TINY_LENGTH = 128


class OutOfTime(BaseException):
    """The budget is used up while a conversion runs. Nothing that handles errors may catch it on the way."""


class Output:
    """Lines on standard output, and in a file."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("", encoding="utf-8")

    def line(self, text: str) -> None:
        print(text, flush=True)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as f:
                f.write(text + "\n")

    def say(self, what: str, **fields: Any) -> None:
        self.line(json.dumps({"what": what, **fields}))


@dataclass
class Results:
    """The best figures so far, and what is known of bytes. ``left_out``: run -> why."""

    figures: dict[Run, Figure] = field(default_factory=dict)
    left_out: dict[Run, str] = field(default_factory=dict)
    known: dict[tuple[str, str, str], str] = field(default_factory=dict)  # (model, propagation, file) -> digest
    verdict: dict[Run, str] = field(default_factory=dict)
    failed: bool = False

    def add(self, figure: Figure) -> None:
        """Compares with the first run that made the same files; a ladder makes those of a single bitrate as well."""
        run = figure.run
        if run not in self.figures or figure.seconds < self.figures[run].seconds:
            self.figures[run] = figure
        kind = "quantized" if run.work == "ladder" else run.work
        same = differ = 0
        for name, digest in figure.digests.items():
            key = (run.model, kind, name)
            same, differ = same + (self.known.get(key) == digest), differ + (self.known.get(key, digest) != digest)
            self.known.setdefault(key, digest)
        if "DIFFER" not in self.verdict.get(run, ""):
            self.verdict[run] = f"{differ} DIFFER" if differ else (f"{same} same" if same else "first")

    @property
    def equal(self) -> bool:
        return not any("DIFFER" in v for v in self.verdict.values())

    def estimate(self, run: Run, shapes: dict[str, Shape]) -> float | None:
        """Seconds that a run should take at most; None before the first."""
        seen = list(self.figures.values())
        if not seen:
            return None
        overhead = max(f.total_s - f.seconds for f in seen)
        model = [f for f in seen if f.run.model == run.model]
        same = [f for f in model if f.run.work == run.work]
        if same:
            return overhead + min(f.seconds * f.run.gpus for f in same) / run.gpus
        known = model or seen
        unit = max(f.seconds * f.run.gpus / USUAL[f.run.work] / shapes[f.run.model].linears for f in known)
        return overhead + unit * USUAL[run.work] * shapes[run.model].linears / run.gpus


def ordered(models: Sequence[str], works: Sequence[str], counts: Sequence[int]) -> list[Run]:
    """What matters most first: the first model on most GPUs and on fewest, then the others, then the counts between."""
    ends = list(dict.fromkeys((max(counts), min(counts))))
    between = sorted(set(counts) - set(ends), reverse=True)
    works = list(dict.fromkeys(("measure", *works)))  # everything else goes by a measurement
    short, long = [w for w in works if w != "ladder"], [w for w in works if w == "ladder"]
    first, *others = models
    runs = [Run(first, w, n) for some in (short, long) for n in ends for w in some]
    runs += [Run(m, w, n) for m in others for n in ends for w in works]
    runs += [Run(m, w, n) for m in models for n in between for w in works]
    return runs


class Bench:
    def __init__(self, args: argparse.Namespace, output: Output) -> None:
        self.begin = time.monotonic()
        self.args, self.output, self.results = args, output, Results()
        layers = {"70b": args.layers_70b, "mixtral": args.layers_mixtral}
        self.shapes = {m: replace(SHAPES[m], layers=layers.get(m, SHAPES[m].layers)) for m in args.models}
        self.counts = sorted({min(n, available(args.device)) for n in args.gpus})
        self.place = Path(tempfile.mkdtemp(prefix="exl2ray-scaling-", dir=self._where()))
        self.measurements: dict[str, Path] = {}
        self.late = False  # the budget has ended while something ran
        self.ray = self._start_ray()

    def _start_ray(self) -> Cluster:
        """One Ray for all runs: each of them has workers of its own."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of workers
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would leave one in the home directory
        node = {"num_cpus": max(os.cpu_count() or 1, *self.counts), "include_dashboard": False,
                "object_store_memory": store_bytes()}  # fmt: skip
        if self.args.device == "cuda":
            node["num_gpus"] = torch.cuda.device_count()
        return Cluster(initialize_head=True, head_node_args=node)

    @property
    def remaining(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begin) - CLOSING_SECONDS

    def _where(self) -> str:
        """A file system in memory if everything fits into half of it; else that of temporary files."""
        if self.args.place is not None:
            self.args.place.mkdir(parents=True, exist_ok=True)
            return str(self.args.place)
        needed = sum(s.bytes for s in self.shapes.values()) + 2 * max(s.bytes for s in self.shapes.values())
        memory = Path("/dev/shm")
        return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed else tempfile.gettempdir()

    def run(self) -> None:
        args = self.args
        device = torch.cuda.get_device_name(0) if args.device == "cuda" else f"CPU ({os.cpu_count()} cores)"
        self.output.say("machine", device=device, gpus=self.counts, place=str(self.place.parent), quality=args.quality,
                        torch=torch.__version__, layers={m: s.layers for m, s in self.shapes.items()})  # fmt: skip
        compiled = any(Path(os.environ["NUMBA_CACHE_DIR"]).glob("**/kernels.*.nbi"))
        if args.device == "cuda" and not args.no_warm and not compiled:
            self._warm()
        for run in args.repeat * ordered(args.models, args.work, self.counts):
            self._step(run)

    def _warm(self) -> None:
        """Compiles the kernels into the cache on disk."""
        start = time.monotonic()
        model = self.place / "warm"
        build(model, SHAPES["tiny"])
        options = self._options(TINY_LENGTH)
        with self._limited():
            figure = execute(Run("warm", "measure", 1), model, self.place, None, options, self._warn)
            kept = self.place / "warm-measurement-1.json"
            execute(replace(figure.run, work="quantized"), model, self.place, kept, options, self._warn)
        self.output.say("kernels compiled", seconds=round(time.monotonic() - start, 1))

    def _step(self, run: Run) -> None:
        needed = self.results.estimate(run, self.shapes)
        if run.work != "measure" and run.model not in self.measurements:
            self._leave_out(run, "no measurement")
        elif self.remaining < (1.0 if needed is None else MARGIN * needed):
            self._leave_out(run, "no time left" if needed is None else f"about {needed:.0f} s, {self.remaining:.0f} left")
        else:
            try:
                with self._limited():
                    self._execute(run)
            except Exl2RayError as e:
                self.results.failed = True
                self._leave_out(run, f"failed: {e}")
            except BaseException:  # Ray wraps what a signal handler raises into a SystemError
                if not self.late:
                    raise
                self._leave_out(run, "stopped: the time was used up")

    def _execute(self, run: Run) -> None:
        model = self._model(run.model)
        length = TINY_LENGTH if run.model.startswith("tiny") else self.args.length
        options = self._options(length)
        if run.work == "ladder":
            options["bits"] = self.shapes[run.model].ladder
        figure = execute(run, model, self.place, self.measurements.get(run.model), options, self._warn, self.args.events)
        if run.work == "measure":
            self.measurements.setdefault(run.model, self.place / f"{run.model}-measurement-{run.gpus}.json")
        self.results.add(figure)
        self.output.say("run", **told(figure), bytes=self.results.verdict[run], **self._simulated(run))

    def _options(self, length: int) -> dict[str, Any]:
        return {"length": length, "measurement_length": length, "device": self.args.device, "quality": self.args.quality,
                "ray_address": self.ray.address}  # fmt: skip

    def _model(self, name: str) -> Path:
        path = self.place / name
        if not (path / "config.json").exists():
            start = time.monotonic()
            build(path, self.shapes[name])
            self.output.say("model", model=name, seconds=round(time.monotonic() - start, 1),
                            gb=round(sum(p.stat().st_size for p in path.iterdir()) / 1e9, 3))  # fmt: skip
        return path

    def _leave_out(self, run: Run, why: str) -> None:
        self.results.left_out[run] = why
        self.output.say("left out", **asdict(run), why=why)

    def _warn(self, message: str) -> None:
        self.output.say("warning", message=message)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """OutOfTime in this thread when the budget ends."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.late = True
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self.remaining))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

    # ---- the simulation ----------------------------------------------------------------------------------------

    def observed(self) -> Observed:
        """Seconds of calls, of the runs on fewest GPUs."""
        runs = [f for f in self.results.figures.values() if f.run.gpus == min(self.counts)]
        device = torch.cuda.get_device_name(0) if self.args.device == "cuda" else "CPU"
        source = f"scripts/scaling.py, {device}, quality {self.args.quality}, {', '.join(self.args.models)}"
        names = {m: s.full or m for m, s in self.shapes.items()}
        return observe(source, [(names[f.run.model], self.shapes[f.run.model].layers, f) for f in runs])

    def _own_costs(self) -> Costs:
        """The simulation's costs of the models that have run on one GPU, corrected by the calls of these runs."""
        costs, seen = Costs.load(simulate.COSTS), self.observed()
        known = {s.full or m: costs.models.get(s.full) or ModelCosts.parse(estimated(s)) for m, s in self.shapes.items()}
        return seen.corrected(replace(costs, models={m: c for m, c in known.items() if m in seen.models}))

    def _predicted(self, run: Run, costs: Costs) -> float | None:
        """Seconds that the simulation says; None for models that it does not know."""
        name = self.shapes[run.model].full or run.model
        if name not in costs.models:
            return None
        return simulate.predict(costs, name, run.work, run.gpus, self.shapes[run.model].layers).seconds

    def _simulated(self, run: Run) -> dict[str, Any]:
        return {"simulated": self._predicted(run, Costs.load(simulate.COSTS))} if self.args.compare else {}

    # ---- the end -----------------------------------------------------------------------------------------------

    def finish(self) -> int:
        if self.args.costs is not None:
            self.args.costs.write_text(self.observed().to_json(), encoding="utf-8")
        for line in self._table():
            self.output.line(line)
        if not self.results.equal:
            self.output.line("The number of GPUs CHANGED BYTES: see the last column.")
        return 0 if self.results.equal and not self.results.failed else 1

    def _table(self) -> Iterator[str]:
        """Markdown. Speed-up and efficiency are over the fewest GPUs that did the same."""
        head = ["model", "work", "GPUs", "seconds", "speed-up", "efficiency", "no call, s", "busy", "moved, GB",
                "start, s", "write, s"]  # fmt: skip
        if self.args.compare:
            head += ["simulated, s", "speed-up", "with own costs, s"]
            simulated = Costs.load(simulate.COSTS)
            own = self._own_costs()
        head.append("bytes")
        yield from ("", f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2))
        figures = self.results.figures
        place = {r: i for i, r in enumerate(ordered(self.args.models, WORKS, self.counts))}
        for run in sorted(figures, key=lambda r: (self.args.models.index(r.model), WORKS.index(r.work), r.gpus, place[r])):
            f = figures[run]
            base = min((r for r in figures if (r.model, r.work) == (run.model, run.work)), key=lambda r: r.gpus)
            up = figures[base].seconds / f.seconds
            cells = [run.model, run.work, str(run.gpus), f"{f.seconds:.2f}", f"{up:.2f}", f"{up * base.gpus / run.gpus:.0%}",
                     f"{f.driver_s:.2f}", f"{f.busy:.0%}", f"{f.moved_gb:.3f}",
                     f"{f.start_s:.1f}", f"{f.write_s:.1f}"]  # fmt: skip
            if self.args.compare:
                said = [self._predicted(r, c) for r, c in ((run, simulated), (base, simulated), (run, own))]
                ratio = said[1] / said[0] if said[0] and said[1] else None
                cells += [shown(said[0], 2), shown(ratio, 2), shown(said[2], 2)]
            yield f"| {' | '.join([*cells, self.results.verdict[run]])} |"
        for run, why in self.results.left_out.items():
            if run in figures:  # another time
                continue
            yield f"| {run.model} | {run.work} | {run.gpus} | {why.splitlines()[0]} |" + " |" * (len(head) - 4)


def estimated(s: Shape) -> dict[str, Any]:
    """Costs of a shape, as costs.json has them."""
    kv = s.hidden // s.heads * s.kv_heads
    experts = (s.experts, 2) if s.experts else (1, 1)
    return estimate_costs.costs(estimate_costs.Shape(s.layers, s.hidden, s.wide, kv, *experts))


def told(f: Figure) -> dict[str, Any]:
    """A figure as a line of JSON has it; calls by method: how many, and their seconds."""
    out = {**asdict(f.run)}
    for name in ("seconds", "start_s", "write_s", "total_s", "driver_s", "busy", "moved_gb"):
        value = getattr(f, name)
        out[name] = round(value, 4) if isinstance(value, float) else value
    calls = {m: [c.seconds for c in f.calls if c.method == m] for m in dict.fromkeys(c.method for c in f.calls)}
    out["calls"] = {m: [len(s), round(sum(s), 3)] for m, s in calls.items()}
    out["items"] = [[key, round(seconds, 3), round(gb, 6)] for key, seconds, gb in f.items]
    out["sha256"] = {name: digest[:16] for name, digest in f.digests.items() if name.endswith((".json", ".safetensors"))}
    return out


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def available(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["70b", "mixtral"])
    parser.add_argument("--layers-70b", type=int, default=SHAPES["70b"].layers)
    parser.add_argument("--layers-mixtral", type=int, default=SHAPES["mixtral"].layers)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="as far as there are so many")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--seconds", type=float, default=570.0, help="when everything has to be over")
    parser.add_argument("--quality", choices=("reference", "balanced"), default="reference")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row; 128 for tiny models")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="a file for everything that is printed")
    parser.add_argument("--place", type=Path, help="where models and work go; /dev/shm, or the temporary folder")
    parser.add_argument("--compare", action="store_true", help="print what scripts/simulate.py says beside it")
    parser.add_argument("--costs", type=Path, help="write the seconds of single calls here, for scripts/estimate_costs.py")
    parser.add_argument("--events", type=Path, help="a folder for the event logs of all runs")
    parser.add_argument("--repeat", type=int, default=1, help="go through all runs so often; the table has the fastest")
    parser.add_argument("--no-warm", action="store_true", help="do not compile kernels beforehand")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --device cpu --models tiny shows how it works")
    args.models = list(dict.fromkeys(args.models))
    bench = Bench(args, Output(args.out))
    try:
        bench.run()
    except (OutOfTime, Exception) as e:  # what was measured so far is still to be shown
        bench.results.failed = True
        bench.output.say("error", message=f"{type(e).__name__}: {e}", trace=traceback.format_exc())
    finally:
        bench.ray.shutdown()
        shutil.rmtree(bench.place, ignore_errors=True)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
