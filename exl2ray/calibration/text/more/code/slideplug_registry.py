"""Plugins for a program that digitises slides: how they are found, loaded, ordered and, when they misbehave, put away."""
from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

log = logging.getLogger(__name__)
GROUP = "slideplug.filters"
API = (3, 1)

P = ParamSpec("P")
R = TypeVar("R")


@runtime_checkable
class Filter(Protocol):
    name: str

    def __call__(self, image: Any, meta: dict[str, str]) -> Any: ...


class PluginError(Exception):
    """Raised for the author of a plugin; the message says what to change."""


class Registry:
    def __init__(self) -> None:
        self._filters: dict[str, Filter] = {}
        self._after: dict[str, set[str]] = defaultdict(set)
        self._strikes: dict[str, int] = defaultdict(int)
        self._hooks: dict[str, list[Callable[..., Any]]] = defaultdict(list)

    # -- decorators used by plugins ---------------------------------------------------------------------------------

    def filter(self, name: str | None = None, *, after: Iterable[str] = (), before: Iterable[str] = ()):
        """Registers a function or a class.

            @registry.filter(after=["dust"])
            def unsharp(image, meta): ...
        """
        if callable(name):                      # used without brackets
            return self.filter()(name)

        def decorate(obj):
            called = name or obj.__name__.lower().removesuffix("filter")
            target = obj() if inspect.isclass(obj) else obj
            params = inspect.signature(target).parameters
            if len(params) != 2:
                raise PluginError(f"{called}: a filter takes (image, meta), this one takes ({', '.join(params)})")
            if called in self._filters:
                raise PluginError(f"{called} exists already, in {inspect.getmodule(self._filters[called])}")
            if not hasattr(target, "name"):
                target = _named(target, called)
            self._filters[called] = target
            self._after[called] |= set(after)
            for b in before:
                self._after[b].add(called)
            return obj

        return decorate

    def on(self, event: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        def decorate(func: Callable[P, R]) -> Callable[P, R]:
            self._hooks[event].append(func)
            return func
        return decorate

    # -- used by the program -----------------------------------------------------------------------------------------

    def load(self, disabled: Iterable[str] = ()) -> None:
        disabled = set(disabled)
        for ep in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
            if ep.name in disabled:
                log.info("plugin %s is switched off in the settings", ep.name)
                continue
            try:
                module = ep.load()
                wants = getattr(module, "SLIDEPLUG_API", (1, 0))
                if wants[0] != API[0] or wants[1] > API[1]:
                    raise PluginError(f"written for API {wants[0]}.{wants[1]}, this is {API[0]}.{API[1]}")
            except Exception as e:
                # A broken plugin must not keep the scanner from scanning.
                dist = f"{ep.dist.name} {ep.dist.version}" if ep.dist else "?"
                log.error("plugin %s (%s) not loaded: %s", ep.name, dist, e)
                log.debug("%s", traceback.format_exc())

    def ordered(self) -> list[str]:
        graph = {n: {a for a in self._after[n] if a in self._filters} for n in sorted(self._filters)}
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as e:
            ring = " after ".join(e.args[1])
            raise PluginError(f"these filters want to run each after the other: {ring}") from None

    def run(self, image: Any, meta: dict[str, str]) -> Any:
        for name in self.ordered():
            if self._strikes[name] >= 3:
                continue
            with self._guard(name):
                result = self._filters[name](image, dict(meta))
                if result is not None:
                    image = result
                self._strikes[name] = 0
        self.emit("done", meta)
        return image

    def emit(self, event: str, *args: Any) -> None:
        for hook in self._hooks[event]:
            with self._guard(getattr(hook, "__qualname__", repr(hook))):
                hook(*args)

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._strikes[name] += 1
            log.exception("%s failed (%d of 3)", name, self._strikes[name])
            if self._strikes[name] == 3:
                log.warning("%s is left out until the program is started again", name)


def _named(func: Callable[..., Any], name: str) -> Any:
    @functools.wraps(func)
    def wrapper(image, meta):
        return func(image, meta)
    wrapper.name = name
    return wrapper


def main(argv: list[str] | None = None) -> int:
    """`python -m slideplug`: shows what is there and in which order it runs."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    registry = Registry()
    registry.load(argv if argv is not None else sys.argv[1:])
    try:
        for i, name in enumerate(registry.ordered(), 1):
            first = (inspect.getdoc(registry._filters[name]) or "no description").splitlines()[0]
            print(f"{i:3}. {name:16} {first}")
    except PluginError as e:
        print(e, file=sys.stderr)
        return 1
    return 0
