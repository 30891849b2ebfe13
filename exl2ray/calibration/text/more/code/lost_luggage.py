"""A small service that reunites suitcases with their owners.

Two queues feed it: descriptions filed by passengers and scans made by the
baggage halls.  A matcher compares each newcomer with what is on file and
proposes pairs; people confirm them.  Storage is SQLite, everything else runs
on one event loop.
"""
from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal, NewType, TypedDict, TypeVar, cast

from aiohttp import web

BagId = NewType("BagId", int)
T = TypeVar("T")
Side = Literal["lost", "found"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS bag (
    id       INTEGER PRIMARY KEY,
    side     TEXT NOT NULL CHECK (side IN ('lost', 'found')),
    seen     TEXT NOT NULL,
    airport  TEXT NOT NULL CHECK (length(airport) = 3),
    tag      TEXT,
    looks    TEXT NOT NULL,
    closed   INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS bag_open ON bag (side, seen) WHERE NOT closed;
CREATE TABLE IF NOT EXISTS pair (
    lost     INTEGER NOT NULL REFERENCES bag,
    found    INTEGER NOT NULL REFERENCES bag,
    score    REAL NOT NULL,
    verdict  TEXT,
    PRIMARY KEY (lost, found)
) STRICT, WITHOUT ROWID;
"""


class Looks(TypedDict, total=False):
    colour: str
    shape: str
    wheels: int
    brand: str
    marks: list[str]


@dataclass(slots=True)
class Bag:
    side: Side
    seen: datetime
    airport: str
    looks: Looks
    tag: str | None = None
    id: BagId | None = None

    @classmethod
    def from_json(cls, side: Side, data: dict) -> Bag:
        problems = []
        try:
            seen = datetime.fromisoformat(data["seen"])
            if seen.tzinfo is None:
                problems.append("seen: time zone missing")
        except (KeyError, ValueError):
            problems.append("seen: no valid time")
        airport = str(data.get("airport", "")).upper()
        if not re.fullmatch("[A-Z]{3}", airport):
            problems.append("airport: three letters, please")
        tag = data.get("tag")
        if tag is not None and not re.fullmatch(r"\d{10}|[A-Z0-9]{2}\d{6}", tag):
            problems.append("tag: ten digits, or two characters and six digits")
        if problems:
            raise web.HTTPUnprocessableEntity(text=json.dumps({"problems": problems}),
                                              content_type="application/json")
        return cls(side, seen.astimezone(timezone.utc), airport, cast(Looks, data.get("looks", {})), tag)


NEAR_COLOURS = {frozenset(p) for p in [("black", "navy"), ("black", "grey"), ("red", "burgundy"), ("green", "teal")]}
RARE_MARKS = re.compile(r"sticker|ribbon|strap|crack|initial|painted", re.I)


def likeness(lost: Bag, found: Bag) -> float:
    """0 is hopeless, 1 is the same tag number; 0.5 is worth a phone call."""
    if lost.tag and found.tag:
        return 1.0 if lost.tag[-6:] == found.tag[-6:] else 0.05
    if found.seen < lost.seen - timedelta(hours=6):
        return 0.0                      # found before it was lost: another bag
    a, b = lost.looks, found.looks
    score = 0.2
    colours = {a.get("colour", "?"), b.get("colour", "?")}
    if len(colours) == 1:
        score += 0.05 if "black" in colours else 0.2    # two bags in three are black
    elif "?" not in colours and frozenset(colours) not in NEAR_COLOURS:
        score -= 0.25
    if a.get("shape") and a.get("shape") == b.get("shape"):
        score += 0.1
    if a.get("wheels") is not None and b.get("wheels") is not None:
        score += 0.05 if a["wheels"] == b["wheels"] else -0.15
    if a.get("brand", "").casefold() == b.get("brand", "-").casefold():
        score += 0.15
    words = lambda marks: {w for m in marks for w in RARE_MARKS.findall(m.lower())}
    score += 0.2 * min(2, len(words(a.get("marks", [])) & words(b.get("marks", []))))
    days = (found.seen - lost.seen) / timedelta(days=1)
    score *= 0.97 ** max(0.0, days - 2)
    return max(0.0, min(score, 0.95))


class Store:
    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.executescript(SCHEMA)
        self._lock = asyncio.Lock()

    def close(self) -> None:
        self._db.close()

    async def _run(self, work: Callable[[sqlite3.Cursor], T]) -> T:
        """SQLite blocks, so it gets a thread; the lock keeps transactions apart."""
        def job() -> T:
            with closing(self._db.cursor()) as cursor:
                cursor.execute("BEGIN IMMEDIATE")
                try:
                    result = work(cursor)
                except BaseException:
                    cursor.execute("ROLLBACK")
                    raise
                cursor.execute("COMMIT")
                return result
        async with self._lock:
            return await asyncio.to_thread(job)

    async def add(self, bag: Bag) -> list[tuple[BagId, float]]:
        def work(c: sqlite3.Cursor):
            c.execute("INSERT INTO bag (side, seen, airport, tag, looks) VALUES (?, ?, ?, ?, ?)",
                      (bag.side, bag.seen.isoformat(), bag.airport, bag.tag, json.dumps(bag.looks)))
            bag.id = BagId(c.lastrowid or 0)
            other: Side = "found" if bag.side == "lost" else "lost"
            c.execute("SELECT * FROM bag WHERE side = ? AND NOT closed AND seen > ?",
                      (other, (bag.seen - timedelta(days=45)).isoformat()))
            hits = []
            for row in c.fetchall():
                theirs = self._bag(row)
                lost, found = (bag, theirs) if bag.side == "lost" else (theirs, bag)
                score = likeness(lost, found)
                if score >= 0.5:
                    hits.append((theirs.id, score))
                    c.execute("INSERT INTO pair (lost, found, score) VALUES (?, ?, ?)", (lost.id, found.id, score))
            return sorted(hits, key=lambda h: -h[1])
        return await self._run(work)

    async def confirm(self, lost: int, found: int) -> bool:
        def work(c: sqlite3.Cursor) -> bool:
            c.execute("UPDATE pair SET verdict = 'same' WHERE lost = ? AND found = ? AND verdict IS NULL", (lost, found))
            if c.rowcount == 0:
                return False
            c.execute("UPDATE bag SET closed = 1 WHERE id IN (?, ?)", (lost, found))
            c.execute("UPDATE pair SET verdict = 'other' WHERE verdict IS NULL AND (lost = ? OR found = ?)", (lost, found))
            return True
        return await self._run(work)

    @staticmethod
    def _bag(row: sqlite3.Row) -> Bag:
        return Bag(row["side"], datetime.fromisoformat(row["seen"]), row["airport"], json.loads(row["looks"]),
                   row["tag"], BagId(row["id"]))


STORE = web.AppKey("store", Store)
routes = web.RouteTableDef()


@routes.post("/{side:lost|found}")
async def report(request: web.Request) -> web.Response:
    bag = Bag.from_json(cast(Side, request.match_info["side"]), await request.json())
    hits = await request.app[STORE].add(bag)
    body = asdict(bag) | {"seen": bag.seen.isoformat(), "candidates": [{"id": i, "score": round(s, 2)} for i, s in hits]}
    return web.json_response(body, status=201, headers={"Location": f"/bag/{bag.id}"})


@routes.post(r"/pair/{lost:\d+}/{found:\d+}/confirm")
async def confirm(request: web.Request) -> web.Response:
    done = await request.app[STORE].confirm(int(request.match_info["lost"]), int(request.match_info["found"]))
    if not done:
        raise web.HTTPConflict(text="no such pair, or somebody has decided already\n")
    return web.Response(status=204)


@web.middleware
async def bad_json(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]):
    try:
        return await handler(request)
    except json.JSONDecodeError as e:
        raise web.HTTPBadRequest(text=f"line {e.lineno}: {e.msg}\n") from e


@asynccontextmanager
async def _store(app: web.Application) -> AsyncIterator[None]:
    app[STORE] = Store(os.environ.get("LUGGAGE_DB", "luggage.sqlite"))
    yield
    app[STORE].close()


def make_app() -> web.Application:
    app = web.Application(middlewares=[bad_json])
    app.add_routes(routes)
    app.cleanup_ctx.append(_store)
    return app


if __name__ == "__main__":
    web.run_app(make_app(), port=8090)
