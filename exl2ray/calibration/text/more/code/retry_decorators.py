"""Decorators around a weather service that is down whenever there is weather.

They stack. Read them from the bottom: the call is timed, repeated when it fails, kept for a while, and given up for a
minute after too many failures.

    @circuit(failures=5, rest=60)
    @keep(seconds=300, stale_ok=3600)
    @repeat(times=4, on=(TimeoutError, ConnectionError))
    @timed("forecast")
    async def forecast(station: str) -> Forecast: ...
"""
from __future__ import annotations

import asyncio
import functools
import inspect
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")
Async = Callable[P, Awaitable[R]]

metrics: Counter[str] = Counter()


class Resting(Exception):
    """The circuit is open; `again_in` seconds are left."""

    def __init__(self, name: str, again_in: float):
        super().__init__(f"{name} rests for another {again_in:.0f} s")
        self.again_in = again_in


@overload
def timed(label: Async[P, R]) -> Async[P, R]: ...
@overload
def timed(label: str) -> Callable[[Async[P, R]], Async[P, R]]: ...
def timed(label):
    if callable(label):
        return timed(label.__name__)(label)

    def decorate(func):
        if not inspect.iscoroutinefunction(func):
            raise TypeError(f"@timed is for coroutine functions; {func.__qualname__} is not one")

        @functools.wraps(func)
        async def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return await func(*args, **kwargs)
            except asyncio.CancelledError:
                metrics[f"{label}.cancelled"] += 1
                raise
            finally:
                metrics[f"{label}.calls"] += 1
                metrics[f"{label}.ms"] += round(1000 * (time.perf_counter() - start))
        return wrapper
    return decorate


def repeat(times: int = 3, on: tuple[type[Exception], ...] = (Exception,), first: float = 0.2,
           longest: float = 8.0) -> Callable[[Async[P, R]], Async[P, R]]:
    """Waits a random time between tries, so that a hundred clients do not come back in step."""
    def decorate(func: Async[P, R]) -> Async[P, R]:
        @functools.wraps(func)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            pause = first
            for attempt in range(1, times + 1):
                try:
                    return await func(*args, **kwargs)
                except on as e:
                    if attempt == times:
                        e.add_note(f"{func.__qualname__}: {times} tries")
                        raise
                    await asyncio.sleep(random.uniform(0, pause))
                    pause = min(longest, pause * 2)
            raise AssertionError("unreachable")
        return wrapper
    return decorate


def keep(seconds: float, stale_ok: float = 0, size: int = 256,
         key: Callable[P, Hashable] | None = None) -> Callable[[Async[P, R]], Async[P, R]]:
    """Remembers answers. Callers who ask for the same thing at the same time share one request; an answer that is too old
    is still given, up to `stale_ok` seconds, when fetching a new one fails."""
    def decorate(func: Async[P, R]) -> Async[P, R]:
        store: OrderedDict[Hashable, tuple[float, R]] = OrderedDict()
        running: dict[Hashable, asyncio.Task[R]] = {}
        signature = inspect.signature(func)

        def default_key(*args: P.args, **kwargs: P.kwargs) -> Hashable:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return tuple(bound.arguments.items())

        make_key = key or default_key

        @functools.wraps(func)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            k = make_key(*args, **kwargs)
            now = time.monotonic()
            if k in store and now - store[k][0] < seconds:
                store.move_to_end(k)
                return store[k][1]
            task = running.get(k)
            if task is None:
                task = running[k] = asyncio.ensure_future(func(*args, **kwargs))
                task.add_done_callback(lambda _: running.pop(k, None))
            try:
                # shield: one impatient caller must not cancel the request of all others
                value = await asyncio.shield(task)
            except Exception:
                if k in store and now - store[k][0] < stale_ok:
                    metrics[f"{func.__name__}.stale"] += 1
                    return store[k][1]
                raise
            store[k] = now, value
            while len(store) > size:
                store.popitem(last=False)
            return value

        wrapper.forget = store.clear          # type: ignore[attr-defined]
        return wrapper
    return decorate


def circuit(failures: int, rest: float) -> Callable[[Async[P, R]], Async[P, R]]:
    def decorate(func: Async[P, R]) -> Async[P, R]:
        state = {"count": 0, "until": 0.0}

        @functools.wraps(func)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            left = state["until"] - time.monotonic()
            if left > 0:
                raise Resting(func.__name__, left)
            try:
                result = await func(*args, **kwargs)
            except Exception:
                state["count"] += 1
                if state["count"] >= failures:
                    # Half of the count stays: one more failure after the rest, or two, and it rests again.
                    state.update(count=failures // 2, until=time.monotonic() + rest)
                raise
            state["count"] = 0
            return result
        return wrapper
    return decorate


def with_session(func: Callable[Concatenate[Any, P], Awaitable[R]]) -> Async[P, R]:
    """Opens a session and passes it as the first argument."""
    @functools.wraps(func)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        import aiohttp
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            return await func(session, *args, **kwargs)
    del wrapper.__wrapped__         # or inspect.signature would show the parameter the caller cannot give
    return wrapper
