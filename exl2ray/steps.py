"""The steps of a conversion, over one work directory and one set of workers. `exl2ray.convert` calls them in order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from exl2ray.allocation.overrides import Override, overridden, parse_overrides
from exl2ray.allocation.planning import Plan, choose, has_sensitivities, insensitive, module_cost, slot_weights
from exl2ray.calibration.data.taken import described_passes
from exl2ray.calibration.output_files import tokenizer_output
from exl2ray.calibration.soundness import baseline
from exl2ray.devices import pick_executor, versions
from exl2ray.dist.chains import ChainPlan, Chains, Link
from exl2ray.dist.fan import Fan, Module, Part, window_for
from exl2ray.dist.items import ItemResult, MeasureItem, PerplexityItem, QuantizeItem, SensitivityItem, WorkerSetup
from exl2ray.dist.pool import Pool, Task
from exl2ray.dist.probing import PROBES, deal, sensitivities, sensitivity_key, share_rows_out
from exl2ray.dist.schedule import Flow, Limits, Scheduler
from exl2ray.dist.session import Session, open_session
from exl2ray.dist.worker import PERPLEXITY, Worker, describe, measure_record
from exl2ray.errors import NumericError, UsageError
from exl2ray.events import Reporter
from exl2ray.formats.elsewhere import place_of
from exl2ray.formats.layout import QParams, pad32
from exl2ray.formats.measurement import (
    Measurement,
    ModuleProfile,
    write_measurement,
)
from exl2ray.formats.origin import source_identity
from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.opening import allowed_changes, falls_back, job_of, measurement_target
from exl2ray.outputs import OutputSummary
from exl2ray.plan.problems import examine, row_sizes
from exl2ray.quality import Numerics
from exl2ray.quant.losses import merged
from exl2ray.quant.measure import profile_of
from exl2ray.quant.measure_moe import starved_experts
from exl2ray.recipe import JOB_FLAGS, Recipe, bpw_name
from exl2ray.remote.source import keep
from exl2ray.result_warnings import ResultWarnings, insensitive_warning, is_broken, measured_experts, show, unspent_warning
from exl2ray.source_state import SourceState, needed_files
from exl2ray.stopping import shielded
from exl2ray.store.faults import translated
from exl2ray.store.fs import Store
from exl2ray.store.layout import CALIBRATION, MEASURE, MEASUREMENT, SOURCE_KEY, quant_kind
from exl2ray.store.pace import Pace
from exl2ray.store.records import Record, Records, hash_inputs
from exl2ray.store.tensors import put_tensors
from exl2ray.store.workdir import WorkDir
from exl2ray.targets import Targets, owner_of, places
from exl2ray.units import parse_size
from exl2ray.writing import OutputWriter

PROFILE = 3  # what a measured module's record holds; earlier ones, without losses, are not used
CALIBRATION_KEY = "calibration"  # record of the rows of tokens; every job has one


class Job:
    """One conversion in progress. A context manager: opens the work directory and the workers, and closes them.

    ``dry``: only the checks; nothing is written and no worker starts. ``writes``: the recipe with other outputs, for what is
    said of them at the start.
    """

    def __init__(self, recipe: Recipe, reporter: Reporter, dry: bool = False, writes: Recipe | None = None) -> None:
        self.recipe, self.reporter, self.dry, self.writes = recipe, reporter, dry, writes or recipe
        self._beside = needed_files(recipe.in_dir)  # before they are read
        found = examine(recipe)
        found.raise_any()
        if found.source is None or found.spec is None or found.device is None:
            raise AssertionError("checks without a problem leave nothing out")
        self.source, self.device, self.rows = found.source, found.device, found.rows
        self.spec: ModelSpec = found.spec
        self._measurement_given, self._data = found.measurement, found.data
        self._tokenizer_files = {} if found.tokenizer is None else tokenizer_output(recipe.in_dir, found.tokenizer)
        given = found.measurement
        if falls_back(recipe, self.spec, given):  # --allocation was not asked for
            recipe = self.recipe = replace(recipe, allocation="module")
            self.reporter.event("note", message="-m holds no sensitivities: options are chosen per module")
        self.limits = Limits()
        self._session: Session | None = None
        self._scheduler: Scheduler | None = None
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
        self.job = job_of(recipe, self.source, self.spec, self.rows, self._data)
        stored = WorkDir.read_job(recipe.out_dir)
        self.work = WorkDir.create_or_resume(
            recipe.out_dir, self.job, resume=not recipe.no_resume, versions=versions(),
            allow_changed=allowed_changes(recipe, stored), flags=JOB_FLAGS,
            begin=lambda: self._tell_of_start(stored is not None and not recipe.no_resume),
        )  # fmt: skip
        self.targets = Targets()
        try:
            for note in self.work.notes:
                self.reporter.event("note", message=note)
            self.warnings.opened(self.work)
            for note in keep(recipe.in_dir, self.work.store):
                self.reporter.event("note", message=note)
            self.source_state = SourceState(self.work, self.source, self.job["identity"]["fingerprint"], self._beside)
            self.source_state.open()
            self.warnings.add(self.source_state.warnings)
            self._store_rows()
        except BaseException:
            self.work.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.dry:
            return
        with shielded():  # a second signal waits for the locks to be released
            try:
                if self._session is not None:
                    self._session.close()
                for note in self.work.records.notes:
                    self.reporter.event("note", message=note)
            finally:
                self.targets.close()
                self.work.close()

    def _tell_of_start(self, resumed: bool) -> None:
        """Before anything is written: a resume has its source and its targets from a file."""
        recipe = self.recipe
        records = Records(Store.open(recipe.out_dir)).scan(MEASURE) if resumed else {}
        self.reporter.event(
            "start", model=recipe.in_dir, architecture=self.spec.arch.name, modules=len(self.spec.modules),
            bits=list(recipe.bits), device=str(self.device), workers=recipe.gpus or 0,
            resumed=any(key not in (CALIBRATION_KEY, SOURCE_KEY) for key, _ in records), **places(self.writes),
        )  # fmt: skip

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

    @property
    def session(self) -> Session:
        """The workers; started on first use, so that a finished job starts none."""
        if self._session is None:
            recipe = self.recipe
            setup = WorkerSetup(
                in_dir=place_of(recipe.in_dir),
                source_cache=parse_size(recipe.source_cache, "--source-cache"),
                work_root=self.work.store.root,
                device=self.device.type,
                rope_scale=recipe.rope_scale,
                rope_alpha=recipe.rope_alpha,
                damping=recipe.damping,
                moe_all_experts=recipe.moe_all_experts,
                numerics=recipe.numerics,
                rotate=recipe.rotate,
                checkpoint_seconds=recipe.checkpoint_seconds,
                calibration=CALIBRATION,
                calibration_sha256=self.calibration_sha256,
                perplexity_rows=row_sizes(recipe, self.rows).reported,
                threads=torch.get_num_threads(),  # sums depend on it, so it does not depend on the number of workers
                nonce=self.work.nonce_check(),
                versions=versions(),
            )
            state_bytes = max(self._state_bytes(name) for name in self.rows)
            self._session = open_session(
                setup, Worker, pick_executor(recipe, self.device), recipe.gpus, recipe.ray_address, state_bytes
            )
        return self._session

    @property
    def scheduler(self) -> Scheduler:
        if self._scheduler is None:
            self._scheduler = Scheduler(self.session, self.limits, self._scheduled)
        return self._scheduler

    @property
    def _ships(self) -> bool:
        """Whether reference states travel between workers: a GPU computes them again in less time than that takes."""
        return self.device.type != "cuda"

    def _state_bytes(self, rows: str) -> int:
        """Bytes of the hidden states of a set of calibration rows between two modules."""
        width = 4 if self.spec.hyper.state_dtype == "float32" else 2
        return self.rows[rows].ids.numel() * self.spec.hyper.hidden_size * width

    # ---- measure -----------------------------------------------------------------------------------------------

    @property
    def measurement_path(self) -> str:
        return self.recipe.measurement or self.work.store.full_name(MEASUREMENT)

    def _measured(self) -> list[ModuleSpec]:
        return [m for m in self.spec.modules if m.quantized]

    def _profiled(self) -> list[ModuleSpec]:
        """Those that the measurement pass goes through; the head only where its bits may be chosen."""
        return self._measured() + ([self.spec.modules[-1]] if self.recipe.allocates == "linear" else [])

    def measure(self) -> Measurement:
        """Profiles of all modules, measured or (with -m) read from a file."""
        if self._measurement_given is not None:
            return self._measurement_given
        settings = self.job["measure"]
        common = hash_inputs(
            **self._source_hash(), damping=settings["damping"], rows=self.measure_rows_sha256, profile=PROFILE,
            **self._all_experts(),
        )  # fmt: skip
        keys = {m.index: hash_inputs(common=common, module=m.profile_key) for m in self._profiled()}
        profiles: dict[int, ModuleProfile] = {}
        for module in self._profiled():
            record = self.work.records.find(MEASURE, module.profile_key, keys[module.index])
            if record is not None:
                profiles[module.index] = _profile(module, record.payload)
        todo = [m for m in self._profiled() if m.index not in profiles]
        if todo:
            session = self.session  # its start is no part of the stage
            with self._stage("measure", len(keys), len(profiles)) as progress:

                def done(module: ModuleSpec, result: ItemResult) -> None:
                    profiles[module.index] = _profile(module, result.payload)
                    progress(result)

                fan = Fan(
                    "measure",
                    [
                        Module(m.index, m.profile_key, module_cost(m), partial(self._measure_parts, m, keys[m.index], done))
                        for m in todo
                    ],
                    session,
                    window_for(session, self._state_bytes("measure")),
                    ship=self._ships,
                    limits=self.limits,
                )
                self.scheduler.run(fan)
                self.work.event("states", stage="measure", window=fan.window, peak=fan.peak_states)
        measurement = self._with_sensitivities(self._assemble(profiles))
        write_measurement_to(self.work, measurement)
        self.warnings.add(measured_experts(measurement), tell=False)  # each module has
        return measurement

    def _measure_parts(
        self, module: ModuleSpec, inputs_hash: str, done: Callable[[ModuleSpec, ItemResult], None], count: int
    ) -> list[Part]:
        """The calls that measure an entered module: one, or one for each of ``count`` ranges of its option table."""

        def found() -> ItemResult | None:
            record = self.work.records.find(MEASURE, module.profile_key, inputs_hash)
            return None if record is None else self._found(record)

        if count == 1 or module.kind == "head":
            return [Part("measure", MeasureItem(module.index, inputs_hash), partial(done, module), found)]
        results: dict[int, ItemResult] = {}

        def part_done(p: int, result: ItemResult) -> None:
            results[p] = result
            if len(results) == count:
                done(module, self._merge_parts(module, inputs_hash, [results[i] for i in range(count)]))

        items = [MeasureItem(module.index, inputs_hash, (p, count)) for p in range(count)]
        return [Part("measure", item, partial(part_done, p)) for p, item in enumerate(items)]

    def _merge_parts(self, module: ModuleSpec, inputs_hash: str, results: Sequence[ItemResult]) -> ItemResult:
        """Joins the parts of a module in order and commits the whole: a lost driver costs one module's parts at most."""
        tables = zip(*(r.payload["lists"] for r in results), strict=True)
        lists = [[option for part in table for option in part] for table in tables]
        notes: list[str] = []
        profile = profile_of(module, lists, merged([r.payload["extra"] for r in results]), notes.append)
        record = measure_record(profile, inputs_hash, notes, sum(r.seconds for r in results))
        self.work.records.commit(record)
        detail = f"{describe(profile)}, in {len(results)} parts"
        return ItemResult(record.key, record.seconds, detail, record.payload, tuple(notes), results[-1].worker)

    def _found(self, record: Record) -> ItemResult:
        """The result of an item whose worker was lost after it had committed."""
        self.work.event("found", key=record.key, kind=record.kind)
        return ItemResult(record.key, record.seconds, "done before its worker was lost", record.payload, (), record.worker)

    def _with_sensitivities(self, measurement: Measurement) -> Measurement:
        """The measurement with the sensitivities of all linears, measured where they are missing and needed."""
        if self.recipe.allocates != "linear" or has_sensitivities(self.spec, measurement):
            return measurement
        shares, tokens = share_rows_out(self.rows["measure"].kinds, self.rows["measure"].ids.shape[1])
        probes = [PROBES, [list(rows) for rows in shares.values()], tokens]
        inputs_hash = hash_inputs(**self._source_hash(), rows=self.measure_rows_sha256, probes=probes)
        sums = self._stored_sums(shares, inputs_hash)
        todo = {n: rows for n, rows in shares.items() if n not in sums}
        if todo:
            self._run_backward(todo, tokens, inputs_hash, sums)
        found = sensitivities(self.spec, sums, tokens * sum(len(rows) for rows in shares.values()))
        profiles = []
        for p in measurement.profiles:
            more = {"sensitivity": found[p.entry_key]} if p.entry_key in found else {}
            profiles.append(replace(p, extra={**p.extra, **more}))
        return replace(measurement, profiles=tuple(profiles))

    def _stored_sums(self, shares: Iterable[int], inputs_hash: str) -> dict[int, Any]:
        """What shares of the backward pass that are finished have found."""
        records = {n: self.work.records.find(MEASURE, sensitivity_key(n), inputs_hash) for n in shares}
        return {n: r.payload["sums"] for n, r in records.items() if r is not None}

    def _run_backward(
        self, todo: Mapping[int, tuple[int, ...]], tokens: int, inputs_hash: str, sums: dict[int, Any]
    ) -> None:
        """Runs the shares ``todo`` of the backward pass; ``sums`` gets their results."""
        # On a GPU every worker reads the model once; on a CPU reading costs little beside a share, which takes long.
        hands = deal(todo, self.session.size if self.device.type == "cuda" else len(todo))
        cost = sum(module_cost(m) for m in self.spec.modules)
        with self._stage("sensitivity", len(hands), 0) as progress:

            def done(result: ItemResult) -> None:
                sums.update(result.payload["sums"])
                progress(result)

            def task(hand: dict[int, tuple[int, ...]]) -> Task:
                item = SensitivityItem(hand, tokens, inputs_hash)
                return Task("sensitivity", item, item.name, cost * len(hand), done, partial(self._found_sums, item))

            self.scheduler.run(Pool([task(hand) for hand in hands]))

    def _found_sums(self, item: SensitivityItem) -> ItemResult | None:
        """The result of a call whose worker was lost after it had committed all of it."""
        found = self._stored_sums(item.shares, item.inputs_hash)
        if len(found) < len(item.shares):
            return None
        record = self.work.records.find(MEASURE, sensitivity_key(next(iter(item.shares))), item.inputs_hash)
        return None if record is None else replace(self._found(record), key=item.name, payload={"sums": found})

    def _assemble(self, profiles: Mapping[int, ModuleProfile]) -> Measurement:
        out = []
        for module in self.spec.modules:
            key, mode = module.profile_key.rsplit(".", 1)
            if module.quantized:
                out.append(profiles[module.index])
            elif mode in ("norm", "linear", "pos_emb"):
                out.append(profiles.get(module.index, ModuleProfile(key, mode)))
        rotation = None if self.spec.rotation is None else self.spec.rotation.identity()
        return Measurement(tuple(out), len(self.spec.modules) - 1, rotation, source_identity(self.source))

    def export_measurement(self, measurement: Measurement) -> str:
        """Writes measurement.json where -om asks for it: a file, or a directory to put it into."""
        self.source_state.check()
        path = measurement_target(self.recipe.output_measurement or "")
        with translated("create", str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_measurement(path, measurement)
        self.reporter.event("note", message=f"measurement written to {path}")
        return str(path)

    # ---- allocate ----------------------------------------------------------------------------------------------

    def allocate(self, measurement: Measurement, bits: float) -> Plan:
        """Option of every linear at one bitrate."""
        overrides = parse_overrides(self.recipe.overrides, self.spec)
        chosen = choose(self.spec, measurement, bits, self.recipe, overrides)
        allocation, params = chosen.allocation, chosen.params
        hashes = self._plan_hashes(params)
        weights = slot_weights(self.spec)
        size = {
            x.key: params[x.key].total_bits(x.in_features, pad32(x.out_features), x.has_bias) for x in self.spec.linears
        }
        head = self.spec.modules[-1].linears[0]
        achieved = (sum(size.values()) - size[head.key]) / weights
        self.work.event(
            "allocated", bits=bits, bpw=achieved, gap=allocation.gap, choice=list(allocation.choice),
            allocation=self.recipe.allocates, head=params[head.key].desc, predicted_kl=chosen.predicted_kl,
        )  # fmt: skip
        message = f"{bits:g} bpw: allocation uses {achieved:.4f} bits per weight"
        if self.recipe.head_is_free:
            message += f", {size[head.key] / (head.in_features * pad32(head.out_features)):.4f} for the head"
        message += f", within {max(0.0, allocation.gap) * 100:.4f} % of the optimum"
        if chosen.predicted_kl is not None:
            message += f"; predicted KL {chosen.predicted_kl:.4g}"
        self.reporter.event("note", message=message)
        if self.recipe.allocates == "linear":
            self.warnings.add(insensitive_warning(*insensitive(self.spec, measurement)), bits)
        self.warnings.add(unspent_warning(bits, achieved, allocation.unspent, bool(overrides)), bits)
        return Plan(bits, params, hashes, achieved, sum(size.values()) // 8, chosen.predicted_kl)

    def patch(self, plan: Plan, overrides: Sequence[Override]) -> Plan:
        """``plan`` with ``overrides`` on top, and nothing else changed: no other linear pays for them.

        Modules with another option get hashes of their own, so that only they are quantised again, on what the model
        produces as it is; the head too, for the perplexity that comes with it. Raises UsageError for an unfinished model.
        """
        missing = self._missing(plan)
        if missing:
            raise UsageError(
                f"{plan.bits:g} bpw: {len(missing)} modules are not quantised yet, {missing[0].profile_key} first",
                f"finish the conversion before patching it: exl2ray convert -o {self.recipe.out_dir}",
            )
        params = {x.key: overridden(overrides, x, plan.params[x.key]) for x in self.spec.linears}
        if params == plan.params:
            self.reporter.event("note", message=f"{plan.bits:g} bpw: every linear is as --set asks already")
            return plan
        hashes, before = [], ""
        for module in self.spec.modules:
            chosen = {x.key: params[x.key].desc for x in module.linears}
            value = plan.hashes[module.index]
            changed = [x.key for x in module.linears if params[x.key] != plan.params[x.key]]
            if changed or (module.kind == "head" and before):
                before = value = hash_inputs(patched=value, before=before, options=chosen)
                for key in changed:
                    message = f"{plan.bits:g} bpw: {key} from {plan.params[key].desc} to {params[key].desc}"
                    self.reporter.event("note", message=message)
            hashes.append(value)
        weights, total = slot_weights(self.spec), 0
        for x in self.spec.linears:
            total += params[x.key].total_bits(x.in_features, pad32(x.out_features), x.has_bias)
        head = self.spec.modules[-1].linears[0]
        head_bits = params[head.key].total_bits(head.in_features, pad32(head.out_features), head.has_bias)
        return Plan(plan.bits, params, tuple(hashes), (total - head_bits) / weights, total // 8)

    def _plan_hashes(self, params: Mapping[str, QParams]) -> tuple[str, ...]:
        """Per module the hash of all that its quantised form depends on: a chain, since states come from before."""
        settings = self.job["quantize"]
        value = hash_inputs(
            **self._source_hash(), damping=self.recipe.damping, rows=self.calibration_sha256, propagate=settings["propagate"],
            **self._all_experts(), **self._beyond_reference(),
        )  # fmt: skip
        out = []
        for module in self.spec.modules:
            chosen = {x.key: params[x.key].desc for x in module.linears}
            value = hash_inputs(before=value, module=module.profile_key, options=chosen)
            out.append(value)
        return tuple(out)

    # ---- quantise ----------------------------------------------------------------------------------------------

    def produce(
        self, plans: Sequence[Plan], patches: Sequence[str] = (), compile_full: str | None = None
    ) -> list[OutputSummary]:
        """Quantises and writes all bitrates. A bitrate is written as soon as it is complete, while others go on; one whose
        files are there already is left alone.

        ``patches``: texts of --set that were applied to the plans, for config.json. ``compile_full``: in place of -cf.
        """
        chosen = (*self.recipe.overrides, *patches)
        recipe = self.recipe
        if compile_full is not None:
            recipe = replace(recipe, compile_full=compile_full, bits=tuple(p.bits for p in plans))
        fingerprint, rows = self.job["identity"]["fingerprint"], len(self.rows["quantize"].ids)
        writer = OutputWriter(
            recipe, self.spec, self.source, self.work, fingerprint, rows, chosen, self.warnings, self._tokenizer_files,
            self.targets,
        )  # fmt: skip
        for plan in plans:
            writer.check(plan)
        self.targets.lock(recipe, [p.bits for p in plans], writer.owner)
        with ThreadPoolExecutor(1, "write") as pool:
            writing: dict[float, Future[OutputSummary]] = {}
            kept: dict[float, OutputSummary] = {}

            def complete(plan: Plan) -> None:
                records = writer.records(plan)
                self._examine_records(plan, records)
                found = writer.finished(plan, records)
                if found is not None:
                    kept[plan.bits] = found
                    where = found.directory or self.work.store.root
                    self.reporter.event("note", message=f"{plan.bits:g} bpw: {where} has the model already")
                    return
                self.reporter.event("stage", stage=_compile_stage(plan), items=1, done=0)
                writing[plan.bits] = pool.submit(writer.write, plan, records)

            def tick() -> None:
                for future in writing.values():
                    if future.done():
                        future.result()  # raises what went wrong as soon as it is known

            self.quantize(plans, complete, tick)
            outputs = []
            for plan in plans:
                if plan.bits in writing:
                    start = time.monotonic()
                    outputs.append(writing[plan.bits].result())
                    self.reporter.event("end", stage=_compile_stage(plan), seconds=time.monotonic() - start)
                else:
                    outputs.append(kept[plan.bits])
                names = [Path(f).name for f in outputs[-1].files]
                self.work.event("written", bits=plan.bits, directory=outputs[-1].directory, files=names)
            self.source_state.check()
            self.warnings.add(self.source_state.warnings)
            return outputs

    def _examine_records(self, plan: Plan, records: Mapping[int, Record]) -> None:
        """What the records of a finished bitrate say against it; for its card, so before that is written."""
        head, rows = self.spec.modules[-1], self.rows["quantize"].ids
        known = baseline(rows, row_sizes(self.recipe, self.rows).reported, head.linears[0].out_features)
        self.warnings.add_records(plan.bits, records, head.index, known)

    def quantize(
        self, plans: Sequence[Plan], complete: Callable[[Plan], None], tick: Callable[[], None] = lambda: None
    ) -> None:
        """Quantises all bitrates; ``complete(plan)`` as soon as the records of one are all there."""
        todo = {plan.bits: self._missing(plan) for plan in plans}
        stages: dict[float, _Stage] = {}
        if any(todo.values()):
            self.scheduler.last_error("")  # starts the workers before the clocks of the stages
        for plan in plans:
            if todo[plan.bits]:
                all_items = [m for m in self.spec.modules if m.linears]
                stage = self._stage(f"quantize {bpw_name(plan.bits)}", len(all_items), len(all_items) - len(todo[plan.bits]))
                stages[plan.bits] = stage.__enter__()

        def finish(plan: Plan) -> None:
            if plan.bits in stages:
                stages[plan.bits].__exit__(None, None, None)
            complete(plan)

        if self.recipe.propagate == "reference":
            flow: Flow | None = self._reference_flow(plans, todo, stages, finish)
        else:
            for plan in plans:
                if not todo[plan.bits]:
                    finish(plan)
            chains = [self._chain_plan(p, todo[p.bits], stages[p.bits], finish) for p in plans if todo[p.bits]]
            flow = Chains(chains, self.session, self.limits) if chains else None
        if flow is not None:
            self.scheduler.run(flow, tick)
        if isinstance(flow, Fan):
            self.work.event("states", stage="quantize", window=flow.window, peak=flow.peak_states)

    def _missing(self, plan: Plan) -> list[ModuleSpec]:
        kind = quant_kind(plan.bits)
        modules = [m for m in self.spec.modules if m.linears]
        return [m for m in modules if self.work.records.find(kind, m.profile_key, plan.hashes[m.index]) is None]

    def _found_module(self, plan: Plan, index: int) -> ItemResult | None:
        key = self.spec.modules[index].profile_key
        record = self.work.records.find(quant_kind(plan.bits), key, plan.hashes[index])
        return None if record is None else self._found(record)

    def _chain_plan(
        self, plan: Plan, todo: Sequence[ModuleSpec], stage: _Stage, finish: Callable[[Plan], None]
    ) -> ChainPlan:
        """One bitrate as a chain of modules. Modules after the first missing one are looked up when their turn comes."""
        links = [Link(m.index, m.profile_key, module_cost(m), {x.key: plan.params[x.key] for x in m.linears}) for m in todo]
        left = {link.index for link in links}

        def done(link: Link, result: ItemResult) -> None:
            stage(result)
            left.discard(link.index)
            if not left:
                finish(plan)

        return ChainPlan(plan.bits, plan.hashes, links, done, lambda link: self._found_module(plan, link.index))

    def _reference_flow(
        self,
        plans: Sequence[Plan],
        todo: Mapping[float, Sequence[ModuleSpec]],
        stages: Mapping[float, _Stage],
        finish: Callable[[Plan], None],
    ) -> Flow | None:
        """Modules on reference states, a part per bitrate; at the end the perplexity of each quantised model."""
        left = {plan.bits: {m.index for m in todo[plan.bits]} for plan in plans}

        def parts(module: ModuleSpec, count: int) -> list[Part]:
            def done(plan: Plan, result: ItemResult) -> None:
                stages[plan.bits](result)
                left[plan.bits].discard(module.index)

            return [
                Part(
                    "quantize",
                    QuantizeItem(
                        module.index, p.bits, {x.key: p.params[x.key] for x in module.linears}, p.hashes[module.index]
                    ),
                    partial(done, p),
                    partial(self._found_module, p, module.index),
                )
                for p in plans
                if module.index in left[p.bits]
            ]

        loose = []
        for plan in plans:
            if self.work.records.find(quant_kind(plan.bits), PERPLEXITY, plan.hashes[-1]) is None:
                done = partial(lambda p, result: finish(p), plan)
                ready = partial(lambda p: not left[p.bits], plan)
                loose.append(Part("perplexity", PerplexityItem(plan.bits, plan.hashes), done, ready=ready, joint=True))
            else:
                finish(plan)
        indices = sorted({i for some in left.values() for i in some})
        modules = [
            Module(m.index, m.profile_key, module_cost(m), partial(parts, m))
            for m in (self.spec.modules[i] for i in indices)
        ]
        if not modules and not loose:
            return None
        window = window_for(self.session, self._state_bytes("quantize"))
        return Fan("quantize", modules, self.session, window, loose, self._ships, self.limits)

    # ---- judge -------------------------------------------------------------------------------------------------

    def judge(self, outputs: list[OutputSummary]) -> None:
        """Refuses a model whose perplexity on calibration rows shows that something went wrong. Its files stay there."""
        for out in outputs:
            after, before = out.calibration_perplexity, out.reference_perplexity
            if is_broken(after, before):
                both = f"calibration perplexity {show(after)}, of the source model {show(before)}"
                raise NumericError(
                    f"{out.bits:g} bpw: {both}: the quantised model is broken",
                    f"the files are kept ({', '.join(out.files)}); check the source model and the calibration data",
                )

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _source_hash(self) -> dict[str, Any]:
        """What the source model adds to the hashes of results."""
        identity, rotation = self.job["identity"], self.spec.rotation
        found = {"fingerprint": identity["fingerprint"], "rope": [identity["rope_scale"], identity["rope_alpha"]]}
        return found if rotation is None else {**found, "rotation": rotation.identity()}

    def _all_experts(self) -> dict[str, bool]:
        """What --moe-all-experts adds to the hashes of results; nothing for a model without experts."""
        used = self.recipe.moe_all_experts and self.spec.arch.moe
        return {"moe_all_experts": True} if used else {}

    def _beyond_reference(self) -> dict[str, Any]:
        """What --quality adds to the hashes of quantised modules; nothing for the plain algorithm."""
        plain = asdict(Numerics())
        return {name: value for name, value in asdict(self.recipe.numerics).items() if value != plain[name]}

    def _scheduled(self, name: str, **fields: Any) -> None:
        """What the scheduler tells, for the event log and for people."""
        self.work.event(name, **fields)
        if name == "lost":
            self.reporter.event("warning", message=f"a worker was lost at {fields['key']} ({fields['reason']}); trying again")
        elif name == "retry":
            self.reporter.event("warning", message=f"{fields['key']}: {fields['reason']}")
        elif name == "note":
            self.reporter.event("note", message=fields["message"])

    def _stage(self, name: str, items: int, done: int) -> _Stage:
        return _Stage(self, name, items, done)


class _Stage:
    """Reports the beginning, items and end of a pass, and writes them to the event log."""

    def __init__(self, job: Job, name: str, items: int, done: int) -> None:
        self.job, self.name, self.items, self.done = job, name, items, done

    def __enter__(self) -> _Stage:
        self.start = time.monotonic()
        self.pace = Pace(self.items, self.done, 1, self.start)
        self.job.reporter.event("stage", stage=self.name, items=self.items, done=self.done)
        self.job.work.event("stage", stage=self.name, items=self.items, done=self.done)
        return self

    def __call__(self, result: ItemResult) -> None:
        self.done += 1
        now, workers = time.monotonic(), self.job.session.size
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


def _compile_stage(plan: Plan) -> str:
    return f"compile {bpw_name(plan.bits)}"


def rows_hash(ids: Tensor) -> str:
    """SHA-256 (hex) of rows of tokens, int64 (R, T). The shape counts: text of one's own is cut into rows where -l says."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_measurement_to(work: WorkDir, measurement: Measurement) -> None:
    """measurement.json in the work directory, if it is not there with this content."""
    data = measurement.to_bytes()
    if not work.store.exists(MEASUREMENT) or work.store.get(MEASUREMENT) != data:
        work.store.put(MEASUREMENT, data)


def _profile(module: ModuleSpec, payload: Mapping[str, Any]) -> ModuleProfile:
    value = payload["profile"]
    return ModuleProfile.from_json(module.profile_key, value["value"], value["extra"])


def _coverage(payload: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    """Tokens per expert of a measured or quantised module; empty for a dense one."""
    extra = payload["profile"]["extra"] if "profile" in payload else payload
    experts: Sequence[Mapping[str, float]] = extra.get("experts", ())
    return experts
