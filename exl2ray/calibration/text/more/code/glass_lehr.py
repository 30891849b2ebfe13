"""Annealing lehr controller for a studio with eleven heating zones.

The glass travels through the tunnel on a mesh belt. Each zone has one thermocouple, one solid-state relay and a
schedule that depends on the thickest piece on the belt. Relays are switched at zero crossing, so power is set as a
number of mains half-waves out of every fifty.
"""
from __future__ import annotations

import asyncio
import logging
import struct
import time
from dataclasses import dataclass, field
from enum import IntEnum

log = logging.getLogger("lehr")

HALF_WAVES = 50
AMBIENT_FAULT = 8.0        # a reading below this means a shorted thermocouple, not a cold morning
STRAIN_POINT = 415.0
ANNEAL_POINT = 482.0


class Fault(IntEnum):
    NONE = 0
    OPEN_COUPLE = 1
    SHORT_COUPLE = 2
    RUNAWAY = 3
    BELT_STOPPED = 4


@dataclass(slots=True)
class Pid:
    kp: float
    ki: float
    kd: float
    integral: float = 0.0
    previous: float | None = None

    def step(self, target: float, measured: float, dt: float) -> float:
        error = target - measured
        # Derivative of the measurement, not of the error: a new set point must not kick the relay.
        slope = 0.0 if self.previous is None else (measured - self.previous) / dt
        self.previous = measured
        raw = self.kp * error + self.integral - self.kd * slope
        if 0.0 < raw < 1.0 or raw * error < 0:
            self.integral += self.ki * error * dt
        return min(1.0, max(0.0, raw))


@dataclass(slots=True)
class Zone:
    index: int
    pid: Pid
    target: float = 20.0
    temperature: float = 20.0
    duty: int = 0
    fault: Fault = Fault.NONE
    _rising_since: float | None = field(default=None, repr=False)

    def check(self, now: float) -> None:
        if self.temperature > 1300:
            self.fault = Fault.OPEN_COUPLE
        elif self.temperature < AMBIENT_FAULT:
            self.fault = Fault.SHORT_COUPLE
        elif self.temperature > self.target + 25 and self.duty == 0:
            # Hot, still hot after three minutes with the relay off: it has welded shut.
            self._rising_since = self._rising_since or now
            if now - self._rising_since > 180:
                self.fault = Fault.RUNAWAY
        else:
            self._rising_since = None


def profile(thickness_mm: float, zones: int, belt_mm_per_min: float, zone_mm: float = 600.0) -> list[float]:
    """Set points from the hot end to the cold end.

    The permitted cooling rate falls with the square of the thickness; 12 mm soda-lime glass stands about 2.4 K a
    minute through the transformation range and three times that below the strain point.
    """
    rate = 2.4 * (12.0 / thickness_mm) ** 2
    minutes = zone_mm / belt_mm_per_min
    points = [ANNEAL_POINT + 6, ANNEAL_POINT]
    while len(points) < zones:
        last = points[-1]
        factor = 1.0 if last > STRAIN_POINT else 3.0
        points.append(max(45.0, last - rate * factor * minutes))
    if points[-1] > 90:
        raise ValueError(
            f"pieces of {thickness_mm:g} mm would leave the tunnel at {points[-1]:.0f} C; "
            f"slow the belt to {belt_mm_per_min * (ANNEAL_POINT - 90) / (ANNEAL_POINT - points[-1]):.0f} mm/min or take the box kiln")
    return points


class Bus:
    """Half-duplex RS-485: one request, one answer, addresses 1 to 11."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self._turn = asyncio.Lock()

    async def exchange(self, zone: int, duty: int) -> float:
        body = struct.pack(">BBB", 0xA5, zone, duty)
        async with self._turn:
            self._writer.write(body + bytes([sum(body) & 0xFF]))
            await self._writer.drain()
            answer = await asyncio.wait_for(self._reader.readexactly(5), timeout=0.2)
        head, who, tenths, check = struct.unpack(">BBhB", answer)
        if head != 0x5A or who != zone or sum(answer[:4]) & 0xFF != check:
            raise ConnectionError(f"garbled answer from zone {zone}: {answer.hex(' ')}")
        return tenths / 10


async def regulate(zones: list[Zone], bus: Bus, stop: asyncio.Event, period: float = 1.0) -> None:
    misses = dict.fromkeys(range(len(zones)), 0)
    deadline = time.monotonic()
    while not stop.is_set():
        deadline += period
        for z in zones:
            try:
                z.temperature = await bus.exchange(z.index + 1, z.duty)
                misses[z.index] = 0
            except (TimeoutError, ConnectionError) as e:
                misses[z.index] += 1
                log.warning("zone %d: %s (%d in a row)", z.index + 1, e, misses[z.index])
                if misses[z.index] >= 5:
                    z.fault = Fault.OPEN_COUPLE
                continue
            z.check(time.monotonic())
            z.duty = 0 if z.fault else round(HALF_WAVES * z.pid.step(z.target, z.temperature, period))
        if any(z.fault is Fault.RUNAWAY for z in zones):
            log.critical("runaway: opening the main contactor")
            stop.set()
        await asyncio.sleep(max(0.0, deadline - time.monotonic()))
