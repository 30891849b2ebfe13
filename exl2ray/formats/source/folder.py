"""The files of one folder: listing them, and reading small ones. Nothing here raises; what cannot be read is not there."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from exl2ray.errors import Exl2RayError
from exl2ray.formats.elsewhere import mount_at, open_binary, remote_file
from exl2ray.formats.hub_names import is_repository
from exl2ray.formats.json_file import LFS_POINTER, read_json_object

CARD_BYTES = 1 << 16


class Folder:
    """A look at a folder. ``files``, ``folders``: names at its top level, sorted, without dot files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @cached_property
    def files(self) -> list[str]:
        return self._entries(folders=False)

    @cached_property
    def folders(self) -> list[str]:
        return self._entries(folders=True)

    def _entries(self, folders: bool) -> list[str]:
        mount = mount_at(self.path)
        away = () if mount is None else mount.folders if folders else (*mount.files, *mount.others)
        try:
            here = {p.name for p in self.path.iterdir() if os.path.isdir(p) == folders}
            return sorted(n for n in here.union(away) if not n.startswith("."))
        except OSError:
            return []

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def ending(self, *suffixes: str) -> list[str]:
        """Files whose names end in one of ``suffixes``, in any case."""
        return [n for n in self.files if n.lower().endswith(suffixes)]

    def head(self, name: str, size: int) -> bytes:
        """The first ``size`` bytes of a regular file; fewer where it is shorter, none where it cannot be read."""
        path = self.path / name
        try:
            if not os.path.isfile(path) and remote_file(path) is None:
                return b""
            with open_binary(path) as f:
                return f.read(size)
        except OSError:
            return b""

    def is_lfs_pointer(self, name: str) -> bool:
        return self.head(name, len(LFS_POINTER)) == LFS_POINTER

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty for anything else."""
        if name not in self:
            return {}
        try:
            return read_json_object(self.path / name, odd=True)
        except Exl2RayError:
            return {}

    def base_model(self) -> str | None:
        """The model that this one was made from, as an adapter's config, the card or config.json name it."""
        named = [self.json("adapter_config.json").get("base_model_name_or_path")]
        card = self.head("README.md", CARD_BYTES).decode("utf-8", "replace")
        found = re.search(r"^base_model:[ \t]*(?:\r?\n[ \t]*-[ \t]*)?[\"']?([^\s\"']+)", card, re.MULTILINE)
        named += [found and found[1], self.json("config.json").get("_name_or_path")]
        return next((n for n in named if isinstance(n, str) and is_repository(n)), None)
