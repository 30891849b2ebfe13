"""Running items on workers: in order, each until it succeeds, giving up where trying again cannot help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from exl2ray.dist.session import Lost, Session
from exl2ray.errors import ClusterError, NumericError

MAX_LOSSES = 3  # an item that takes this many workers down is at fault itself


def run_chain(
    session: Session,
    method: str,
    items: Sequence[Any],
    on_result: Callable[[Any, Any], None],
    worker: int = 0,
    on_lost: Callable[[Any, Lost], None] = lambda item, lost: None,
) -> None:
    """Runs ``items`` one after another on one worker; ``on_result(item, result)`` after each.

    A lost worker is replaced and the item tried again, three times at most: then ClusterError names the item and the last
    error. An exception that the item raised is deterministic and is raised here.
    """
    for item in items:
        for attempt in range(1, MAX_LOSSES + 1):
            session.submit(worker, method, item)
            outcome = session.wait()
            if outcome is None:
                raise ClusterError(f"{method} {item!r}: the session has no outcome to wait for")
            if isinstance(outcome.value, Lost):
                on_lost(item, outcome.value)
                if attempt == MAX_LOSSES:
                    raise ClusterError(
                        f"{method} of module {getattr(item, 'index', '?')} lost {MAX_LOSSES} workers; "
                        f"the last time: {outcome.value.reason}",
                        "see the logs in the work directory; running out of memory is the usual cause",
                    )
                session.renew(worker)
                continue
            if isinstance(outcome.value, BaseException):
                raise _explained(outcome.value)
            on_result(item, outcome.value)
            break


def _explained(error: BaseException) -> BaseException:
    """torch's out-of-memory errors in words; everything else as it is."""
    if type(error).__name__ == "OutOfMemoryError":
        return NumericError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]}",
            "close other programs on this GPU, or use shorter rows (-l, -ml)",
        )
    return error
