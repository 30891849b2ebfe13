"""Quantising all bitrates of a job, either way of propagating states, and writing each while others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2ray.allocation.planning import Plan, module_cost
from exl2ray.calibration.soundness import baseline
from exl2ray.datasets import reported_rows
from exl2ray.driver.independent import PASSING, Independent, Item
from exl2ray.driver.sequential import Sequential
from exl2ray.errors import NumericError
from exl2ray.events import OutputSummary
from exl2ray.model.spec import ModuleSpec
from exl2ray.recipe import bpw_name
from exl2ray.result_warnings import is_broken
from exl2ray.steps.allocating import missing
from exl2ray.steps.job import Stage
from exl2ray.steps.patching import Wanted, kept, remember, warn_of_lost
from exl2ray.store.file_names import quant_kind
from exl2ray.store.records import Record
from exl2ray.team.messages import Begun, Choices, ItemResult, PerplexityPass, ReferencePass
from exl2ray.team.perplexity import PERPLEXITY
from exl2ray.wording import perplexity
from exl2ray.writing import OutputWriter

if TYPE_CHECKING:
    from exl2ray.filling import Filling
    from exl2ray.steps.job import Job


WRITERS = 3


def produce(
    job: Job, plans: Sequence[Plan], compile_full: str | None = None, patch: Wanted | None = None
) -> list[OutputSummary]:
    """Quantises and writes all bitrates. A bitrate is written as soon as it is complete, while others go on; one whose
    files are there already is left alone.

    ``compile_full``: in place of -cf. ``patch``: what a patch wants; without one, a model that was patched stays so.
    """
    recipe = job.recipe
    if compile_full is not None:
        recipe = replace(recipe, compile_full=compile_full, bits=tuple(p.bits for p in plans))
    fingerprint, rows = job.job["identity"]["fingerprint"], len(job.rows["quantize"].ids)
    writer = OutputWriter(
        recipe, job.spec, job.source, job.work, fingerprint, rows, job.warnings, job.tokenizer_files, job.targets
    )
    for plan in plans:
        writer.check(plan)
    plans = [(kept if patch is None else patch.of)(job, plan, writer.target(plan)) for plan in plans]
    for plan in plans:
        warn_of_lost(job, plan, writer.target(plan))
    job.targets.lock(recipe, [p.bits for p in plans], writer.owner)
    placing: dict[float, dict[int, Future[None]]] = {plan.bits: {} for plan in plans}  # by module; at -1 the rest
    with _Writers(writer.filling) as pool:
        filling = writer.filling
        writing: dict[float, Future[OutputSummary]] = {}
        there: dict[float, OutputSummary] = {}

        def done(plan: Plan, index: int) -> None:
            own = placing[plan.bits]
            if not own:
                own[-1] = pool.submit(filling.place_others, plan)
            if index not in own:  # a module that was given to two workers may be finished twice
                own[index] = pool.submit(filling.place, plan, index)

        def write(plan: Plan, records: Mapping[int, Record]) -> OutputSummary:
            for future in placing[plan.bits].values():  # begun before this, and none of them waits for another
                future.result()
            return writer.write(plan, records)

        def complete(plan: Plan) -> None:
            records = writer.records(plan)
            _examine_records(job, plan, records)
            found = writer.finished(plan, records)
            if found is not None:
                there[plan.bits] = found
                where = found.directory or job.work.store.root
                job.reporter.event("note", message=f"{plan.bits:g} bpw: {where} has the model already")
                return
            job.reporter.event("stage", stage=_compile_stage(plan), items=1, done=0)
            writing[plan.bits] = pool.submit(write, plan, records)

        def tick() -> None:
            futures: list[Future[Any]] = [*writing.values(), *chain.from_iterable(p.values() for p in placing.values())]
            for future in futures:
                if future.done():
                    future.result()  # raises what went wrong as soon as it is known

        quantize(job, plans, complete, tick, lambda plan: filling.begin(plan, writer.target(plan)), done)
        outputs = []
        for plan in plans:
            if plan.bits in writing:
                start = time.monotonic()
                outputs.append(writing[plan.bits].result())
                job.reporter.event("end", stage=_compile_stage(plan), seconds=time.monotonic() - start)
            else:
                outputs.append(there[plan.bits])
            remember(job.work, plan, writer.target(plan))
            names = [Path(f).name for f in outputs[-1].files]
            hashes = [plan.hashes[m.index][:16] for m in job.spec.modules if m.linears]
            where = {"directory": outputs[-1].directory, "files": names, "bytes": outputs[-1].file_bytes}
            job.work.event("written", bits=plan.bits, modules=hashes, **where)
        job.source_state.check()
        job.warnings.add(job.source_state.warnings)
        return outputs


class _Writers(ThreadPoolExecutor):
    """Threads that write: several, since one hashes no faster than 1 to 2 GB/s. What waits is dropped after an error.

    The shards are closed once none of them writes any more. A second Ctrl-C ends the wait for them, and shards stay open: a
    descriptor that is closed is given to the next file, and they would write into that.
    """

    def __init__(self, filling: Filling) -> None:
        super().__init__(WRITERS, "write")
        self._filling = filling

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.shutdown(wait=True, cancel_futures=kind is not None)
        self._filling.close()


def _examine_records(job: Job, plan: Plan, records: Mapping[int, Record]) -> None:
    """What the records of a finished bitrate say against it; for its card, so before that is written."""
    head, rows = job.spec.modules[-1], job.rows["quantize"].ids
    known = baseline(rows, reported_rows(job.recipe), head.linears[0].out_features)
    job.warnings.add_records(plan.bits, records, head.index, known)


def judge(outputs: list[OutputSummary]) -> None:
    """Refuses a model whose perplexity on calibration rows shows that something went wrong. Its files stay there."""
    for out in outputs:
        after, before = out.calibration_perplexity, out.reference_perplexity
        if is_broken(after, before):
            both = f"calibration perplexity {perplexity(after)}, of the source model {perplexity(before)}"
            raise NumericError(
                f"{out.bits:g} bpw: {both}: the quantised model is broken",
                f"the files are kept ({', '.join(out.files)}); check the source model and the calibration data",
            )


def _compile_stage(plan: Plan) -> str:
    return f"compile {bpw_name(plan.bits)}"


Told = Callable[[ItemResult], None]


def quantize(
    job: Job, plans: Sequence[Plan], complete: Callable[[Plan], None], tick: Callable[[], None] = lambda: None,
    prepare: Callable[[Plan], None] = lambda plan: None, done: Callable[[Plan, int], None] = lambda plan, index: None,
) -> None:  # fmt: skip
    """Quantises all bitrates; ``complete(plan)`` as soon as the records of one are all there.

    prepare: called before work for every bitrate that lacks something. done: told of each of its modules that has a record,
    by index.
    """
    todo = {plan.bits: missing(job, plan) for plan in plans}
    linear = [m for m in job.spec.modules if m.linears]
    for plan in (p for p in plans if todo[p.bits]):
        prepare(plan)
        for module in linear:
            if module not in todo[plan.bits]:
                done(plan, module.index)
    if any(todo.values()):
        _ = job.workers  # started before the clocks of the stages
    stages: dict[float, ExitStack] = {plan.bits: ExitStack() for plan in plans}
    progress: dict[float, Told] = {}
    for plan in plans:
        left = todo[plan.bits]
        if left:
            stage = Stage(job, f"quantize {bpw_name(plan.bits)}", len(linear), len(linear) - len(left))
            progress[plan.bits] = _both(stages[plan.bits].enter_context(stage), partial(done, plan))

    def finish(plan: Plan) -> None:
        stages[plan.bits].close()
        complete(plan)

    if job.recipe.propagate == "reference":
        _on_source_states(job, plans, todo, progress, finish, tick)
    else:
        _in_chains(job, plans, todo, progress, finish, tick)


def _both(told: Told, done: Callable[[int], None]) -> Told:
    def both(result: ItemResult) -> None:
        told(result)
        done(result.index)

    return both


def _in_chains(
    job: Job, plans: Sequence[Plan], todo: Mapping[float, Sequence[ModuleSpec]], progress: Mapping[float, Told],
    finish: Callable[[Plan], None], tick: Callable[[], None],
) -> None:  # fmt: skip
    """Each bitrate as a chain of modules, on what the quantised modules before produce."""
    by_bits = {plan.bits: plan for plan in plans}
    left = {bits: {m.index for m in modules} for bits, modules in todo.items()}
    for plan in plans:
        if not left[plan.bits]:
            finish(plan)

    def told(result: ItemResult) -> None:
        bits = result.bits or 0.0
        progress[bits](result)
        left[bits].discard(result.index)
        if not left[bits]:
            finish(by_bits[bits])

    chains = [(_choices(p), _items(todo[p.bits])) for p in plans if left[p.bits]]
    if chains:
        job.supervisor.run(Sequential(chains, job.workers, job.limits, told, _look_up(job, plans)), tick)


def _on_source_states(
    job: Job, plans: Sequence[Plan], todo: Mapping[float, Sequence[ModuleSpec]], progress: Mapping[float, Told],
    finish: Callable[[Plan], None], tick: Callable[[], None],
) -> None:  # fmt: skip
    """Module by module on the states of the source model, for all bitrates; then the perplexity of each."""
    wanted: dict[int, tuple[float, ...]] = {}
    for plan in plans:
        for m in todo[plan.bits]:
            wanted[m.index] = (*wanted.get(m.index, ()), plan.bits)
    modules = [job.spec.modules[i] for i in sorted(wanted)]
    all_choices = tuple(_choices(p) for p in plans)

    def call(indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> ReferencePass:
        own = {i: wanted[i] for i in indices}
        return ReferencePass(
            modules=indices, stretches=stretches, keep_from=keep_from, choices=all_choices, wanted=own
        )

    if modules:
        items = _items(modules, wanted)
        told: Told = lambda result: progress[result.bits or 0.0](result)  # noqa: E731
        look_up = _look_up(job, plans)
        work = Independent(items, call, job.workers, told, look_up, PASSING["quantize"], together=True)
        job.supervisor.run(work, tick)
    unknown = []
    for plan in plans:
        if job.work.records.find(quant_kind(plan.bits), PERPLEXITY, plan.hashes[-1]) is None:
            unknown.append(plan)
        else:
            finish(plan)
    if unknown:
        _perplexities(job, unknown, finish, tick)


def _perplexities(
    job: Job, plans: Sequence[Plan], finish: Callable[[Plan], None], tick: Callable[[], None]
) -> None:
    """Of finished models, which groups run; ``finish(plan)`` as soon as one is known."""
    by_bits = {plan.bits: plan for plan in plans}
    whole = Item(0, PERPLEXITY, sum(module_cost(m) for m in job.spec.modules))

    def look_up(begun: Begun) -> ItemResult | None:
        plan = by_bits.get(begun.bits or 0.0)
        if plan is None:
            return None
        return job.found(job.work.records.find(quant_kind(plan.bits), PERPLEXITY, plan.hashes[-1]), begun)

    chains = [(_choices(p), [whole]) for p in plans]
    told: Told = lambda result: finish(by_bits[result.bits or 0.0])  # noqa: E731
    make = lambda choices, modules: PerplexityPass(choices=choices)  # noqa: E731
    job.supervisor.run(Sequential(chains, job.workers, job.limits, told, look_up, make), tick)


def _items(modules: Sequence[ModuleSpec], parts: Mapping[int, tuple[float, ...]] | None = None) -> list[Item]:
    return [Item(m.index, m.profile_key, module_cost(m), (None,) if parts is None else parts[m.index]) for m in modules]


def _choices(plan: Plan) -> Choices:
    return Choices(plan.bits, plan.params, plan.hashes)


def _look_up(job: Job, plans: Sequence[Plan]) -> Callable[[Begun], ItemResult | None]:
    """What looks for the record of a module that a lost worker had in hand."""
    hashes = {plan.bits: plan.hashes for plan in plans}

    def look_up(begun: Begun) -> ItemResult | None:
        if begun.bits is None or begun.index < 0:
            return None
        record = job.work.records.find(quant_kind(begun.bits), begun.key, hashes[begun.bits][begun.index])
        return job.found(record, begun)

    return look_up
