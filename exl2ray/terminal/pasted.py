"""Command lines that people paste: what a page, an editor or another shell made of them, named in the hints of errors."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise, takewhile

from exl2ray.errors import SourceError, UsageError, not_permitted, unreadable
from exl2ray.formats.hub_names import is_repository
from exl2ray.formats.regular import absent
from exl2ray.remote.address import redacted

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # hyphens and dashes of print, and the minus sign
_NUMBERS = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?)*(bpw)?,?")  # as bitrates are written elsewhere
FOLDER = "give the folder that holds config.json and *.safetensors"


def usage_hint(argv: Sequence[str], command: str) -> str:
    """The hint for a command line that cannot be understood. ``command``: what was understood, e.g. "exl2ray convert"."""
    changed = next((a for a in argv if a[:1] in tuple(DASHES)), None)
    if changed is not None:
        return f"{changed!r} begins with a dash of print, not with the '-' of the keyboard: type it anew"
    if argv and (argv[0].endswith("convert.py") or (argv[0].startswith("-") and command == "exl2ray")):
        rest = argv[1:] if argv[0].endswith("convert.py") else argv
        return f"the command comes first: {shlex.join(['exl2ray', 'convert', *rest[:6]])}{' ...' if len(rest) > 6 else ''}"
    if command == "exl2ray submit" and "--" not in argv and not {"convert", "measure"}.isdisjoint(argv):
        return "what is to run stands behind --: exl2ray submit --address URL -- convert ..."
    return _bitrates_hint(argv) or _shard_hint(argv) or _gpus_hint(argv) or _model_hint(argv) or f"see {command} --help"


def _bitrates_hint(argv: Sequence[str]) -> str:
    """The hint for bitrates that are given as a list, or with their unit; empty if none are."""
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in ("-b", "--bits"):
            values = list(takewhile(_NUMBERS.fullmatch, re.split(r"[\s;]+", " ".join([value] if value else argv[i + 1 :]))))
            found = re.findall(r"[\d.]+", " ".join(values))
            if all(map(_NUMBERS.fullmatch, values)) and found and [*found] != values[:1]:
                return "a number with each -b: " + " ".join(f"-b {number}" for number in found)
    return ""


def _shard_hint(argv: Sequence[str]) -> str:
    """The hint for a size of shards with its unit; empty if there is none."""
    found = re.search(r"(?<!\S)(?:-ss|--shard[-_]size)[ =](\d+(?:\.\d+)?) ?([MG])i?B?(?!\S)", " ".join(argv), re.IGNORECASE)
    mebibytes = float(found[1]) * (1024 if found[2] in "gG" else 1) if found else 0
    return f"-ss is a number of MiB: -ss {mebibytes:g}" if mebibytes and math.isfinite(mebibytes) else ""


def _gpus_hint(argv: Sequence[str]) -> str:
    """The hint for GPUs that are chosen by their numbers, which no flag does; empty if none are."""
    line = " ".join(argv).replace("=", " ")
    found = re.search(r"(?<!\S)(?:--device cuda:|--gpus (?=\d+,)|--gpu )(\d+(?:,\d+)*)(?!\S)", line)
    return f"the environment chooses GPUs by number: CUDA_VISIBLE_DEVICES={found[1]} exl2ray ..." if found else ""


def _model_hint(argv: Sequence[str]) -> str:
    """The hint for a model that is given without its flag; empty if none is."""
    if not argv or argv[0] not in ("convert", "measure", "plan", "calibration", "solve"):
        return ""
    words = [w for before, w in pairwise(argv) if not before.startswith("-") or before.startswith("--json")]
    model = next((w for w in words if "://" in w or os.path.isdir(w)), "")
    return f"a model is given with its flag: -i {shlex.quote(model)}" if model and "-i" not in argv else ""


def missing_folder(path: str) -> UsageError:
    """The error for a source folder that does not exist, as far as this user may see."""
    denied = not_permitted(path)
    if denied is not None:
        return unreadable(UsageError, f"-i {path}", denied)
    return UsageError(f"-i {path}: {absent(path)}", missing_folder_hint(path))


def check_models(*given: str) -> None:
    """Raises SourceError for folders of models that do not exist, with what the shell or a name of the Hub made of them."""
    for path in given:
        try:
            os.stat(path)
        except FileNotFoundError as e:
            if "://" not in path:
                raise SourceError(f"{path}: {absent(path)}", missing_folder_hint(path)) from e
        except (OSError, ValueError):  # whoever opens it says it better
            pass


def refuse_read_address(flag: str, path: str) -> None:
    """Raises UsageError for an address in the place of what is read from this machine: as a path it loses a slash, and is
    said to be missing."""
    if "://" in path and not os.path.lexists(path):
        hint = _without_scheme(path) or "fetch it first, from the Hub with: hf download OWNER/NAME [FILE] --local-dir FOLDER"
        raise UsageError(f"{flag} {redacted(path)}: is an address, where a path is needed".lstrip(), hint)


def _without_scheme(path: str) -> str:
    """The hint for an address of a file of this machine; empty for others."""
    scheme, _, rest = path.partition("://")
    return f"give the path alone: {shlex.quote(rest)}" if scheme.lower() == "file" and rest.startswith("/") else ""


def missing_folder_hint(path: str) -> str:
    """The hint for a source folder that does not exist."""
    if hint := _without_scheme(path):
        return hint
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded != path and os.path.isdir(expanded):
        return f"the shell leaves ~ and variables as they are within quotes and after '=': give {shlex.quote(expanded)}"
    if is_repository(path) and not os.path.isdir(os.path.dirname(path)):
        return f"{FOLDER}; a repository on the Hub is hf://{path}"
    return FOLDER
