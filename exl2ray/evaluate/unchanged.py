"""Whether models are still those that an evaluation began with: modules are read one after another, from files by name."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from exl2ray.errors import Exl2RayError, SourceError
from exl2ray.formats.file_states import FileState, file_states
from exl2ray.formats.hf import weight_files
from exl2ray.wording import some


@dataclass(frozen=True)
class Unchanged:
    """Sizes and times of the files of models (folders, or single files), as they were when it was made."""

    before: dict[Path, tuple[FileState, ...]]

    @classmethod
    def of(cls, places: Iterable[str | Path]) -> Unchanged:
        return cls({place: _states(place) for place in map(Path, places)})

    def check(self) -> None:
        """Raises SourceError if one of them was written, replaced or removed meanwhile."""
        for place, before in self.before.items():
            names = sorted({s.name for s in set(before) ^ set(_states(place))})
            if names:
                raise SourceError(
                    f"{place}: {some(names)} was changed while it was evaluated, so the figures may be those of two models",
                    "run the same command again when nobody writes there",
                )


def _states(place: Path) -> tuple[FileState, ...]:
    with suppress(Exl2RayError, OSError):  # opening it says more
        if not place.is_dir():
            return file_states([place])
        config = [place / "config.json"] if (place / "config.json").exists() else []
        return file_states([*weight_files(place), *config])
    return ()
