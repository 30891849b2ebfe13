"""Permissions count for root, too, in a process that has given up the right to pass them by; others never had it."""

from __future__ import annotations

import ctypes
import os
import struct

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
PR_CAPBSET_DROP, VERSION = 24, 0x20080522
CAPGET, CAPSET = {"x86_64": (125, 126), "aarch64": (90, 91)}.get(os.uname().machine, (0, 0))


def give_up_privileges() -> None:
    """For this process and its children, for good."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = ctypes.create_string_buffer(struct.pack("Ii", VERSION, 0)), ctypes.create_string_buffer(24)
    if not CAPGET or libc.syscall(CAPGET, header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    fields = list(struct.unpack("6I", data.raw))
    fields[:3] = [value & ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH) for value in fields[:3]]
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if libc.syscall(CAPSET, header, ctypes.create_string_buffer(struct.pack("6I", *fields))) != 0:
        raise OSError(ctypes.get_errno(), "capset")
