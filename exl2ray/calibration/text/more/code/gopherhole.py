#!/usr/bin/env python3
"""A small Gopher server (RFC 1436) for a village archive, on asyncio streams.

Text files, images and folders; a file called .names in a folder gives the titles, and a line in it without a file name
becomes an information line. Requests ending in a tab and words search the text files of a folder.
"""
import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

ROOT = Path(os.environ.get("GOPHER_ROOT", "/srv/gopher")).resolve()
HOST = os.environ.get("GOPHER_HOST", "archive.example")
PORT = int(os.environ.get("GOPHER_PORT", "70"))
TYPES = {".txt": "0", ".gif": "g", ".jpg": "I", ".png": "I", ".zip": "9", ".pdf": "d", ".wav": "s", ".html": "h"}
MAX_REQUEST = 1024

log = logging.getLogger("gopherhole")


class NotHere(Exception):
    pass


def resolve(selector: str) -> Path:
    if "\0" in selector:
        raise NotHere(selector)
    path = (ROOT / selector.lstrip("/")).resolve()
    if not path.is_relative_to(ROOT) or any(part.startswith(".") for part in path.relative_to(ROOT).parts):
        raise NotHere(selector)
    if not path.exists():
        raise NotHere(selector)
    return path


def item(kind: str, title: str, selector: str = "", host: str = HOST, port: int = PORT) -> str:
    title = title.replace("\t", " ")
    return f"{kind}{title[:70]}\t{selector}\t{host}\t{port}\r\n"


def info(text: str) -> str:
    return item("i", text, "", "error.host", 1)


def menu(folder: Path) -> str:
    base = "/" + folder.relative_to(ROOT).as_posix().removeprefix(".")
    titles: dict[str, str] = {}
    out: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / ".names").read_text("utf-8").splitlines():
            name, sep, title = line.partition("\t")
            if sep:
                titles[name] = title
                out.append("\0" + name)          # a place to be filled below, in the order of .names
            else:
                out.append(info(line))
    entries = {p.name: p for p in folder.iterdir() if not p.name.startswith(".")}
    rest = sorted((n for n in entries if n not in titles), key=lambda n: (not entries[n].is_dir(), n.casefold()))
    lines = []
    for line in out + ["\0" + n for n in rest]:
        if not line.startswith("\0"):
            lines.append(line)
            continue
        name = line[1:]
        p = entries.get(name)
        if p is None:
            log.warning("%s/.names speaks of %s, which is not there", folder, name)
            continue
        kind = "1" if p.is_dir() else TYPES.get(p.suffix.lower(), "9")
        title = titles.get(name) or p.stem.replace("_", " ").capitalize()
        if kind != "1" and p.stat().st_size > 200_000:
            title += f" ({p.stat().st_size // 1000} kB)"
        lines.append(item(kind, title, f"{base.rstrip('/')}/{name}"))
    lines.append(item("7", "Search in this folder", base))
    return "".join(lines) + ".\r\n"


def search(folder: Path, words: list[str]) -> str:
    hits = []
    for p in folder.rglob("*.txt"):
        text = p.read_text("utf-8", errors="replace").casefold()
        counts = [text.count(w) for w in words]
        if all(counts):
            hits.append((sum(counts), p))
    hits.sort(key=lambda h: (-h[0], h[1]))
    if not hits:
        return info("Nothing found. Try fewer words, or the spelling of the time.") + ".\r\n"
    return "".join(item("0", f"{n:3} × {p.stem.replace('_', ' ')}", "/" + p.relative_to(ROOT).as_posix()) for n, p in hits[:50]) + ".\r\n"


def as_text(path: Path) -> bytes:
    # A line with a lone full stop would end the answer, so it is doubled.
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return "".join(("." + l if l.startswith(".") else l) + "\r\n" for l in lines).encode() + b".\r\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("peername")[0]
    try:
        async with asyncio.timeout(20):
            line = await reader.readuntil(b"\n")
            selector, _, query = line.decode("utf-8", "replace").rstrip("\r\n").partition("\t")
            if selector.startswith("URL:") or selector.startswith("GET "):
                raise NotHere(selector)
            path = await asyncio.to_thread(resolve, selector)
            if query.strip("+ "):
                answer = (await asyncio.to_thread(search, path, query.casefold().split())).encode()
            elif path.is_dir():
                answer = (await asyncio.to_thread(menu, path)).encode()
            elif TYPES.get(path.suffix.lower()) == "0":
                answer = await asyncio.to_thread(as_text, path)
            else:
                answer = await asyncio.to_thread(path.read_bytes)
            log.info("%s %r %d bytes", peer, selector, len(answer))
            writer.write(answer)
            await writer.drain()
    except NotHere as e:
        log.info("%s %r not here", peer, str(e))
        writer.write(item("3", "There is no such thing in the archive.").encode() + b".\r\n")
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError) as e:
        log.info("%s %s", peer, type(e).__name__)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    server = await asyncio.start_server(serve, port=PORT, limit=MAX_REQUEST)
    stop = asyncio.Event()
    for s in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(s, stop.set)
    async with server:
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
