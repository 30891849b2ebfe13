"""Chains of modules, one per bitrate, each run by a group of workers: who belongs to which group, and when it is formed.

Chains are independent, modules of a chain are not: so several bitrates share the workers out, and the workers of one chain
share each module (`exl2ray.team.chain`). After a loss the survivors wait a little for a replacement, form a new group, and
go on at the first module without a record. A group takes in workers that have become free: it is asked to end after the
module in hand, and formed anew with them; its members keep their states meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from exl2ray.driver.independent import Item
from exl2ray.driver.policy import Fault, Limits, Lost
from exl2ray.driver.workers import Workers
from exl2ray.quant.rows import SHARES
from exl2ray.team.messages import Begun, ChainPass, Choices, ItemResult, Pass


@dataclass
class _Chain:
    choices: Choices
    left: list[Item]  # in order
    since: float  # when it was last known to have nobody at work
    members: list[int] = field(default_factory=list)  # by rank; those that are well keep their states
    running: set[int] = field(default_factory=set)
    whole_first: bool = True  # to wait for a full group: at the start, and after a loss
    growing: bool = False
    costs: dict[int, float] = field(init=False)  # of all its modules: members speak of those that another has finished

    def __post_init__(self) -> None:
        self.costs = {item.index: item.cost for item in self.left}


class Sequential:
    """chains: what each bitrate quantises with, and its modules without a record, ascending. told, look_up: of results.

    make: the call of a group for some of them. largest: of the groups. opened: hears of a bitrate that is begun; those for
    which there is no worker yet wait.
    """

    def __init__(
        self,
        chains: Sequence[tuple[Choices, Sequence[Item]]],
        workers: Workers,
        limits: Limits,
        told: Callable[[ItemResult], None],
        look_up: Callable[[Begun], ItemResult | None] = lambda begun: None,
        make: Callable[[Choices, tuple[int, ...]], Pass] = lambda c, modules: ChainPass(choices=c, modules=modules),
        largest: int = SHARES,
        opened: Callable[[float], None] = lambda bits: None,
    ) -> None:
        self._workers, self._limits, self._told, self.found = workers, limits, told, look_up
        self._make, self._largest, self._opened = make, largest, opened
        self._todo = [(choices, list(items)) for choices, items in chains if items]
        self._chains: list[_Chain] = []

    @property
    def done(self) -> bool:
        return not self._todo and not self._chains

    def cost(self, begun: Begun) -> float:
        chain = self._of_bits(begun.bits)
        if chain is None:
            return 1.0
        if begun.method == "join":  # perhaps all the way from the token rows
            return sum(item.cost for item in chain.left) * max(1, begun.index)
        return chain.costs[begun.index] / max(1, len(chain.members))

    def assign(self, idle: Sequence[int]) -> list[dict[int, Pass]]:
        now, size = self._workers.now(), max(1, self._workers.size)
        while self._todo and len(self._chains) < size:
            choices, items = self._todo.pop(0)
            self._opened(choices.bits)
            self._chains.append(_Chain(choices, items, now))
        taken = {w for chain in self._chains for w in chain.members}
        free = [w for w in idle if w not in taken]
        calls = []
        for rank, chain in enumerate(self._chains):
            target = max(1, min(self._largest, size // len(self._chains) + (rank < size % len(self._chains))))
            more = max(0, target - len(chain.members))
            if chain.running:
                if free[:more] and len(chain.left) > 1:
                    self._grow(chain)
                    del free[:more]
                continue
            chain.members = [w for w in chain.members if w in idle]
            added = free[: max(0, target - len(chain.members))]
            short = len(chain.members) + len(added) < target
            waiting = short and chain.whole_first and now - chain.since <= self._limits.patience
            if waiting or not (chain.members or added):
                continue
            del free[: len(added)]
            chain.members = (chain.members + added)[:target]
            calls.append(self._form(chain))
        return calls

    def _grow(self, chain: _Chain) -> None:
        if not chain.growing:
            chain.growing = True
            for worker in chain.running:
                self._workers.end_before(worker, 0)

    def _form(self, chain: _Chain) -> dict[int, Pass]:
        chain.running, chain.growing, chain.whole_first = set(chain.members), False, False
        part = self._make(chain.choices, tuple(item.index for item in chain.left))
        meetings = self._workers.meeting(chain.members)
        return {w: replace(part, meeting=m) for w, m in zip(chain.members, meetings, strict=True)}

    # ---- what came of it ---------------------------------------------------------------------------------------

    def begun(self, worker: int, begun: Begun) -> None:
        pass

    def finished(self, worker: int, result: ItemResult) -> None:
        chain = self._of_bits(result.bits)
        item = next((i for i in chain.left if i.index == result.index), None) if chain is not None else None
        if chain is None or item is None:
            return  # for the second time
        names = " + ".join(self._workers.name(w) for w in chain.members)
        chain.left.remove(item)
        self._told(replace(result, worker=names if chain.running and not result.worker else result.worker))

    def left(self, worker: int, fault: Fault | None) -> None:
        chain = next((c for c in self._chains if worker in c.running), None)
        if chain is None:
            return
        chain.running.discard(worker)
        chain.whole_first = chain.whole_first or fault is not None
        if isinstance(fault, Lost):
            chain.members.remove(worker)
        chain.since = self._workers.now()
        if not chain.left and not chain.running:
            self._chains.remove(chain)

    def _of_bits(self, bits: float | None) -> _Chain | None:
        return next((c for c in self._chains if c.choices.bits == bits), None)
