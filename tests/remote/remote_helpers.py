"""Conversions of a model that lies elsewhere, and what they left."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from model_hub import TOKEN, ModelHub

SECRET = "SecretKeyOnLoopback0123456789"
QUICK = ("-mr", "2", "-r", "3", "-l", "128", "-ml", "128", "-b", "4", "--device", "cpu", "--executor", "inline",
         "--evaluate", "never", "--quality", "reference")  # fmt: skip


def made(root: Path) -> dict[str, str]:
    files = {p.name: p for p in [*(root / "out").iterdir(), root / "work" / "measurement.json"]}
    hashes = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    card = files["README.md"].read_text().partition("base_model:")
    return {**hashes, "README.md": "" if card[1] else hashes["README.md"]}


def hub_env(hub: ModelHub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "EXL2RAY_SOURCE_ATTEMPTS": "3"}  # fmt: skip


def no_secret_below(root: Path, *secrets: str) -> None:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            assert not any(s.encode() in data for s in secrets), path


def without_card(hashes: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in hashes.items() if k != "README.md"}


def measure(text: Path, work: Path, *more: str) -> tuple[str | Path, ...]:
    return ("measure", "-i", "hf://me/model", "-o", work, "-c", text, *QUICK, "--allocation", "module", *more)


def plan(address: str, text: Path) -> tuple[str | Path, ...]:
    return ("plan", "-i", address, "-c", text, "-b", "4", "-l", "128", "-ml", "128", "-r", "2", "-mr", "2")


def blocks_of(work: Path) -> int:
    return sum(p.stat().st_size for p in (work / "source" / "blocks").glob("*-*"))
