"""Backtracking resolver for package versions.

The resolver decides one package at a time, the one with the fewest versions
left first. When nothing is left for a package it jumps back to the most recent
decision that had a part in the conflict, instead of blindly to the last one.
"""

import collections
import functools
import operator

from quay.exceptions import InstallationError
from quay.models.requirement import Requirement, SpecifierSet
from quay.utils.misc import plural

Conflict = collections.namedtuple("Conflict", "package requirements")


class ResolutionImpossible(InstallationError):
    """No set of versions satisfies all requirements.

    :ivar causes: the conflict at which the resolver gave up
    :vartype causes: Conflict
    """

    def __init__(self, causes):
        super().__init__(self.explain(causes))
        self.causes = causes

    @staticmethod
    def explain(causes):
        lines = ["Cannot find a version of {} that suits everybody:".format(causes.package)]
        for req, parent in sorted(causes.requirements, key=lambda pair: str(pair[1] or "")):
            who = "you" if parent is None else "{0.name} {0.version}".format(parent)
            verb = "want" if parent is None else "wants"
            lines.append("  {} {} {}".format(who, verb, req))
        return "\n".join(lines)


class State:
    __slots__ = ("pinned", "wanted", "order")

    def __init__(self, pinned=None, wanted=None, order=()):
        self.pinned = pinned or {}
        self.wanted = wanted or {}
        self.order = order

    def copy(self):
        return State(dict(self.pinned), {k: list(v) for k, v in self.wanted.items()}, self.order)


class Resolver:
    """Finds one version for every package that is needed.

    :param index: where candidates come from; must offer
        ``candidates(name)`` (newest first) and ``dependencies(candidate)``
    :param reporter: told about progress; see :class:`quay.cli.spinner.Reporter`
    :param max_rounds: give up after so many decisions
    :type max_rounds: int
    """

    def __init__(self, index, reporter, max_rounds=20000):
        self._index = index
        self._reporter = reporter
        self._max_rounds = max_rounds

    def resolve(self, requirements, preferred=()):
        """Run the search.

        :param requirements: what the user asked for
        :type requirements: list[Requirement]
        :param preferred: candidates to try before newer ones, usually what is
            installed already
        :returns: mapping of package name to candidate
        :raises ResolutionImpossible: if there is no answer
        """
        preferred = {c.name: c for c in preferred}
        state = State()
        for req in requirements:
            state.wanted.setdefault(req.name, []).append((req, None))

        # Each stack entry is the state before a decision, the package that was
        # decided, the versions not yet tried, and who had a part in it.
        stack = []
        for number in range(self._max_rounds):
            name = self._next_package(state)
            if name is None:
                self._reporter.finished(number)
                return self._reachable(state, requirements)

            options = self._options(state, name, preferred)
            blame = {parent.name for _, parent in state.wanted[name] if parent}
            state = self._decide(state, name, options, blame, stack)
        raise InstallationError("gave up after {}".format(plural(self._max_rounds, "attempt")))

    def _next_package(self, state):
        open_packages = [n for n in state.wanted if n not in state.pinned]
        if not open_packages:
            return None
        return min(open_packages, key=lambda n: (self._count(state, n), n))

    def _specifier(self, state, name):
        parts = (req.specifier for req, _ in state.wanted[name])
        return functools.reduce(operator.and_, parts, SpecifierSet())

    def _count(self, state, name):
        spec = self._specifier(state, name)
        return sum(c.version in spec for c in self._index.candidates(name))

    def _options(self, state, name, preferred):
        spec = self._specifier(state, name)
        found = [c for c in self._index.candidates(name) if c.version in spec and not c.yanked]
        if preferred.get(name) in found:
            found.remove(preferred[name])
            found.insert(0, preferred[name])
        return collections.deque(found)

    def _decide(self, state, name, options, blame, stack):
        while True:
            while options:
                candidate = options.popleft()
                new, clash = self._pin(state, candidate)
                if clash is None:
                    stack.append((state, name, options, blame))
                    self._reporter.pinned(candidate, depth=len(stack))
                    return new
                blame |= clash

            conflict = Conflict(name, tuple(state.wanted.get(name, ())))
            self._reporter.dead_end(conflict)
            while stack and stack[-1][1] not in blame:
                stack.pop()
            if not stack:
                raise ResolutionImpossible(conflict)
            inherited = blame
            state, name, options, blame = stack.pop()
            blame = blame | (inherited - {name})

    def _pin(self, state, candidate):
        new = state.copy()
        new.pinned[candidate.name] = candidate
        new.order += (candidate.name,)
        for req in self._index.dependencies(candidate):
            if not req.applies_here():
                continue
            chosen = new.pinned.get(req.name)
            if chosen is not None and chosen.version not in req.specifier:
                return None, {req.name}
            new.wanted.setdefault(req.name, []).append((req, candidate))
        return new, None

    def _reachable(self, state, requirements):
        """Leave out what was only wanted by versions given up since."""
        result, todo = {}, [r.name for r in requirements]
        while todo:
            name = todo.pop()
            if name in result:
                continue
            result[name] = state.pinned[name]
            todo.extend(
                r.name for r in self._index.dependencies(result[name]) if r.applies_here()
            )
        return result
