"""Descriptors that make a data class of a boat's tanks refuse nonsense.

>>> t = Tank(capacity=120, level=0.5)
>>> t.litres
60.0
>>> t.level = 1.4
Traceback (most recent call last):
    ...
ValueError: level must lie between 0 and 1, not 1.4
>>> t.draw(15)
45.0
>>> t.level
0.375
>>> Tank.level.__doc__
'Filled share of the tank.'

A tank remembers when its level was last set, because an old reading is worth little:

>>> t.level_age(now=t._level_at + 90)
90.0
"""
import functools
import time
import weakref


class Bounded:
    """A number with limits; limits may be constants or names of other attributes."""

    def __init__(self, low=None, high=None, *, doc="", stamped=False):
        self.low, self.high, self.stamped = low, high, stamped
        self.__doc__ = doc

    def __set_name__(self, owner, name):
        self.name = name
        self.slot = "_" + name

    def __get__(self, obj, owner=None):
        if obj is None:
            return self
        try:
            return obj.__dict__[self.slot]
        except KeyError:
            raise AttributeError(f"{type(obj).__name__} has no {self.name} yet") from None

    def __set__(self, obj, value):
        low, high = (getattr(obj, x) if isinstance(x, str) else x for x in (self.low, self.high))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.name} must be a number, not {type(value).__name__}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError(f"{self.name} must lie between {low} and {high}, not {value}")
        obj.__dict__[self.slot] = value
        if self.stamped:
            obj.__dict__[self.slot + "_at"] = time.monotonic()

    def __delete__(self, obj):
        raise AttributeError(f"{self.name} cannot be removed")


class Memo:
    """functools.cached_property keeps its value for ever; this one forgets when a named attribute changes."""

    def __init__(self, *depends_on):
        self.depends_on = depends_on

    def __call__(self, func):
        self.func = func
        self.cache = weakref.WeakKeyDictionary()
        functools.update_wrapper(self, func)
        return self

    def __get__(self, obj, owner=None):
        if obj is None:
            return self
        key = tuple(getattr(obj, d) for d in self.depends_on)
        known = self.cache.get(obj)
        if known is None or known[0] != key:
            known = self.cache[obj] = key, self.func(obj)
        return known[1]


class Tank:
    capacity = Bounded(1, 5000, doc="Litres when full to the brim.")
    level = Bounded(0, 1, doc="Filled share of the tank.", stamped=True)
    reserve = Bounded(0, "capacity", doc="Litres nobody may use for washing up.")

    def __init__(self, capacity, level, reserve=0):
        self.capacity = capacity
        self.level = level
        self.reserve = reserve

    @Memo("capacity", "level")
    def litres(self):
        return float(self.capacity * self.level)

    def draw(self, litres):
        left = self.litres - litres
        if left < self.reserve:
            raise ValueError(f"only {self.litres - self.reserve:g} l may be drawn")
        self.level = left / self.capacity
        return left

    def level_age(self, now=None):
        return (time.monotonic() if now is None else now) - self._level_at


if __name__ == "__main__":
    import doctest

    raise SystemExit(doctest.testmod().failed)
