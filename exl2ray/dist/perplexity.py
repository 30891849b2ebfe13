"""Perplexity of a quantised model whose modules were calibrated independently: one forward pass of a few rows.

A group shares out the rows. Packed modules come from the member that made them, if it still has them on its device; members
take turns in reading the others.
"""

from __future__ import annotations

from exl2ray.dist.comm import Comm
from exl2ray.dist.items import PerplexityItem
from exl2ray.dist.runner import Runner, perplexity_of, perplexity_sums
from exl2ray.dist.shared_reading import SharedReading
from exl2ray.dist.spreading import spread
from exl2ray.dist.tree import owner_shares
from exl2ray.errors import ClusterError
from exl2ray.quant.rows import share_rows
from exl2ray.store.layout import quant_kind


def quantized_perplexity(run: Runner, comm: Comm, item: PerplexityItem) -> float | None:
    """All members call it, and all get the result: None if it is not a finite number."""
    embedding, *modules = run.spec.modules
    kind = quant_kind(item.bits)
    linear = [m for m in modules if m.linears]
    has: list[set[int]] = comm.gather({m.index for m in linear if run.kept(kind, item.hashes[m.index]) is not None})
    to_read = [m for m in linear if not any(m.index in indices for indices in has)]
    owners = {m.index: n % comm.size for n, m in enumerate(to_read)}
    owners |= {m.index: next(r for r, i in enumerate(has) if m.index in i) for m in linear if m.index not in owners}
    read = run.packed_in_order(kind, [m for m in to_read if owners[m.index] == comm.rank], item.hashes)
    ids = run.rows("quantize")[: run.setup.perplexity_rows]
    if all(comm.gather(run.reported is not None)) and run.reported is not None:
        states = run.reported
    else:
        reading = SharedReading(run, comm)
        reading.expect(0, 1)
        states = run.embedded("quantize", run.load_from(reading, embedding))[: len(ids)]
        reading.close()
    ranges = share_rows(len(ids))
    shares = {s: states[ranges[s].start : ranges[s].stop].clone() for s in owner_shares(comm.rank, comm.size)}
    for module in modules:
        if module.linears:
            owner, own = owners[module.index], None
            if owner == comm.rank:
                own = next(read) if module in to_read else run.kept(kind, item.hashes[module.index])
            block = run.load_quantized(module, spread(comm, module.linears, own, owner, run.device))
        else:
            block = run.load(module)
        if module.kind == "head":
            sums = [(s, perplexity_sums(block, x, ids[ranges[s].start : ranges[s].stop])) for s, x in shares.items()]
            return perplexity_of([v for _, v in sorted(x for member in comm.gather(sums) for x in member)])
        shares = {s: run.advance(block, x, run.settings(module, x, item.shrink)) if len(x) else x for s, x in shares.items()}
    raise ClusterError("the model has no head")
