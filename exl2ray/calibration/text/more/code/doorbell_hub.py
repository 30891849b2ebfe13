"""Hub for the doorbells of a block of flats.

Bells connect over plain TCP and speak one line of JSON per message.  A press is
handed to every handset of the flat; the first one to answer gets the call, the
others are told to be quiet.  When nobody answers within twenty seconds the
concierge's desk rings instead.
"""

import asyncio
import contextlib
import json
import logging
import signal
from collections import defaultdict
from dataclasses import dataclass, field

log = logging.getLogger("doorbell")

RING_SECONDS = 20.0
DESK = "desk"


@dataclass(eq=False)
class Handset:
    flat: str
    writer: asyncio.StreamWriter
    label: str = "?"

    async def send(self, kind: str, **fields) -> None:
        self.writer.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()


@dataclass
class Call:
    number: int
    door: str
    flat: str
    answered: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Hub:
    def __init__(self):
        self.handsets: dict[str, set[Handset]] = defaultdict(set)
        self.calls: dict[int, Call] = {}
        self._next = 1

    async def ring(self, door: str, flat: str) -> str | None:
        """Ring until someone answers. Returns the label of the handset that did, or None."""
        call = Call(self._next, door, flat)
        self._next += 1
        self.calls[call.number] = call
        try:
            for target in (flat, DESK):
                winner = await self._ring_group(call, target)
                if winner is not None:
                    return winner.label
            return None
        finally:
            del self.calls[call.number]

    async def _ring_group(self, call: Call, target: str) -> Handset | None:
        group = set(self.handsets[target])
        if not group:
            return None
        await asyncio.gather(*(h.send("ring", call=call.number, door=call.door) for h in group))
        try:
            # shield: a timeout must not cancel the future, the desk still wants to resolve it
            winner = await asyncio.wait_for(asyncio.shield(call.answered), RING_SECONDS)
        except asyncio.TimeoutError:
            winner = None
        await asyncio.gather(*(h.send("hush", call=call.number) for h in group if h is not winner))
        return winner

    def answer(self, handset: Handset, number: int) -> bool:
        call = self.calls.get(number)
        if call is None or call.answered.done():
            return False
        if handset.flat not in (call.flat, DESK):
            log.warning("%s tried to answer a call for flat %s", handset.label, call.flat)
            return False
        call.answered.set_result(handset)
        return True

    # -- connections --------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        handset = None
        try:
            async for raw in reader:
                try:
                    message = json.loads(raw)
                    kind = message["kind"]
                except (ValueError, KeyError, TypeError):
                    log.info("%s: rubbish %r", peer, raw[:60])
                    continue
                match kind:
                    case "hello":
                        if handset:
                            self.handsets[handset.flat].discard(handset)
                        handset = Handset(message["flat"], writer, message.get("label", str(peer)))
                        self.handsets[handset.flat].add(handset)
                        await handset.send("welcome", others=len(self.handsets[handset.flat]) - 1)
                    case "press":
                        # the bell wants an answer, but its next press must not wait for this one
                        asyncio.create_task(self._press(message["door"], message["flat"], writer))
                    case "answer" if handset:
                        taken = self.answer(handset, message["call"])
                        await handset.send("talk" if taken else "late", call=message["call"])
                    case _:
                        log.info("%s: unknown kind %r", peer, kind)
        except ConnectionResetError:
            pass
        finally:
            if handset:
                self.handsets[handset.flat].discard(handset)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _press(self, door, flat, writer):
        who = await self.ring(door, flat)
        log.info("door %s, flat %s: %s", door, flat, who or "nobody")
        reply = {"kind": "open-line", "to": who} if who else {"kind": "nobody"}
        writer.write(json.dumps(reply).encode() + b"\n")


async def main(port: int = 7351) -> None:
    hub = Hub()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sig, stop.set)
    async with await asyncio.start_server(hub.serve, "0.0.0.0", port, limit=4096):
        log.info("listening on %d", port)
        await stop.wait()
    log.info("bye")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    asyncio.run(main())
