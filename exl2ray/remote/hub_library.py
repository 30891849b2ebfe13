"""huggingface_hub, which is optional, and which reads numbers from the environment when it is imported."""

from __future__ import annotations

import os
from contextlib import suppress

from exl2ray.errors import UsageError

ENDPOINT = "https://huggingface.co"
NUMBERS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")


def need_hub_library(what: str) -> None:
    """Raises UsageError if it is not installed, or would end at its import. ``what`` needs it, for the message."""
    for name in NUMBERS:
        value = os.environ.get(name)
        with suppress(ValueError):
            int(value or 0)
            continue
        raise UsageError(f"environment variable {name} is {str(value)[:40]!r}, not a number of seconds", f"unset {name}")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as e:
        raise UsageError(f"{what}: {e.name or 'huggingface_hub'} is not installed", "pip install 'exl2ray[hub]'") from e


def endpoint() -> str:
    """Where the Hub is: $HF_ENDPOINT, as for all tools of the Hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT
