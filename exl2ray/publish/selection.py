"""Which files of an EXL2 directory are published, and which stay where they are.

Only what is known as part of a model goes to the Hub (``file_kinds.py``), and of that only regular files whose content
holds no secret (``opened.py``, ``secrets.py``). Whatever else lies in the directory is named as left out. A file without
which the model would be another one is never left out: then nothing is published.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from exl2ray.errors import FormatError, UsageError
from exl2ray.evaluate.soundness import problems_of
from exl2ray.formats.claim import CLAIM
from exl2ray.formats.hub_names import check_branch
from exl2ray.formats.side_files import TEMPLATES
from exl2ray.formats.source.kinds import look_at_output
from exl2ray.formats.summary import DirectorySummary, inspect_directory
from exl2ray.publish.file_kinds import CARD, is_known, is_needed, looks_secret
from exl2ray.publish.opened import NotSent, Opened, open_file
from exl2ray.publish.secrets import find_secret
from exl2ray.recipe import bpw_name
from exl2ray.wording import plural, some_lines

SHOWN = 10  # problems in a message
OWN = CLAIM.removesuffix(".json")  # our own dot files begin like this, and are not worth a word
UNKNOWN = "not known as part of a model; --include NAME sends it"
SECRET_NAME = "a name as of a secret"


@dataclass(frozen=True)
class LeftOut:
    """A file that stays. nbytes: None for what is not a regular file. why: in words."""

    name: str
    nbytes: int | None
    why: str


@dataclass(frozen=True)
class Folder:
    """A sound EXL2 directory. files: name -> what is sent, sorted. left_out: the rest, but for exl2ray's own dot files."""

    path: Path
    summary: DirectorySummary
    bits: float  # requested
    files: dict[str, Opened]
    left_out: tuple[LeftOut, ...]
    _closing: ExitStack = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files.values())

    @property
    def card(self) -> str | None:
        """The text of README.md, if there is one."""
        found = self.files.get(CARD)
        return None if found is None or found.content is None else found.content.decode("utf-8", errors="replace")

    def check_unchanged(self) -> None:
        """UsageError if a file is not what was verified any more."""
        for f in self.files.values():
            f.check_unchanged()

    def close(self) -> None:
        self._closing.close()


def read_folder(path: str | Path, include: Sequence[str] = ()) -> Folder:
    """Opens the files of a directory that are to be sent, and verifies it; ``include``: patterns of further names.

    Raises FormatError if the directory breaks a rule of the format, UsageError for a file that the model needs and that
    cannot be sent, and for one that holds a secret. The folder has to be closed.
    """
    path = Path(path)
    finding = look_at_output(path)
    if finding is not None:
        raise FormatError(f"{path}: {finding[0]}", finding[1])
    with ExitStack() as closing:
        files, left_out = _chosen(path, include, closing)
        _verify(path)
        summary = inspect_directory(path)
        bits = summary.settings.get("bits")
        requested = float(bits) if isinstance(bits, (int, float)) else summary.decoder_bpw
        folder = Folder(path, summary, requested, files, left_out, closing.pop_all())
    try:
        folder.check_unchanged()
        for name in summary.files:  # loaders read them all
            if name not in files:
                raise UsageError(f"{path / name}: appeared while it was being published", "try again")
    except UsageError:
        folder.close()
        raise
    return folder


def _verify(path: Path) -> None:
    problems = problems_of(path)
    if problems:
        raise FormatError(
            f"{path}: not published: {plural(len(problems), 'rule')} of the format broken:",
            f"all of them: exl2ray verify {path}",
            [f"  {line}" for line in some_lines(list(map(str, problems)), SHOWN)],
        )


def _chosen(path: Path, include: Sequence[str], closing: ExitStack) -> tuple[dict[str, Opened], tuple[LeftOut, ...]]:
    """Goes through a directory; opened files are closed by ``closing``."""
    try:
        names = _names(path)
    except OSError as e:
        raise FormatError(f"{path}: cannot be listed: {e.strerror or e}", "give an EXL2 directory") from e
    files: dict[str, Opened] = {}
    left_out: list[LeftOut] = []
    for name in sorted(names, key=lambda n: (n != CARD, n)):  # the card first: it names its pictures
        card = files[CARD].content or b"" if CARD in files else b""
        asked = name in include or any(fnmatchcase(name, i) for i in include)
        why = _why_not(path, name, card.decode("utf-8", errors="replace"), asked)
        if not why:
            try:
                files[name] = opened = open_file(path, name)
                closing.callback(opened.close)
                continue
            except NotSent as e:
                why = str(e)
        if is_needed(name) and not name.startswith("."):
            raise UsageError(f"{path / name}: {why}; without it the model would be another one", _remedy(name, why))
        if name in include:
            raise UsageError(f"--include {name}: {why}", "it stays here: leave out --include, or give the file another name")
        if not name.startswith(OWN):
            left_out.append(LeftOut(name, _size(path / name), why))
    _refuse_secrets(files)
    return dict(sorted(files.items())), tuple(sorted(left_out, key=lambda x: x.name))


def _names(path: Path) -> list[str]:
    """What lies in a directory; of the folder of chat templates, unless it is a link, what lies in that. Raises OSError."""
    names = os.listdir(path)
    if TEMPLATES in names and (path / TEMPLATES).is_dir() and not (path / TEMPLATES).is_symlink():
        names.remove(TEMPLATES)
        names += [f"{TEMPLATES}/{n}" for n in os.listdir(path / TEMPLATES)]
    return names


def _why_not(directory: Path, name: str, card: str, asked: bool) -> str:
    """Why a file is left out, as far as its name and kind tell; "" if it may be sent."""
    if name.startswith("."):
        return "hidden"
    if looks_secret(name):
        return SECRET_NAME
    if not name.isprintable():
        return "a name that cannot be shown"
    if os.path.isdir(directory / name):  # no error where this user may not look
        return "a folder"
    return "" if asked or is_known(name, card) else UNKNOWN


def _remedy(name: str, why: str) -> str:
    if why == UNKNOWN:
        return f"rename it to output.safetensors or output-0000N-of-0000M.safetensors, or give --include {name}"
    if why.startswith("a link to"):
        return "if it belongs to the model, put a copy in place of the link"
    return "put the file itself there, or remove it"


def _size(path: Path) -> int | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _refuse_secrets(files: dict[str, Opened]) -> None:
    for f in files.values():
        found = find_secret(f.content) if f.content is not None else None
        if found is not None:
            raise UsageError(
                f"{f.path}, line {found.line}: holds what looks like {found.what}",
                "remove it there, and make it invalid where it came from if it was yours",
            )


def refuse_secret(folder: Folder, secret: str) -> None:
    """UsageError if a file holds the access token: publishing it would give it away."""
    for f in folder.files.values():
        if f.content is not None and secret.encode() in f.content:
            raise UsageError(f"{f.path}: holds the access token itself", "remove it there; better revoke that token, too")


# ---- branches -------------------------------------------------------------------------------------------------------

def branch_names(folders: Sequence[Folder], branch: str | None) -> list[str]:
    """The branch of each folder: ``branch`` with {bpw} and {head}, the bits of the head, filled in.

    Absent: main for one folder; 4.0bpw for several, or 4.0bpw-h6 where two have the same bitrate.

    Raises UsageError for a name that no branch has, and for two folders on one branch.
    """
    heads = [str(f.summary.settings.get("head_bits", 16)) for f in folders]
    patterns = [branch or ""] * len(folders)
    if branch is None:
        rates = [f.bits for f in folders]
        patterns = ["main" if len(folders) == 1 else "{bpw}bpw-h{head}" if rates.count(b) > 1 else "{bpw}bpw" for b in rates]
    names = [
        p.replace("{bpw}", bpw_name(f.bits)).replace("{head}", head)
        for p, f, head in zip(patterns, folders, heads, strict=True)
    ]
    for name in names:
        check_branch("--branch", name)
    for i, name in enumerate(names):
        if name in names[:i]:
            first = folders[names.index(name)].path
            raise UsageError(
                f"--branch {name}: {first} and {folders[i].path} would go to the same branch",
                "put {bpw} or {head} into --branch, or publish them one by one",
            )
    return names
