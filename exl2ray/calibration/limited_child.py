"""What runs in the child of `exl2ray.calibration.limited`: requests from standard input, one after the other, answers on
standard output. A message is the length of a JSON head (8 bytes), the head, and the blobs whose lengths the head lists.

This file imports little, since its start is waited for: no torch, no numpy.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

Answer = tuple[dict[str, Any], list[bytes]]
Handler = Callable[[dict[str, Any], list[bytes]], Answer]
REASON_CHARACTERS = 300  # of an error's text, which may quote whatever the file holds
ADDRESS_SLACK = 6 << 30  # address space that allocators and threads reserve without using it
STACK_BYTES = 1 << 18  # of the thread that waits for the end of the parent
CHUNK_BYTES = 1 << 20  # of text in one batch; encodings take a hundred times as much


def main(kind: str) -> None:
    """Serves until standard input ends, or the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not look like an answer
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.stack_size(0)
    handlers = {"template": template_handlers, "tokenizer": tokenizer_handlers, "convert": convert_handlers,
                "data": data_handlers, "pattern": pattern_handlers}[kind]()  # fmt: skip
    if kind != "convert":
        _limit_files()
    while True:
        size = requests.read(8)
        if len(size) < 8:
            return
        request = json.loads(requests.read(struct.unpack("<Q", size)[0]))
        blobs = [requests.read(n) for n in request["blobs"]]
        _limit(**request["limits"])
        head, out = _answer(handlers[request["op"]], request, blobs)
        _send(answers, head, out)


def _end_with_parent() -> None:
    """A parent that is killed cannot end this process, which may have much of a template or tokenizer in front of it; the
    pipe from it, which only the parent holds, says that it is gone.
    """
    with contextlib.suppress(AttributeError, OSError):  # systems without poll: the limit on time remains
        hung_up = select.poll()
        hung_up.register(0, 0)  # being hung up is told without being asked for
        if any(what & select.POLLHUP for _, what in hung_up.poll()):
            os._exit(0)


def _answer(handler: Handler, request: dict[str, Any], blobs: list[bytes]) -> Answer:
    try:
        return handler(request, blobs)
    except MemoryError:
        return {"error": f"used more than {request['limits']['memory'] >> 20} MB of memory"}, []
    except BaseException as e:  # whatever the author's code raises; panics of compiled code are no Exception
        return {"error": shown(f"{type(e).__name__}: {e}" if request.get("names", True) else str(e))}, []


def _send(answers: BinaryIO, head: dict[str, Any], blobs: Sequence[bytes]) -> None:
    data = json.dumps({**head, "blobs": [len(b) for b in blobs]}).encode()
    answers.write(struct.pack("<Q", len(data)) + data)
    for blob in blobs:
        answers.write(blob)
    answers.flush()


def _limit(memory: int, cpu: int) -> None:
    """Limits for what follows. RLIMIT_DATA counts what can be written; address space is mostly only reserved."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        for what, value in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_AS, memory + ADDRESS_SLACK),
                            (resource.RLIMIT_CPU, cpu)):  # fmt: skip
            hard = resource.getrlimit(what)[1]
            resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _limit_files() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def shown(text: str, most: int = REASON_CHARACTERS) -> str:
    """``text`` on one line, escapes for what is not printable, and not too long."""
    cut = text[:most] + ("..." if len(text) > most else "")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(cut.split()))


def quoted(text: str, most: int = 40) -> str:
    """``shown`` between quotation marks: a token, a name."""
    return f"'{shown(text, most)}'"


# ---- chat templates -----------------------------------------------------------------------------------------------------


def template_handlers() -> dict[str, Handler]:
    from exl2ray.calibration.chat_text import ChatRenderer
    from exl2ray.calibration.text import Conversation

    renderers: list[ChatRenderer] = []

    def compile_template(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        renderers[:] = [ChatRenderer(blobs[0].decode(), request["special_tokens"])]
        return {}, []

    def render(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        messages = tuple((role, content) for role, content in request["messages"])
        text = renderers[0].render(Conversation("", messages), request["reply"])
        if len(text) > request["characters"]:
            raise ValueError(f"{len(text)} characters of output for {request['characters']} at most")
        return {}, [text.encode("utf-8", "replace")]

    return {"compile": compile_template, "render": render}


# ---- tokenizer.json -----------------------------------------------------------------------------------------------------


def tokenizer_handlers() -> dict[str, Handler]:
    from exl2ray.calibration.vocabulary import LoadedTokenizer

    loaded: list[LoadedTokenizer] = []

    def load(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        loaded[:] = [LoadedTokenizer(blobs[0].decode(), request["stated"], request["named"], request["rows"])]
        return loaded[0].report(), []

    def look_up(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        tokenizer = loaded[0].tokenizer
        ids = [tokenizer.token_to_id(t) for t in request.get("tokens", ())]
        tokens = [tokenizer.id_to_token(i) if 0 <= i < 1 << 32 else None for i in request.get("of", ())]
        return {"ids": ids, "tokens": tokens}, []

    def encode(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        texts = [b.decode() for b in blobs]
        ids, lengths = array("i"), []
        for chunk in _chunks(texts, [len(b) for b in blobs]):
            if len(chunk) == 1:
                encodings = [loaded[0].tokenizer.encode(chunk[0], add_special_tokens=False)]
            else:
                encodings = loaded[0].tokenizer.encode_batch(chunk, add_special_tokens=False)
            encodings.reverse()
            while encodings:  # each is given up before the next chunk is encoded: it is a hundred times its text
                found = encodings.pop().ids
                lengths.append(len(found))
                ids.extend(found)
        return {"lengths": lengths}, [ids.tobytes()]

    def decode(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        return {}, [loaded[0].tokenizer.decode(request["ids"], skip_special_tokens=False).encode("utf-8", "replace")]

    return {"load": load, "look_up": look_up, "encode": encode, "decode": decode}


def _chunks(texts: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    out: list[list[str]] = []
    room = 0
    for text, size in zip(texts, sizes, strict=True):
        if not out or size > room:
            out.append([])
            room = CHUNK_BYTES
        out[-1].append(text)
        room -= size
    return out


# ---- tokenizer.model, vocab.json and merges.txt -------------------------------------------------------------------------


def convert_handlers() -> dict[str, Handler]:
    def convert(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        from exl2ray.calibration.conversion import backend_json

        text, differing = backend_json(request["directory"])
        return {"differing": differing}, [text.encode()]

    return {"convert": convert}


# ---- regular expressions ------------------------------------------------------------------------------------------------


def pattern_handlers() -> dict[str, Handler]:
    import re

    def match(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        pattern = re.compile(request["pattern"])
        return {"matching": [text for text in request["texts"] if pattern.fullmatch(text)]}, []

    return {"match": match}


# ---- calibration data ---------------------------------------------------------------------------------------------------


def data_handlers() -> dict[str, Handler]:
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # gives memory back, and notices limits
    from exl2ray.calibration.data.child import handlers

    return handlers()
