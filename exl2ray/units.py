"""Sizes as people write them."""

from __future__ import annotations

import re

from exl2ray.errors import UsageError

MOST_TOKENS = 10**10  # the order of their rows is in memory
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, flag: str) -> int:
    """Bytes of "24GB", "24 GiB", "23.5G", "800M" or plain bytes; UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    unit = match[2].lower() if match else "?"
    if match is None or unit not in UNITS:
        raise UsageError(f"{flag} {text[:40]}: not a size", "as in 24GB (10^9 bytes) or 24GiB (2^30 bytes)")
    return int(float(match[1]) * UNITS[unit])


def parse_count(text: str, flag: str) -> int:
    """1000000 of "1M", "1m" or "1000000"; UsageError otherwise, for less than 1, and for more than `MOST_TOKENS`."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]?)\s*", text, re.IGNORECASE)
    count = 0 if match is None else int(float(match[1]) * UNITS[match[2].lower()])
    if count < 1:
        raise UsageError(f"{flag} {text[:40]}: not a number of tokens", "as in 500k, 4M or 1000000")
    if count > MOST_TOKENS:
        raise UsageError(f"{flag} {text[:40]}: at most {MOST_TOKENS // 10**9}G tokens", "1M to 16M is what tuning takes")
    return count
