"""Do driver and workers see the same directory, with the same software? Checked once per worker, before any work.

The driver writes a random token into the work directory; a worker must be able to read it and to write beside it. A
mount that is missing, stale or read-only on one node, or another bucket endpoint there, shows before it costs anything.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping

from exl2ray.errors import StoreError, why_not_read
from exl2ray.store.faults import MissingFileError
from exl2ray.store.file_names import NONCE
from exl2ray.store.fs import Store
from exl2ray.store.records import canonical_json

_RETRY_SECONDS = 0.5


def write_nonce(store: Store, versions: Mapping[str, str]) -> tuple[str, str]:
    """Driver side: name of the nonce file and the token in it."""
    token = secrets.token_hex(16)
    rel = f"{NONCE}/{token[:8]}.json"
    store.put(rel, canonical_json({"token": token, "versions": dict(versions), "host": socket.gethostname()}))
    return rel, token


def verify_nonce(
    store: Store,
    rel: str,
    token: str,
    versions: Mapping[str, str] | None = None,
    timeout_seconds: float = 15.0,  # network file systems may show a new file late
) -> None:
    """Worker side. StoreError if the file is not there in time, holds another token or cannot be joined by a file of
    ours, or if one of ``versions`` (this node's) differs from the driver's; names that only one side has are ignored.
    """
    here = f"on {socket.gethostname()}"
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            data = store.get(rel)
            break
        except MissingFileError as e:
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"{store.full_name(rel)}, which the driver wrote, is not visible {here}",
                    "the work directory must be the same file system or bucket on every node; "
                    "give a shared path or an s3:// or gs:// URL with -o",
                ) from e
        time.sleep(_RETRY_SECONDS)
    try:
        stored = json.loads(data)
        found, expected, driver = stored["token"], dict(stored["versions"]), stored["host"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise StoreError(f"{store.full_name(rel)} {here} is not what the driver wrote: {why_not_read(e)}") from e
    if found != token:
        raise StoreError(
            f"{store.full_name(rel)} {here} holds another token than the driver's on {driver}",
            "two different directories have this name; give a shared path with -o",
        )
    pairs = [(name, expected.get(name, mine), mine) for name, mine in sorted((versions or {}).items())]
    different = [f"{name} {theirs} on {driver}, {mine} here" for name, theirs, mine in pairs if theirs != mine]
    if different:
        raise StoreError(f"versions differ {here}: {'; '.join(different)}", "install the same versions on every node")
    answer = f"{NONCE}/{token[:8]}-{socket.gethostname()}-{os.getpid()}.json"
    store.put(answer, data)  # raises where this node may not write
    store.delete(answer)
