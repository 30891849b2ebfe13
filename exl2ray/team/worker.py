"""One worker: owns a device, goes through passes, keeps states between them, commits before it answers.

A plain class: `exl2ray.driver` makes a Ray actor of it or calls it in this process. Any worker can run any pass: states that
it does not hold are loaded from a checkpoint, or computed from the token rows. Quantised modules are never quantised again
for that: the forward goes through their packed tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from exl2ray.team.chain import quantize
from exl2ray.team.grouped import NOWHERE
from exl2ray.team.member import Member
from exl2ray.team.messages import (
    Begun,
    ChainPass,
    ItemResult,
    MeasurePass,
    Pass,
    PerplexityPass,
    Ready,
    ReferencePass,
    SensitivityPass,
)
from exl2ray.team.perplexity import perplexity
from exl2ray.team.sensitivity import sensitivity
from exl2ray.team.source_passes import measure, quantize_on_source_states

PASSES: dict[type[Pass], Callable[..., Iterator[Any]]] = {
    MeasurePass: measure,
    SensitivityPass: sensitivity,
    ReferencePass: quantize_on_source_states,
    ChainPass: quantize,
    PerplexityPass: perplexity,
}


class Worker(Member):
    """A worker of conversions. One of a process; with Ray an actor is around it (`exl2ray.driver.worker_actor`)."""

    def run(self, part: Pass) -> Iterator[Begun | Ready | ItemResult]:
        """Goes through a pass: says what it begins, and what is finished and committed. Raises what goes wrong."""
        self.set_threads()  # of the thread that computes
        self.runner.shrink = part.shrink
        try:
            yield from PASSES[type(part)](self, part)
            if part.another and self.setup.alone:  # several take over what others have not done: they may go on reading
                self.runner.expect_the_first()  # while the driver decides what comes next
        finally:
            self.end = NOWHERE
