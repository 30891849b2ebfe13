"""Which network interface the members of a group use to reach each other.

Left to itself, gloo publishes the address that the host name resolves to. On many machines this is a loopback address, at
which other machines find only themselves, and the group waits for ever. The node's address in Ray is one at which it has
been reached already.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct

_SIOCGIFCONF, _IFREQ_BYTES = 0x8912, 40  # netdevice(7), 64-bit Linux
_MAX_ADDRESSES = 1024


def use_interface_of(address: str) -> None:
    """Binds the groups of this process to the interface that has this IPv4 address, unless the user chose one.

    An address that no interface has, or one that is not IPv4, changes nothing: the libraries then choose for themselves.
    """
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": this one, not all whose names begin so


def interface_of(address: str) -> str | None:
    """Name of the interface with an IPv4 address, be it its only one or not; None if there is none."""
    try:
        wanted = socket.inet_pton(socket.AF_INET, address)
    except OSError:
        return None
    buffer = array.array("B", bytes(_MAX_ADDRESSES * _IFREQ_BYTES))
    place, size = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        answer = fcntl.ioctl(s.fileno(), _SIOCGIFCONF, struct.pack("iP", size, place))
    used: int = struct.unpack("iP", answer)[0]
    data = buffer.tobytes()
    for start in range(0, used, _IFREQ_BYTES):
        if data[start + 20 : start + 24] == wanted:
            return data[start : start + 16].partition(b"\0")[0].decode().partition(":")[0]  # "eth0:1" is eth0 too
    return None
