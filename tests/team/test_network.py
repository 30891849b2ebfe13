"""Members of a group find each other although their host names resolve to loopback addresses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exl2ray.driver import worker_actor

ROOT = Path(__file__).resolve().parents[2]
CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def test_two_machines_whose_names_resolve_to_loopback() -> None:
    if not shutil.which("ip") or subprocess.run(["unshare", "-rnu", "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here (needs iproute2 and unprivileged user namespaces)")
    env = {k: v for k, v in os.environ.items() if k not in CHOICES} | {"PYTHONPATH": str(ROOT)}
    command = ["unshare", "-rnu", sys.executable, str(Path(__file__).with_name("two_machines.py"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    gathered = [f"{rank} ['10.77.0.1', '10.77.0.2']" for rank in (0, 1)]
    assert sorted(done.stdout.splitlines()) == sorted([*gathered, "0 [1.0, 1.0, 1.0]", "1 [1.0, 1.0, 1.0]"])


def test_the_interface_of_the_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    worker_actor.use_interface_of("192.0.2.254")
    assert not os.environ.keys() & set(CHOICES)
    worker_actor.use_interface_of("127.0.0.1")
    assert [os.environ.get(name) for name in CHOICES] == ["lo", "=lo"]


def test_the_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.setenv(name, "ib0")
    worker_actor.use_interface_of("127.0.0.1")
    assert {os.environ[name] for name in CHOICES} == {"ib0"}


@pytest.mark.parametrize("address", ["", "localhost", "::1", "fe80::1", "127.0.0.999", "127.1"])
def test_what_is_not_an_ipv4_address_has_no_interface(address: str) -> None:
    assert worker_actor.interface_of(address) is None
