"""What every worker is: a process with a name, which may belong to a group and whose passes can be ended."""

from __future__ import annotations

import os
import socket

import torch

from exl2ray.quant.group import Comm, Solo
from exl2ray.store.fs import Store
from exl2ray.store.nonce import verify_nonce
from exl2ray.team.comm import Group
from exl2ray.team.messages import Meeting, WorkerSetup

NOWHERE = 1 << 62  # no item has an index as large


class Grouped:
    """``end``: the index that the pass in hand is not to reach."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup, self.device = setup, torch.device(setup.device)
        self.set_threads()
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.end = NOWHERE
        self._comm: Comm = Solo()
        self._met = Meeting()

    def set_threads(self) -> None:
        """Of this process, and of the thread that calls."""
        if self.setup.threads and self.device.type == "cpu":
            torch.set_num_threads(self.setup.threads)

    def check_place(self, store: Store) -> None:
        """Raises an error unless this process sees the work directory of the driver, and runs the same versions."""
        if self.setup.nonce is not None:
            verify_nonce(store, *self.setup.nonce, self.setup.versions)

    def end_before(self, index: int) -> None:
        """The pass ends before it begins item ``index`` or one after it. Called while it runs, from another thread."""
        self.end = index

    def group(self, meeting: Meeting) -> Comm:
        """The connection to a group; the present one, if it is of this meeting."""
        if self._met != meeting:
            self._leave_group()
            if meeting.place is not None:
                self._comm = Group(meeting.place, meeting.rank, meeting.size, self.device)
            self._met = meeting
        return self._comm

    def release(self) -> None:
        """Leaves the group, and forgets what fills memory, after an error."""
        self._leave_group()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _leave_group(self) -> None:
        self._comm.close()
        self._comm, self._met = Solo(), Meeting()
