"""Where a plot may be written: looked at before what it shows is computed, so without matplotlib."""

from __future__ import annotations

from pathlib import Path

from exl2ray.errors import UsageError

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> None:
    """UsageError unless ``path`` ends as plots do and its folder exists."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a plot ends in {', '.join(FORMATS)}", "the ending says how it is drawn: ladder.png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}", "create it, or choose another place")


def is_plot(content: bytes) -> bool:
    """Whether a file is a plot of matplotlib, as those of `exl2ray.report.style` are."""
    return content.startswith((b"\x89PNG", b"<?xml", b"%PDF")) and b"matplotlib" in content.lower()
