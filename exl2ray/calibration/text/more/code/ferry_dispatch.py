#!/usr/bin/env python3
"""Relay berth announcements from the harbour's radio gateway to the display boards on the quays.

    ferry_dispatch.py --gateway 10.4.0.9:7700 --listen 0.0.0.0:8110

The gateway sends one JSON object per line. A board connects, names its quay ("QUAY north\\n") and from then on
gets every departure of that quay, newest state first after a reconnect. Boards are old and sit on bad radio
links, so a board that does not drain its socket must never delay the others: each has its own short queue, and
a departure that is superseded while it waits there is dropped in favour of the newer one.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import signal
from collections import OrderedDict, defaultdict

log = logging.getLogger("ferry")

QUIET_LIMIT = 90       # the gateway sends a heartbeat every 30 s
WRITE_LIMIT = 20
HELLO_LIMIT = 10


class Mailbox:
    """A queue that holds at most one message per key: the latest."""

    def __init__(self):
        self._items = OrderedDict()
        self._wake = asyncio.Event()

    def put(self, key, message):
        self._items.pop(key, None)
        self._items[key] = message
        self._wake.set()

    async def get(self):
        while not self._items:
            self._wake.clear()
            await self._wake.wait()
        return self._items.popitem(last=False)[1]


class Hub:
    def __init__(self):
        self.latest = defaultdict(dict)       # quay -> sailing number -> encoded line
        self.boards = defaultdict(set)        # quay -> mailboxes

    def publish(self, event):
        quay, sailing = event["quay"], event["sailing"]
        line = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if event["state"] in ("departed", "cancelled"):
            self.latest[quay].pop(sailing, None)
        else:
            self.latest[quay][sailing] = line
        for box in self.boards[quay]:
            box.put(sailing, line)

    @contextlib.contextmanager
    def subscription(self, quay):
        box = Mailbox()
        for sailing, line in reversed(self.latest[quay].items()):
            box.put(sailing, line)
        self.boards[quay].add(box)
        try:
            yield box
        finally:
            self.boards[quay].discard(box)


def parse_event(raw):
    """The event in a gateway line, None for a heartbeat; ValueError if it is neither."""
    event = json.loads(raw)
    if not isinstance(event, dict):
        raise ValueError("not an object")
    if event.get("type") == "heartbeat":
        return None
    missing = {"quay", "sailing", "state"} - event.keys()
    if missing:
        raise ValueError("without " + ", ".join(sorted(missing)))
    return event


async def follow_gateway(hub, host, port):
    """Stay connected for ever. Pauses grow to a minute, with jitter, so that four relays that lost the
    same gateway do not all come back in the same instant."""
    pause = 1.0
    while True:
        writer = None
        try:
            reader, writer = await asyncio.open_connection(host, port)
            log.info("gateway connected")
            while True:
                async with asyncio.timeout(QUIET_LIMIT):
                    raw = await reader.readline()
                if not raw:
                    raise ConnectionError("closed by gateway")
                pause = 1.0
                try:
                    event = parse_event(raw)
                except ValueError as err:
                    log.warning("skipped a line (%s): %.80r", err, raw)
                    continue
                if event is not None:
                    hub.publish(event)
        except (OSError, TimeoutError, asyncio.LimitOverrunError, ValueError) as err:
            log.warning("gateway: %s; next try in %.0f s", err or type(err).__name__, pause)
        finally:
            if writer is not None:
                writer.close()
        await asyncio.sleep(pause * random.uniform(0.7, 1.3))
        pause = min(pause * 2, 60.0)


async def serve_board(hub, reader, writer):
    peer = "%s:%s" % writer.get_extra_info("peername")[:2]
    quay = None
    try:
        async with asyncio.timeout(HELLO_LIMIT):
            verb, _, quay = (await reader.readline()).decode("ascii").strip().partition(" ")
        if verb != "QUAY" or not quay.isalpha():
            writer.write(b"ERR expected QUAY name\n")
            return
        log.info("board %s shows quay %s", peer, quay)
        with hub.subscription(quay) as box:
            await pump(box, reader, writer)
    except (OSError, TimeoutError, UnicodeDecodeError) as err:
        log.info("board %s (%s): %s", peer, quay, err or type(err).__name__)
    finally:
        writer.close()


async def pump(box, reader, writer):
    # A board never says anything after its greeting. Reading still matters: it is the only way
    # to learn that the other end has gone while there is nothing to send.
    gone = asyncio.ensure_future(reader.read())
    try:
        while True:
            item = asyncio.ensure_future(box.get())
            await asyncio.wait({item, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                item.cancel()
                return
            writer.write(item.result())
            async with asyncio.timeout(WRITE_LIMIT):
                await writer.drain()
    finally:
        gone.cancel()


def address(text):
    host, sep, port = text.rpartition(":")
    if not sep or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


async def run(args):
    hub = Hub()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sig, stop.set)

    server = await asyncio.start_server(lambda r, w: serve_board(hub, r, w), *args.listen, limit=256)
    follower = asyncio.create_task(follow_gateway(hub, *args.gateway))
    async with server:
        await stop.wait()
    follower.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await follower


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gateway", type=address, required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=address, default=("0.0.0.0", 8110), metavar="HOST:PORT")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    asyncio.run(run(args))


if __name__ == "__main__":
    main()
