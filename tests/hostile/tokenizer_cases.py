"""Models whose templates and tokenizer files are attacks; a plan of each within limits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bounded import Run, exl2ray

Change = Callable[[Path], None]
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def plan(model: Path, target: Path, change: Change) -> Run:
    """`exl2ray plan` of a copy of ``model`` that ``change`` has been at."""
    shutil.copytree(model, target, symlinks=True)
    change(target)
    return exl2ray("plan", "-i", target, "-b", "4", "-l", "128", "-ml", "128", "--device", "cpu")


def settings(**entries: Any) -> Change:
    return lambda d: (d / "tokenizer_config.json").write_text(json.dumps(entries)) and None


def content(name: str, text: str | bytes) -> Change:
    return lambda d: (d / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def sparse(name: str, size: int) -> Change:
    def make(d: Path) -> None:
        with (d / name).open("wb") as f:
            f.truncate(size)

    return make


def edited(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """tokenizer.json with ``edit`` applied."""

    def change(d: Path) -> None:
        tokenizer = json.loads((d / "tokenizer.json").read_text())
        edit(tokenizer)
        (d / "tokenizer.json").write_text(json.dumps(tokenizer))

    return change


def normalizer(*steps: dict[str, Any]) -> Change:
    return edited(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": list(steps)}))


def replace(pattern: str, text: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": text}


def entry(token_id: int, text: str, **flags: bool) -> dict[str, Any]:
    return {"id": token_id, "content": text, **SPECIAL, **flags}


def added(*entries: dict[str, Any]) -> Change:
    return edited(lambda t: t["added_tokens"].extend(entries))
