"""What tests of the doctor share: a card, what torch says of it, and the one finding that matters."""

from __future__ import annotations

from exl2ray.doctor.diagnosis import Finding

CARD = "NVIDIA RTX A6000, 1 MiB used of 49140 MiB, driver {driver}"
UNUSABLE = {"version": "2.13.0", "cuda": "13.0", "hip": None, "gpus": [], "broken": {}, "reason": "too old"}
USABLE = {**UNUSABLE, "gpus": ["NVIDIA RTX A6000 (sm_86, 48 of 51 GB free)"], "reason": ""}


def only(found: list[Finding]) -> Finding:
    """The one finding that is not all right."""
    (wrong,) = [f for f in found if f.level != "ok"]
    assert wrong.fix, "every complaint comes with what to do"
    return wrong
