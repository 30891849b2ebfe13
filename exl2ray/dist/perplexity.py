"""Perplexity of a quantised model whose modules were calibrated independently: one forward pass of a few rows.

The rows are shared out to a group, and so is the reading of packed modules: members take turns in reading one and spreading it.
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


def quantized_perplexity(run: Runner, comm: Comm, item: PerplexityItem) -> float | None:
    """All members call it, and all get the result: None if it is not a finite number."""
    embedding, *modules = run.spec.modules
    reading = SharedReading(run, comm)
    reading.expect(0, 1)
    ids = run.rows("quantize")[: run.setup.perplexity_rows]
    ranges = share_rows(len(ids))
    states = run.embedded("quantize", run.load_from(reading, embedding))
    reading.close()
    shares = {s: states[ranges[s].start : ranges[s].stop].clone() for s in owner_shares(comm.rank, comm.size)}
    del states
    linear = [m for m in modules if m.linears]
    owners = {m.index: n % comm.size for n, m in enumerate(linear)}
    packed = run.packed_in_order(quant_kind(item.bits), [m for m in linear if owners[m.index] == comm.rank], item.hashes)
    sums: list[tuple[int, tuple[float, int]]] | None = None
    for module in modules:
        if module.linears:
            owner = owners[module.index]
            own = next(packed) if owner == comm.rank else None
            block = run.load_quantized(module, spread(comm, module.linears, own, owner, run.device))
        else:
            block = run.load(module)
        if module.kind == "head":
            sums = [(s, perplexity_sums(block, x, ids[ranges[s].start : ranges[s].stop])) for s, x in shares.items()]
            break
        shares = {s: run.advance(block, x, run.settings(module, x, item.shrink)) if len(x) else x for s, x in shares.items()}
    if sums is None:
        raise ClusterError("the model has no head")
    return perplexity_of([v for _, v in sorted(x for member in comm.gather(sums) for x in member)])
