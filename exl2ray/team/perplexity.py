"""Perplexity of a model whose modules were quantised independently: one forward pass of a few rows, by a group.

Members share out the rows, and take turns in reading packed modules, which they hand to the others. One worker alone would
take 22 s for the 70B shape, where eight take 32 s for all the rest (docs/scaling.md).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from exl2ray import wording
from exl2ray.errors import ClusterError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.quant.group import Comm
from exl2ray.quant.rows import owner_shares, share_rows
from exl2ray.quant.sharing import spread
from exl2ray.store.file_names import PERPLEXITY, quant_kind
from exl2ray.store.records import Record
from exl2ray.team.member import Member
from exl2ray.team.messages import Begun, Choices, ItemResult, PerplexityPass, Ready
from exl2ray.team.runner import Runner, perplexity_of, perplexity_sums
from exl2ray.team.shared_reading import shared_embedding

READ_AHEAD = 5  # of the modules that a member reads, each by a thread of its own


def perplexity(worker: Member, part: PerplexityPass) -> Iterator[Begun | Ready | ItemResult]:
    """Runs the reported rows through a quantised model with a group; the first member commits their perplexity."""
    choices, bits = part.choices, part.choices.bits
    yield worker.begin(Begun(PERPLEXITY, 0, PERPLEXITY, bits, together=part.meeting.size > 1))
    begin = time.monotonic()
    worker.let_go()
    comm = worker.group(part.meeting)
    before = comm.received
    value = quantized_perplexity(worker.runner, comm, choices)
    if comm.rank:
        yield Ready(PERPLEXITY, time.monotonic() - begin, comm.received - before)
        return
    seconds = time.monotonic() - begin
    worker.runner.records.commit(
        Record(quant_kind(bits), PERPLEXITY, choices.hashes[-1], {"perplexity": value}, (), seconds)
    )
    payload, received = {"perplexity": value}, comm.received - before
    yield worker.result(0, PERPLEXITY, begin, wording.perplexity(value), payload, bits=bits, received=received)


def quantized_perplexity(run: Runner, comm: Comm, choices: Choices) -> float | None:
    """All members call it, and all get the result: None if it is not a finite number."""
    modules = run.spec.modules[1:]
    kind, ids = quant_kind(choices.bits), run.rows("quantize")[: run.setup.perplexity_rows]
    owners = {m.index: n % comm.size for n, m in enumerate(m for m in modules if m.linears)}
    later = iter([m for m in modules if owners.get(m.index) == comm.rank])
    waiting: deque[Future[dict[str, PackedLinear]]] = deque()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read-packed") as pool:

        def read_on() -> None:
            while len(waiting) < READ_AHEAD and (coming := next(later, None)) is not None:
                # Their hashes are left to whoever writes the model.
                waiting.append(pool.submit(run.packed, kind, coming, choices.hashes[coming.index], False))

        read_on()  # while the embedding is
        states = run.embedded("quantize", shared_embedding(run, comm))[: len(ids)]
        ranges = share_rows(len(ids))
        shares = {s: states[ranges[s].start : ranges[s].stop].clone() for s in owner_shares(comm.rank, comm.size)}
        del states
        for module in modules:
            read_on()
            if module.linears:
                owner = owners[module.index]
                own = waiting.popleft().result() if owner == comm.rank else None
                block = run.load_quantized(module, spread(comm, module.linears, own, owner, run.device))
            else:
                block = run.load(module)
            if module.kind == "head":
                mine = [(s, perplexity_sums(block, x, ids[ranges[s].start : ranges[s].stop])) for s, x in shares.items()]
                return perplexity_of([v for _, v in sorted(x for member in comm.gather(mine) for x in member)])
            shares = {s: run.advance(block, x) if len(x) else x for s, x in shares.items()}
    raise ClusterError("the model has no head")
