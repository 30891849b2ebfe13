"""Statistics over a sliding window, in constant time per value.

Keeping a running sum and a running sum of squares looks like the obvious way to a moving variance. It subtracts two large
numbers that are nearly equal, and for readings around a million with a spread of one nothing is left of the answer. The
update below (Welford's, run backwards for the value that leaves) works on differences from the mean instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class Window:
    """Mean, variance, minimum and maximum of the last ``size`` values."""

    size: int
    _values: deque[float] = field(default_factory=deque)
    _mean: float = 0.0
    _squares: float = 0.0  # sum of squared differences from the mean
    _low: deque[tuple[int, float]] = field(default_factory=deque)  # candidates for the minimum, rising
    _high: deque[tuple[int, float]] = field(default_factory=deque)  # candidates for the maximum, falling
    _seen: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a window of {self.size} values")

    def push(self, value: float) -> None:
        """Takes a value in, and the oldest one out once the window is full."""
        if len(self._values) == self.size:
            self._drop()
        self._values.append(value)
        delta = value - self._mean
        self._mean += delta / len(self._values)
        self._squares += delta * (value - self._mean)
        for candidates, beaten in ((self._low, value.__le__), (self._high, value.__ge__)):
            while candidates and beaten(candidates[-1][1]):
                candidates.pop()
            candidates.append((self._seen, value))
        self._seen += 1

    def _drop(self) -> None:
        value = self._values.popleft()
        if not self._values:
            self._mean = self._squares = 0.0
        else:
            delta = value - self._mean
            self._mean -= delta / len(self._values)
            self._squares = max(0.0, self._squares - delta * (value - self._mean))
        gone = self._seen - self.size
        for candidates in (self._low, self._high):
            if candidates[0][0] == gone:
                candidates.popleft()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def mean(self) -> float:
        return self._mean

    @property
    def variance(self) -> float:
        """Of the sample; 0 for fewer than two values."""
        n = len(self._values)
        return self._squares / (n - 1) if n > 1 else 0.0

    @property
    def minimum(self) -> float:
        return self._low[0][1]

    @property
    def maximum(self) -> float:
        return self._high[0][1]


def spikes(values: Iterable[float], size: int = 48, sigmas: float = 5.0) -> Iterator[tuple[int, float]]:
    """(index, value) of readings that lie more than ``sigmas`` standard deviations from the ``size`` before them.

    A spike isn't taken into the window: otherwise the first one would hide the second.
    """
    window = Window(size)
    for i, value in enumerate(values):
        if len(window) == size and (value - window.mean) ** 2 > sigmas**2 * max(window.variance, 1e-12):
            yield i, value
        else:
            window.push(value)
