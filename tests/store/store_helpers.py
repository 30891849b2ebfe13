"""Values shared by the tests of the store."""

from __future__ import annotations

from exl2ray.store.lock import LockTiming
from exl2ray.store.status import WorkStatus, read_status
from exl2ray.store.workdir import WorkDir

JOB = {
    "identity": {"fingerprint": "ab12", "architecture": "LlamaForCausalLM"},
    "measure": {"rows": 16, "length": 2048, "seed": 0},
    "quantize": {"bits": [4.0], "head_bits": 6},
    "output": {"shard_size_mb": 8192, "compile_full": None},
}
VERSIONS = {"exl2ray": "0.1.0", "torch": "2.13.0"}
FAST = LockTiming(heartbeat=0.05, stale=600.0, settle=0.05)  # a busy machine may keep a heart from beating for a while


def status_of(work: WorkDir) -> WorkStatus:
    """What anybody would read now of a directory that is open here."""
    work.store.flush()
    return read_status(work.store.root)
