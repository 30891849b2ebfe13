"""What answers at --address need not be a dashboard, nor answer soon, nor in few words."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from exl2ray.errors import ClusterError
from exl2ray.submit import jobs

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
GOOD = json.dumps({"version": "4", "ray_version": "2.60.0"}).encode()
Answer = Callable[[socket.socket], None]


def endless(s: socket.socket) -> None:
    s.sendall(HEAD + b'{"ray_version": "')
    while True:
        s.sendall(b"x" * 65536)


def trickle(s: socket.socket) -> None:
    s.sendall(HEAD)
    while True:
        s.sendall(b" ")
        time.sleep(0.05)


def silent(s: socket.socket) -> None:
    time.sleep(5)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:
    monkeypatch.setattr(jobs, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def loop(answer: Answer) -> None:
            while True:
                try:
                    s, _ = listening.accept()
                except OSError:
                    return
                with s:
                    try:
                        s.recv(65536)
                        answer(s)
                    except OSError:
                        pass

        def start(answer: Answer) -> str:
            threading.Thread(target=loop, args=(answer,), daemon=True).start()
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start
        listening.shutdown(socket.SHUT_RDWR)


def says(data: bytes) -> Answer:
    return lambda s: s.sendall(data)


@pytest.mark.parametrize(("answer", "message"), [
    (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "not the dashboard"),
    (says(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"), "not the dashboard"),
    (says(HEAD + b"[" * 50_000), "not the dashboard"),
    (says(HEAD + b"<html>"), "not the dashboard"),
    (says(HEAD + b"[1]"), "not the dashboard"),
    (endless, "not the dashboard"),
    (trickle, "no answer"),
    (silent, "no answer"),
], ids=["ssh", "grpc", "deep", "page", "list", "endless", "trickle", "silent"])  # fmt: skip
def test_what_is_no_dashboard_is_told_apart_soon(
    serve: Callable[[Answer], str], answer: Answer, message: str
) -> None:
    address, begin = serve(answer), time.monotonic()
    with pytest.raises(ClusterError) as e:
        jobs._reach(address)
    assert address in e.value.message
    assert message in f"{e.value.message} {e.value.hint}"
    assert e.value.hint
    assert time.monotonic() - begin < 4


def test_a_dashboard_is_one(serve: Callable[[Answer], str]) -> None:
    jobs._reach(serve(says(HEAD + GOOD)))


def test_a_refusal_is_left_to_the_client_of_ray(serve: Callable[[Answer], str]) -> None:
    jobs._reach(serve(says(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")))


@pytest.mark.parametrize("address", ["http://me:SECRET@head:8265", "me:SECRET@head:8265"])
def test_a_password_in_the_address_is_not_shown(address: str) -> None:
    with pytest.raises(ClusterError, match="goes nowhere") as e:
        jobs.normalized(address)
    assert "SECRET" not in f"{e.value} {e.value.hint}"
