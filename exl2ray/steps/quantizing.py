"""Quantising all bitrates of a job, either way of propagating states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from exl2ray.allocation.planning import Plan, module_cost
from exl2ray.driver.independent import PASSING, Independent, Item
from exl2ray.driver.sequential import Sequential
from exl2ray.model.spec import ModuleSpec
from exl2ray.recipe import bpw_name
from exl2ray.steps.allocating import missing
from exl2ray.steps.stage import Stage
from exl2ray.store.layout import quant_kind
from exl2ray.team.messages import Begun, Choices, ItemResult, PerplexityPass, ReferencePass
from exl2ray.team.perplexity import PERPLEXITY

if TYPE_CHECKING:
    from exl2ray.steps.job import Job

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
