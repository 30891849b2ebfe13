"""Collects water levels from tide gauges over TCP and answers questions about them.

Gauges are small microcontrollers behind bad radio links. They connect, push lines such as

    PUT vlissingen 1718031600 2.431

and disappear without saying goodbye. Dashboards connect to the same port and ask

    MEAN vlissingen 600        -> mean level over the last ten minutes
    LAST vlissingen            -> newest sample

The protocol is line based on purpose: a technician can test a gauge with netcat from the quay.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import signal
from collections import defaultdict
from dataclasses import dataclass, field

log = logging.getLogger("tides")

IDLE_SECONDS = 90  # a healthy gauge reports every 60 s; anything slower is a dead socket
MAX_LINE = 256
KEEP_SECONDS = 6 * 3600


class ProtocolError(Exception):
    """The peer sent something we cannot act on; the text is sent back to it."""


@dataclass
class Series:
    """Samples of one station, ordered by time. Late samples are inserted, duplicates replaced."""

    times: list[int] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)

    def add(self, when: int, level: float) -> None:
        at = bisect.bisect_left(self.times, when)
        if at < len(self.times) and self.times[at] == when:
            self.levels[at] = level  # a gauge repeats a sample when it missed our "OK"
            return
        self.times.insert(at, when)
        self.levels.insert(at, level)
        self._forget(self.times[-1] - KEEP_SECONDS)

    def _forget(self, before: int) -> None:
        cut = bisect.bisect_left(self.times, before)
        # Deleting from the front of a list is linear, so wait until it is worth the copy.
        if cut > 512:
            del self.times[:cut]
            del self.levels[:cut]

    def mean(self, seconds: int) -> float:
        if not self.times:
            raise ProtocolError("no samples yet")
        start = bisect.bisect_left(self.times, self.times[-1] - seconds)
        window = self.levels[start:]
        return sum(window) / len(window)


class TideServer:
    def __init__(self) -> None:
        self.stations: defaultdict[str, Series] = defaultdict(Series)
        self._clients: set[asyncio.Task[None]] = set()

    async def serve(self, host: str, port: int) -> None:
        server = await asyncio.start_server(self._accept, host, port, limit=MAX_LINE)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, stop.set)
        async with server:
            log.info("listening on %s:%d", host, port)
            await stop.wait()
        # Closing the listener does not close accepted connections, so end them ourselves.
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        peer = writer.get_extra_info("peername")
        try:
            await self._converse(reader, writer)
        except (ConnectionResetError, asyncio.TimeoutError):
            log.info("%s went silent", peer)
        finally:
            self._clients.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                raw = await asyncio.wait_for(reader.readline(), IDLE_SECONDS)
            except ValueError:
                # readline() raises ValueError when a line exceeds the limit. There is no way to
                # find the next line boundary reliably, so the connection has to go.
                writer.write(b"ERR line too long\n")
                await writer.drain()
                return
            if not raw:
                return
            try:
                answer = self.handle(raw.decode("ascii").split())
            except UnicodeDecodeError:
                answer = "ERR not ASCII"
            except ProtocolError as error:
                answer = f"ERR {error}"
            writer.write(answer.encode() + b"\n")
            await writer.drain()  # backpressure: a slow reader slows down only itself

    def handle(self, words: list[str]) -> str:
        """Pure part of the protocol; tests call this without opening a socket."""
        match words:
            case ["PUT", station, when, level]:
                try:
                    self.stations[station].add(int(when), float(level))
                except ValueError:
                    raise ProtocolError(f"bad number in {when!r} {level!r}") from None
                return "OK"
            case ["MEAN", station, seconds] if seconds.isdigit():
                return f"{self._known(station).mean(int(seconds)):.3f}"
            case ["LAST", station]:
                series = self._known(station)
                return f"{series.times[-1]} {series.levels[-1]:.3f}"
            case []:
                raise ProtocolError("empty command")
            case [verb, *_]:
                raise ProtocolError(f"cannot parse {verb} command")
        raise AssertionError("unreachable")

    def _known(self, station: str) -> Series:
        # Indexing the defaultdict would create the station, and a typo would look like a gauge.
        series = self.stations.get(station)
        if series is None:
            raise ProtocolError(f"unknown station {station}")
        return series


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(TideServer().serve("0.0.0.0", 7040))
