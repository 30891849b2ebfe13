"""Whether an evaluation is of a model as it is now. A patch, or another conversion into the same folder, leaves another model
under the same name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from exl2ray.errors import Exl2RayError
from exl2ray.evaluate.record import Evaluation
from exl2ray.formats.exl2 import Exl2Model

CURRENT, EARLIER, UNKNOWN = "current", "earlier", "unknown"


def standing(e: Evaluation, directories: Iterable[str | Path], file_bytes: int = 0) -> str:
    """``CURRENT`` if the model's tensors are those that ``e`` was made of, ``EARLIER`` if they are not.

    directories: where the model may lie, the first that holds one counts. file_bytes: of the model as it was last written,
    0 if not known, for one that lies elsewhere. ``UNKNOWN`` where only sizes could be compared, and are the same: results
    of earlier versions do not say what they were made of.
    """
    found = next((s for d in directories if (s := _state(Path(d))) is not None), None)
    if found is not None and e.weights:
        return CURRENT if found[0] == e.weights else EARLIER
    now = file_bytes if found is None else found[1]
    return EARLIER if e.file_bytes and now and e.file_bytes != now else UNKNOWN


def _state(directory: Path) -> tuple[str, int] | None:
    """(hash of the tensors, bytes of the files) of the model there; None if there is none that can be read."""
    try:
        model = Exl2Model(directory)
        return model.weights_fingerprint(), sum(f.file_bytes for f in model.files.values())
    except (Exl2RayError, OSError):
        return None
