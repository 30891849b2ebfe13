"""Which files of an EXL2 directory are published, and which are refused.

Only what is known as part of a model goes to the Hub: whatever else lies in the directory (work files, weights in other
formats, keys) is refused with a list, and files whose names begin with a dot stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from exl2ray.config import bpw_name
from exl2ray.console import plural
from exl2ray.errors import FormatError, UsageError
from exl2ray.formats.claim import CLAIM
from exl2ray.formats.shards import OUTPUT_NAME
from exl2ray.formats.summary import DirectorySummary, inspect_directory
from exl2ray.formats.verify import verify_directory

PART = re.compile(
    r"(?!(?:job|status|adapter_config)\.json$)"  # of a work directory; of a LoRA
    r"(?:[\w.+() -]+\.(?:json|txt|model|jinja|tiktoken|vocab|spm|md|py|png|jpe?g|gif|webp|svg|pdf)"
    r"|(?:LICEN[CS]E|NOTICE|COPYING|USE_POLICY|USAGE_POLICY|ACCEPTABLE_USE_POLICY)[\w.-]*)",
    re.ASCII | re.IGNORECASE,
)
SHOWN = 10  # problems and names in a message
MAX_TEXT_BYTES = 64 << 20  # files above this are not searched for the token


@dataclass(frozen=True)
class Folder:
    """A sound EXL2 directory. files: name -> path, sorted. left_out: names that begin with a dot, but for exl2ray's own."""

    path: Path
    summary: DirectorySummary
    bits: float  # requested
    files: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(p.stat().st_size for p in self.files.values())


def read_folder(path: str | Path, include: Sequence[str] = ()) -> Folder:
    """Verifies a directory and lists its files; ``include``: patterns of names that may be published, too.

    Raises FormatError if the directory breaks a rule of the format, UsageError for files that are not of a model.
    """
    path = Path(path)
    problems = verify_directory(path)
    if problems:
        shown = "\n".join(f"  {p}" for p in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise FormatError(
            f"{path}: not published: {plural(len(problems), 'rule')} of the format broken:\n{shown}{more}",
            f"all of them: exl2ray verify {path}",
        )
    names = sorted(p.name for p in path.iterdir())
    hidden = tuple(n for n in names if n.startswith(".") and n != CLAIM)
    files = {n: path / n for n in names if not n.startswith(".")}
    foreign = [n for n, p in files.items() if not (p.is_file() and _allowed(n, include))]
    if foreign:
        shown = ", ".join(f"{n}/" if files[n].is_dir() else n for n in foreign[:SHOWN])
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise UsageError(
            f"{path}: holds what is not known as part of a model: {shown}{more}",
            "move it away; a file that belongs there is published with --include NAME",
        )
    summary = inspect_directory(path)
    bits = summary.settings.get("bits")
    return Folder(path, summary, float(bits) if isinstance(bits, (int, float)) else summary.decoder_bpw, files, hidden)


def _allowed(name: str, include: Sequence[str]) -> bool:
    return bool(OUTPUT_NAME.fullmatch(name) or PART.fullmatch(name)) or any(fnmatchcase(name, i) for i in include)


def refuse_secret(folder: Folder, secret: str) -> None:
    """UsageError if a file holds the access token: publishing it would give it away."""
    for path in folder.files.values():
        if path.suffix == ".safetensors" or path.stat().st_size > MAX_TEXT_BYTES:
            continue
        if secret.encode() in path.read_bytes():
            raise UsageError(f"{path}: holds the access token itself", "remove it there; better revoke that token, too")


# ---- branches -------------------------------------------------------------------------------------------------------

# Names that git takes, without those that need care in URLs and shells.
BRANCH = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)|\./))[A-Za-z0-9_][\w./+-]{0,99}(?<![./])", re.ASCII)


def branch_names(folders: Sequence[Folder], branch: str | None) -> list[str]:
    """The branch of each folder: ``branch`` with {bpw} filled in; absent, main for one folder, {bpw}bpw for several.

    Raises UsageError for a name that git refuses, and for two folders on one branch.
    """
    pattern = branch if branch is not None else "main" if len(folders) == 1 else "{bpw}bpw"
    names = [pattern.replace("{bpw}", bpw_name(f.bits)) for f in folders]
    for name in names:
        if not BRANCH.fullmatch(name):
            raise UsageError(f"--branch {name}: not a name for a branch", "letters, digits, '.', '-' and '_' will do: 4.0bpw")
    for i, name in enumerate(names):
        if name in names[:i]:
            first = folders[names.index(name)].path
            raise UsageError(
                f"--branch {name}: {first} and {folders[i].path} would go to the same branch",
                "put {bpw} into --branch, or publish them one by one",
            )
    return names
