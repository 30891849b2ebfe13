"""One conversion in progress: its work directory, its workers, what identifies its results, and what is told of a pass."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from exl2ray import timeline
from exl2ray.calibration.data.taken import described_passes
from exl2ray.calibration.output_files import tokenizer_output
from exl2ray.datasets import reported_rows
from exl2ray.devices import pick_executor
from exl2ray.driver.actors import open_workers
from exl2ray.driver.policy import Limits
from exl2ray.driver.prometheus import ClusterMetrics
from exl2ray.driver.supervise import Supervisor
from exl2ray.driver.workers import Workers
from exl2ray.events import Reporter
from exl2ray.formats.elsewhere import place_of
from exl2ray.formats.side_files import needed_files
from exl2ray.formats.vision import vision_files
from exl2ray.job_opening import FALLEN_BACK, allowed_changes, falls_back, job_of
from exl2ray.model.spec import ModelSpec
from exl2ray.output.targets import Targets, owner_of, places
from exl2ray.plan.problems import examine
from exl2ray.quality import Numerics
from exl2ray.quant.measure_moe import starved_experts
from exl2ray.recipe import JOB_FLAGS, RUN, Recipe
from exl2ray.remote.source import keep
from exl2ray.result_warnings import ResultWarnings
from exl2ray.source_state import SourceState
from exl2ray.stopping import shielded
from exl2ray.store.file_names import CALIBRATION, CALIBRATION_KEY, MEASURE, MEASUREMENT, SOURCE_KEY
from exl2ray.store.job_file import StoredJob
from exl2ray.store.open import open_store
from exl2ray.store.pace import Pace
from exl2ray.store.records import Record, Records, hash_inputs
from exl2ray.store.tensors import put_tensors
from exl2ray.store.versions import versions
from exl2ray.store.workdir import WorkDir
from exl2ray.team.messages import Begun, ItemResult, WorkerSetup
from exl2ray.team.worker import Worker
from exl2ray.timeline import step
from exl2ray.units import parse_size


class Job:
    """One conversion in progress. A context manager: opens the work directory and the workers, and closes them.

    ``dry``: only the checks; nothing is written and no worker starts. ``writes``: the recipe with other outputs, for what is
    said of them at the start.
    """

    def __init__(self, recipe: Recipe, reporter: Reporter, dry: bool = False, writes: Recipe | None = None) -> None:
        self.recipe, self.reporter, self.dry, self.writes = recipe, reporter, dry, writes or recipe
        self._patches = writes is not None
        with step("checks"):
            self._beside = needed_files(recipe.in_dir)  # before they are read
            found = examine(recipe)
        found.raise_any()
        if found.source is None or found.spec is None or found.device is None:
            raise AssertionError("checks without a problem leave nothing out")
        self.source, self.device, self.rows = found.source, found.device, found.rows
        self.spec: ModelSpec = found.spec
        self.measurement_given, self._data = found.measurement, found.data
        self.side_files = vision_files(recipe.in_dir, found.source.config)  # in place of the source's, or beside them
        if found.tokenizer is not None:
            self.side_files |= tokenizer_output(recipe.in_dir, found.tokenizer)
        given = found.measurement
        if falls_back(recipe, self.spec, given):  # --allocation was not asked for
            recipe = self.recipe = replace(recipe, allocation="module")
            self.reporter.event("note", message=FALLEN_BACK)
        self.limits = Limits()
        self.began = False  # the first pass
        self._froze = False
        self._workers: Workers | None = None
        self._supervisor: Supervisor | None = None
        parts = [f"options chosen per {recipe.allocates}", recipe.numerics.describe()]
        if recipe.quality != "reference":
            self.reporter.event("note", message=f"quality {recipe.quality}: {', '.join(p for p in parts if p)}")
        if recipe.rotate:
            self.reporter.event("note", message="the residual stream is rotated: other weights, the same function")
        for warning in found.warnings:
            self.reporter.event("warning", message=warning)
        self.warnings = ResultWarnings(self.reporter)
        self.warnings.add((*found.doubts, *self.spec.warnings))
        of_rows = sorted({n for rows in self.rows.values() for n in rows.notes})
        for note in (*found.notes, *described_passes(self.rows), *of_rows):
            self.reporter.event("note", message=note)

    # ---- opening -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Job:
        recipe = self.recipe
        if self.dry:
            return self
        with step("fingerprint"):
            stored = WorkDir.read_job(recipe.out_dir)
            self.job = job_of(recipe, self.source, self.spec, self.rows, self._data, stored)
            if self._patches and stored is not None:  # how it is run says nothing of how the conversion is to be
                kept = {n: v for n, v in stored.job["output"].items() if n == RUN}
                self.job["output"] = {**{n: v for n, v in self.job["output"].items() if n != RUN}, **kept}
        with step("work directory"):
            self._open(recipe, stored)
        return self

    @property
    def score_rows(self) -> int | None:
        """Rows on which measuring scores the option tables; None: all."""
        found: int | None = self.job["measure"].get("score_rows")
        return found

    def _open(self, recipe: Recipe, stored: StoredJob | None) -> None:
        self.work = WorkDir.create_or_resume(
            recipe.out_dir, self.job, resume=not recipe.no_resume, versions=versions(),
            allow_changed=allowed_changes(recipe, stored), flags=JOB_FLAGS,
            begin=lambda: self._tell_of_start(stored is not None and not recipe.no_resume),
        )  # fmt: skip
        self.work.listener = ClusterMetrics(Path(recipe.out_dir).name).hear
        self.targets = Targets()
        self.source_state = SourceState(self.work, self.source, self.job["identity"]["fingerprint"], self._beside)
        try:
            for note in self.work.notes:
                self.reporter.event("note", message=note)
            self.warnings.opened(self.work)
            for note in keep(recipe.in_dir, self.work.store):
                self.reporter.event("note", message=note)
            self.source_state.open()
            self.warnings.add(self.source_state.warnings)
            self._store_rows()
        except BaseException:
            self.source_state.close()
            self.work.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.dry:
            return
        if self._froze:
            gc.unfreeze()
        with shielded():  # a second signal waits for the locks to be released
            self.source_state.close()
            try:
                self._end_workers()
                for note in self.work.records.notes:
                    self.reporter.event("note", message=note)
            finally:
                self.targets.close()
                self.work.close()

    def let_go(self) -> None:
        """For what comes after quantising: the workers end, so that GPUs are free, and -cf is let go, which tuning locks
        itself. The work directory stays this driver's."""
        self._end_workers()
        self.targets.close()

    def _end_workers(self) -> None:
        workers, self._workers, self._supervisor = self._workers, None, None
        if workers is not None:
            workers.close()

    def _tell_of_start(self, resumed: bool) -> None:
        """Before anything is written: a resume has its source and its targets from a file."""
        recipe = self.recipe
        records = Records(open_store(recipe.out_dir)).scan(MEASURE) if resumed else {}
        self.reporter.event(
            "start", model=recipe.in_dir, architecture=self.spec.arch.name, modules=len(self.spec.modules),
            bits=list(recipe.bits), device=str(self.device), workers=recipe.gpus or 0,
            resumed=any(key not in (CALIBRATION_KEY, SOURCE_KEY) for key, _ in records), **places(self.writes),
        )  # fmt: skip

    def freeze(self) -> None:
        """What was imported stays: a collection that looks at all of torch takes 0.15 s, while a GPU waits. Not where the
        program that calls has frozen something itself, which would be let go at the end.
        """
        if not gc.get_freeze_count():
            gc.freeze()
            self._froze = True

    def lock_targets(self) -> None:
        """Keeps other conversions out of the outputs until this one ends, so that of two the second does not work in vain."""
        owner = owner_of(self.recipe, self.job["identity"]["fingerprint"], self.work.id)
        self.targets.lock(self.recipe, self.recipe.bits, owner)

    def _store_rows(self) -> None:
        """Rows of tokens in the work directory, for the workers; their hash is part of every result's identity."""
        tensors = {name: rows.ids for name, rows in self.rows.items()}
        hashes = {name: rows_hash(t) for name, t in tensors.items()}
        self.measure_rows_sha256 = hashes["measure"]
        self.calibration_sha256 = hash_inputs(**hashes)
        found = self.work.records.find(MEASURE, CALIBRATION_KEY, self.calibration_sha256)
        if found is None:
            file = put_tensors(self.work.store, CALIBRATION, tensors)
            self.work.records.commit(Record(MEASURE, CALIBRATION_KEY, self.calibration_sha256, {}, (file,)))

    # ---- workers -----------------------------------------------------------------------------------------------

    @property
    def workers(self) -> Workers:
        """Started on first use, so that a finished job starts none."""
        if self._workers is None:
            executor = pick_executor(self.recipe, self.device)
            with step("workers"):
                self._workers = open_workers(self._setup(), Worker, executor, self.recipe.gpus, self.recipe.ray_address)
        return self._workers

    @property
    def supervisor(self) -> Supervisor:
        if self._supervisor is None:
            self._supervisor = Supervisor(self.workers, self.limits, self._told)
        return self._supervisor

    def _setup(self) -> WorkerSetup:
        recipe = self.recipe
        return WorkerSetup(
            in_dir=place_of(recipe.in_dir),
            source_cache=parse_size(recipe.source_cache, "--source-cache"),
            work_root=self.work.store.root,
            device=self.device.type,
            rope_scale=recipe.rope_scale,
            rope_alpha=recipe.rope_alpha,
            damping=recipe.damping,
            moe_all_experts=recipe.moe_all_experts,
            score_rows=self.score_rows,
            numerics=recipe.numerics,
            gradients=recipe.allocates == "linear" and recipe.measurement is None,
            rotate=recipe.rotate,
            checkpoint_seconds=recipe.checkpoint_seconds,
            calibration=CALIBRATION,
            calibration_sha256=self.calibration_sha256,
            perplexity_rows=reported_rows(recipe),
            threads=torch.get_num_threads(),  # sums depend on it, so it does not depend on the number of workers
            nonce=self.work.nonce_check(),
            versions=versions(),
        )

    # ---- helpers -----------------------------------------------------------------------------------------------

    def source_hash(self) -> dict[str, Any]:
        """What the source model adds to the hashes of results."""
        identity = self.job["identity"]
        rope = [identity["rope_scale"], identity["rope_alpha"]]
        return {"fingerprint": identity["fingerprint"], "rope": rope, **self.spec.rotation_entry}

    def all_experts(self) -> dict[str, bool]:
        """What --moe-all-experts adds to the hashes of results; nothing for a model without experts."""
        used = self.recipe.moe_all_experts and self.spec.arch.moe
        return {"moe_all_experts": True} if used else {}

    def scored(self) -> dict[str, int]:
        """What --score-rows adds to the hashes of measured modules."""
        return {} if self.score_rows is None else {"score_rows": self.score_rows}

    def beyond_reference(self) -> dict[str, Any]:
        """What --quality adds to the hashes of quantised modules; nothing for the plain algorithm."""
        plain = asdict(Numerics())
        return {name: value for name, value in asdict(self.recipe.numerics).items() if value != plain[name]}

    def _told(self, name: str, **fields: Any) -> None:
        """What the supervisor tells, for the event log and for people."""
        self.work.event(name, **fields)
        if name == "lost":
            self.reporter.event("warning", message=f"a worker was lost at {fields['key']} ({fields['reason']}); trying again")
        elif name == "retry":
            self.reporter.event("warning", message=f"{fields['key']}: {fields['reason']}")
        elif name == "note":
            self.reporter.event("note", message=fields["message"])

    def found(self, record: Record | None, begun: Begun, key: str = "") -> ItemResult | None:
        """The result of an item whose worker was lost after it had committed; None if it had not."""
        if record is None:
            return None
        words = "done before its worker was lost"
        return ItemResult(
            begun.index, key or record.key, record.seconds, words, record.payload, begun.bits, (), record.worker
        )

    @property
    def measurement_path(self) -> str:
        return self.recipe.measurement or self.work.store.full_name(MEASUREMENT)


def rows_hash(ids: Tensor) -> str:
    """SHA-256 (hex) of rows of tokens, int64 (R, T). The shape counts: text of one's own is cut into rows where -l says."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Stage:
    """Reports the beginning, items and end of a pass, and writes them to the event log."""

    def __init__(self, job: Job, name: str, items: int, done: int) -> None:
        self.job, self.name, self.items, self.done = job, name, items, done

    def __enter__(self) -> Stage:
        self.start = time.monotonic()
        self.pace = Pace(self.items, self.done, 1, self.start)
        self.job.reporter.event("stage", stage=self.name, items=self.items, done=self.done)
        if not self.job.began:
            self.job.began = True
            self.job.freeze()
            self.job.work.event("start", **timeline.taken())
        self.job.work.event("stage", stage=self.name, items=self.items, done=self.done)
        return self

    def __call__(self, result: ItemResult) -> None:
        self.job.source_state.settle()
        self.done += 1
        now, workers = time.monotonic(), self.job.workers.size
        self.pace.finished(self.done, now, result.worker, result.seconds, workers)
        fields: dict[str, Any] = {
            "stage": self.name, "key": result.key, "done": self.done, "items": self.items, "seconds": result.seconds,
            "worker": result.worker, "workers": workers, "queue": self.items - self.done,
            "eta_seconds": self.pace.eta_seconds(now),
        }  # fmt: skip
        self.job.work.event("item", **fields, received=result.received)
        self.job.reporter.event("item", **fields, detail=result.detail)
        for note in result.notes:
            self.job.reporter.event("note", message=f"{result.key}: {note}")
        starved = starved_experts(_coverage(result.payload))
        if starved:
            self.job.reporter.event("warning", message=f"{result.key}: {starved}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.job.reporter.event("end", stage=self.name, seconds=time.monotonic() - self.start)


def _coverage(payload: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    """Tokens per expert of a measured or quantised module; empty for a dense one."""
    extra = payload["profile"]["extra"] if "profile" in payload else payload
    experts: Sequence[Mapping[str, float]] = extra.get("experts", ())
    return experts
