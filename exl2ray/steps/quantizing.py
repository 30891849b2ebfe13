"""Quantising all bitrates of a job at the same time, either way of propagating states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from exl2ray.allocation.planning import Plan, module_cost
from exl2ray.driver.independent import PASSING, Independent, Item
from exl2ray.driver.sequential import Sequential
from exl2ray.model.spec import ModuleSpec
from exl2ray.recipe import bpw_name
from exl2ray.steps.allocating import missing
from exl2ray.steps.job import Stage
from exl2ray.store.file_names import PERPLEXITY, quant_kind
from exl2ray.store.records import Record
from exl2ray.team.messages import Begun, Choices, ItemResult, PerplexityPass, ReferencePass

if TYPE_CHECKING:
    from exl2ray.steps.background import Outputs
    from exl2ray.steps.job import Job


def quantize(job: Job, plans: Sequence[Plan], outputs: Outputs) -> None:
    """Quantises what the bitrates lack. ``outputs`` is told of modules that have a record, and of complete bitrates."""
    work = _Quantizing(job, plans, outputs)
    work.begin()
    if job.recipe.propagate == "reference":
        work.on_source_states()
    else:
        work.in_chains()


class _Quantizing:
    """plans by bitrate; todo: the modules that each lacks, in order; stages: how far each has got, if it lacks any."""

    def __init__(self, job: Job, plans: Sequence[Plan], outputs: Outputs) -> None:
        self.job, self.outputs = job, outputs
        self.plans = {plan.bits: plan for plan in plans}
        self.todo = {plan.bits: missing(job, plan) for plan in plans}
        self.stages: dict[float, Stage] = {}
        self._open = {plan.bits: ExitStack() for plan in plans}  # has the stage, until its end

    def begin(self) -> None:
        linear = [m for m in self.job.spec.modules if m.linears]
        for bits, todo in self.todo.items():
            if todo:
                self.outputs.begin(self.plans[bits])
                for module in linear:
                    if module not in todo:
                        self.outputs.finished(self.plans[bits], module.index)
                self.stages[bits] = Stage(self.job, f"quantize {bpw_name(bits)}", len(linear), len(linear) - len(todo))
        if self.stages:
            _ = self.job.workers  # started before the clocks of the stages

    def _opened(self, bits: float) -> None:
        """The clock of a bitrate's stage begins with its first module: before, it may wait for the chain of another one."""
        self._open[bits].enter_context(self.stages[bits])

    def in_chains(self) -> None:
        """Each bitrate as a chain of modules, on what the quantised modules before produce."""
        left = {bits: {m.index for m in modules} for bits, modules in self.todo.items()}
        for bits, plan in self.plans.items():
            if not left[bits]:
                self._complete(plan)

        def told(result: ItemResult) -> None:
            plan = self._finished(result)
            left[plan.bits].discard(result.index)
            if not left[plan.bits]:
                self._complete(plan)

        chains = [(_choices(plan), _items(self.todo[bits])) for bits, plan in self.plans.items() if left[bits]]
        if chains:
            self._run(Sequential(chains, self.job.workers, self.job.limits, told, self._look_up, opened=self._opened))

    def on_source_states(self) -> None:
        """Module by module on the states of the source model, for all bitrates; then the perplexity of each."""
        for bits in self.stages:
            self._opened(bits)
        wanted: dict[int, tuple[float, ...]] = {}
        for bits, todo in self.todo.items():
            for module in todo:
                wanted[module.index] = (*wanted.get(module.index, ()), bits)
        choices = tuple(_choices(plan) for plan in self.plans.values())

        def call(indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> ReferencePass:
            own = {i: wanted[i] for i in indices}
            return ReferencePass(modules=indices, stretches=stretches, keep_from=keep_from, choices=choices, wanted=own)

        def told(result: ItemResult) -> None:
            self._finished(result)

        if wanted:
            items = _items([self.job.spec.modules[i] for i in sorted(wanted)], wanted)
            passing = PASSING["quantize"]
            self._run(Independent(items, call, self.job.workers, told, self._look_up, passing, together=True))
        unknown = [plan for plan in self.plans.values() if self._perplexity(plan) is None]
        for plan in self.plans.values():
            if plan not in unknown:
                self._complete(plan)
        if unknown:
            self._run_for_perplexity(unknown)

    def _run_for_perplexity(self, plans: Sequence[Plan]) -> None:
        """Groups of workers run the finished models."""
        whole = Item(0, PERPLEXITY, sum(module_cost(m) for m in self.job.spec.modules))

        def told(result: ItemResult) -> None:
            self._complete(self.plans[result.bits or 0.0])

        def look_up(begun: Begun) -> ItemResult | None:
            plan = self.plans.get(begun.bits or 0.0)
            return None if plan is None else self.job.found(self._perplexity(plan), begun)

        def call(choices: Choices, modules: tuple[int, ...]) -> PerplexityPass:
            return PerplexityPass(choices=choices)

        chains = [(_choices(plan), [whole]) for plan in plans]
        self._run(Sequential(chains, self.job.workers, self.job.limits, told, look_up, call))

    # ---- what both ways need -----------------------------------------------------------------------------------

    def _run(self, work: Independent | Sequential) -> None:
        self.job.supervisor.run(work, self.outputs.look)

    def _finished(self, result: ItemResult) -> Plan:
        plan = self.plans[result.bits or 0.0]
        self.stages[plan.bits](result)
        self.outputs.finished(plan, result.index)
        return plan

    def _complete(self, plan: Plan) -> None:
        self._open[plan.bits].close()
        self.outputs.complete(plan)

    def _look_up(self, begun: Begun) -> ItemResult | None:
        """Looks for the record of a module that a lost worker had in hand."""
        if begun.bits is None or begun.index < 0:
            return None
        value = self.plans[begun.bits].hashes[begun.index]
        return self.job.found(self.job.work.records.find(quant_kind(begun.bits), begun.key, value), begun)

    def _perplexity(self, plan: Plan) -> Record | None:
        return self.job.work.records.find(quant_kind(plan.bits), PERPLEXITY, plan.hashes[-1])


def _items(modules: Sequence[ModuleSpec], parts: Mapping[int, tuple[float, ...]] | None = None) -> list[Item]:
    return [Item(m.index, m.profile_key, module_cost(m), (None,) if parts is None else parts[m.index]) for m in modules]


def _choices(plan: Plan) -> Choices:
    return Choices(plan.bits, plan.params, plan.hashes)
