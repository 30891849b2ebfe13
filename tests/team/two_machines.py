"""Two machines in network namespaces, joined by a cable, whose host name resolves to a loopback address.

    unshare -rnu python two_machines.py
    python two_machines.py RANK OWN_ADDRESS RENDEZVOUS_PORT     one member; prints what the group gathers

Without arguments: makes the machines, serves the rendezvous on the first, runs a member on each. Needs iproute2.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import torch

from exl2ray.driver.worker_actor import use_interface_of
from exl2ray.team.comm import Group, serve_rendezvous

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def say(line: str) -> None:
    """One write, so that lines of the two members do not run into each other."""
    os.write(1, f"{line}\n".encode())


def ip(*arguments: str) -> list[str]:
    return ["ip", *arguments]


def cable(pid: int) -> None:
    """Joins this namespace and that of ``pid``."""
    there = ["nsenter", "-t", str(pid), "-n"]
    commands = [
        ip("link", "add", "left", "type", "veth", "peer", "name", "right"),
        ip("link", "set", "right", "netns", str(pid)),
    ]
    for prefix, address, name in (([], ADDRESSES[0], "left"), (there, ADDRESSES[1], "right")):
        commands += [
            [*prefix, *ip("addr", "add", "10.99.0.7/32", "dev", "lo")],  # further addresses, to be told apart
            [*prefix, *ip("addr", "add", f"{address}/24", "dev", name)],
            [*prefix, *ip("link", "set", name, "up")],
            [*prefix, *ip("link", "set", "lo", "up")],
        ]
    for command in commands:
        subprocess.run(command, check=True)


def member(rank: int, address: str, port: int) -> None:
    use_interface_of(address)
    group = Group((ADDRESSES[0], port), rank, 2, torch.device("cpu"))
    say(f"{rank} {group.gather(address)}")
    received = group.broadcast(torch.full((3,), float(rank)), 1)
    say(f"{rank} {received.tolist()}")
    group.close()


def main() -> None:
    socket.sethostname("localhost")
    other = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
    try:
        while os.readlink(f"/proc/{other.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.01)  # until it has its namespace
        cable(other.pid)
        _served, port = serve_rendezvous(ADDRESSES[0])
        command = ["nsenter", "-t", str(other.pid), "-n", sys.executable, __file__, "1", ADDRESSES[1], str(port)]
        second = subprocess.Popen(command)
        member(0, ADDRESSES[0], port)
        sys.exit(second.wait())
    finally:
        other.kill()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        member(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        main()
