"""Perplexity of a quantised model whose modules were calibrated independently: a forward pass of a few rows.

The pass need not wait for the last module: workers without other work begin it with the modules that are finished and go on as
more of them are. They share out the rows, and the reading of packed modules: members take turns in reading one and spreading it.
"""

from __future__ import annotations

from exl2ray.dist.comm import Comm
from exl2ray.dist.items import PerplexityItem
from exl2ray.dist.runner import Runner, perplexity_of, perplexity_sums
from exl2ray.dist.spreading import spread
from exl2ray.dist.sweep import SharedReading
from exl2ray.dist.tree import owner_shares
from exl2ray.errors import ClusterError
from exl2ray.quant.rows import share_rows
from exl2ray.store.layout import quant_kind


class PerplexityPass:
    """One member's part. ``index``: the module that its rows have come to."""

    def __init__(self, run: Runner, comm: Comm, item: PerplexityItem) -> None:
        self.hashes, self.index = item.hashes, 1
        self._run, self._comm, self._kind = run, comm, quant_kind(item.bits)
        self._ids = run.rows("quantize")[: run.setup.perplexity_rows]
        self._ranges = share_rows(len(self._ids))
        reading = SharedReading(run, comm)
        reading.expect(0, 1)
        states = run.embedded("quantize", run.load_from(reading, run.spec.modules[0]))
        reading.close()
        shares = owner_shares(comm.rank, comm.size)
        self._shares = {s: states[self._ranges[s].start : self._ranges[s].stop].clone() for s in shares}

    def go_on(self, stop: int, shrink: int) -> float | None:
        """Runs the modules before ``stop``. All members call it. After the head: the perplexity, None if it is not finite."""
        run, comm = self._run, self._comm
        modules = run.spec.modules[self.index : stop]
        linear = [m for m in modules if m.linears]
        owners = {m.index: n % comm.size for n, m in enumerate(linear)}
        mine = [m for m in linear if owners[m.index] == comm.rank]
        packed = run.packed_in_order(self._kind, mine, self.hashes)
        sums: list[tuple[int, tuple[float, int]]] | None = None
        for module in modules:
            if module.linears:
                owner = owners[module.index]
                own = next(packed) if owner == comm.rank else None
                block = run.load_quantized(module, spread(comm, module.linears, own, owner, run.device))
            else:
                block = run.load(module)
            if module.kind == "head":
                rows = {s: self._ids[self._ranges[s].start : self._ranges[s].stop] for s in self._shares}
                sums = [(s, perplexity_sums(block, x, rows[s])) for s, x in self._shares.items()]
            else:
                for s, x in self._shares.items():
                    if len(x):
                        self._shares[s] = run.advance(block, x, run.settings(module, x, shrink))
        self.index = stop
        if stop < len(run.spec.modules):
            return None
        if sums is None:
            raise ClusterError("the model has no head")
        return perplexity_of([v for _, v in sorted(x for member in comm.gather(sums) for x in member)])
