"""How fast the items of a pass come, what is left, and who does the work; for displays and for the status of a directory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerPace:
    """What one worker, or one group ("host:1 + host:2"), has finished: mean seconds that it worked on an item."""

    name: str
    items: int
    seconds_per_item: float


class Pace:
    """From the items finished in this run, by any monotonic clock; ``now`` is in seconds.

    Nothing is claimed before two items. While fewer items than workers are finished, workers that all have answered once
    are assumed to go on side by side, each as slow as the items so far; from then on the wall clock tells. The first
    quarter is left out later on: it pays for compiling kernels and filling caches.
    """

    def __init__(self, items: int, done: int, workers: int, now: float) -> None:
        self.items, self.done = items, done
        self._workers = max(1, workers)
        self._times = [now]  # start, then the end of each item
        self._by_worker: dict[str, tuple[int, float]] = {}  # items, seconds

    def finished(self, done: int, now: float, worker: str = "", seconds: float = 0.0, workers: int = 0) -> None:
        """``done`` items are finished by now, the last by ``worker`` in ``seconds``, while ``workers`` were at work."""
        self._times += [now] * max(0, done - self.done)
        self.done = max(self.done, done)
        self._workers = workers or self._workers
        if worker:
            count, busy = self._by_worker.get(worker, (0, 0.0))
            self._by_worker[worker] = (count + 1, busy + seconds)

    @property
    def finished_here(self) -> int:
        """Items finished in this run."""
        return len(self._times) - 1

    @property
    def left(self) -> int:
        """Items that are not finished, those in work included."""
        return max(0, self.items - self.done)

    def workers(self) -> list[WorkerPace]:
        """By name."""
        return [WorkerPace(name, count, busy / count) for name, (count, busy) in sorted(self._by_worker.items())]

    def elapsed(self, now: float) -> float:
        return now - self._times[0]

    def _lanes(self) -> int:
        """Items that are worked on at a time: one in a chain, whose items all come from the same worker or group."""
        if not self._by_worker:
            return self._workers
        if any(" + " in name for name in self._by_worker):
            return 1
        seen = len(self._by_worker)
        return self._workers if seen == self.finished_here else min(seen, self._workers)

    def seconds_per_item(self) -> float | None:
        count, lanes = self.finished_here, self._lanes()
        if count < 2:
            return None
        if count < lanes:
            busy = sum(seconds for _, seconds in self._by_worker.values())
            return busy / count / lanes if busy else None
        skipped = count // 4 // lanes * lanes  # whole rounds: workers tend to finish together
        return (self._times[-1] - self._times[skipped]) / (count - skipped)

    def eta_seconds(self, now: float) -> float | None:
        """Seconds until the pass is complete, never less than 0; None while that is unknown."""
        rate = self.seconds_per_item()
        if rate is None:
            return None
        return max(0.0, rate * self.left - (now - self._times[-1]))
