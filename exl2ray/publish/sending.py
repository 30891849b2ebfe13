"""A release on its way to a repository: one commit for each branch, and the card on main that lists them."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray import __version__
from exl2ray.errors import HubError, UsageError
from exl2ray.formats.hub_names import is_repository
from exl2ray.formats.shards import OUTPUT_NAME
from exl2ray.publish.base_model import original_card
from exl2ray.publish.card import PROGRAM, BranchRow, index_card, with_branches
from exl2ray.publish.file_kinds import CARD
from exl2ray.publish.frontmatter import read_fields, split_card
from exl2ray.publish.release import PLOT, Release, Upload
from exl2ray.publish.selection import Folder
from exl2ray.recipe import bpw_name
from exl2ray.terminal.console import aside
from exl2ray.wording import file_size, plural, some

if TYPE_CHECKING:
    from exl2ray.publish.hub import Branch, Commit, Hub

MAIN = "main"
WEIGHTS = re.compile(r".*\.(safetensors|gguf)|pytorch_model.*\.bin|consolidated\..*", re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """files, left_out: names. nbytes: of all files. sizes: bytes of each name, of files and of what is left out, where it has
    a size; reasons: why a name is left out. url, commit: empty for a dry run. changed: False if the branch held it already.
    """

    directory: str
    repo: str
    branch: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    nbytes: int
    url: str = ""
    commit: str = ""
    changed: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def outcome(upload: Upload, repo: str, commit: Commit | None = None) -> Published:
    """commit: None for a dry run."""
    folder = upload.folder
    sizes = {name: f.nbytes for name, f in folder.files.items()} | {n: len(c) for n, c in upload.extras.items()}
    sizes |= {CARD: len(upload.card.encode("utf-8"))}
    total = sum(sizes.values())
    sizes |= {x.name: x.nbytes for x in folder.left_out if x.nbytes is not None}
    left_out, reasons = tuple(x.name for x in folder.left_out), {x.name: x.why for x in folder.left_out}
    made = ("", "", False) if commit is None else (commit.url, commit.oid, commit.changed)
    names = tuple(upload.names)
    return Published(str(folder.path), repo, upload.branch, names, left_out, total, *made, sizes, reasons)


def send(hub: Hub, release: Release, message: str | None) -> list[Published]:
    """Uploads the directories one after the other. message: of the commits; {bpw} in it stands for the bits."""
    done = [_send(hub, u, message) for u in release.uploads]
    if has_index(release):
        _update_index(hub, release)
    return done


def has_index(release: Release) -> bool:
    """Whether the card on main lists branches."""
    return any(u.branch != MAIN for u in release.uploads)


def ready_repository(hub: Hub, create: bool, private: bool) -> None:
    """The repository exists afterwards, and is private if that is asked for."""
    found = hub.is_private()
    if found is None and not create:
        raise HubError(
            f"{hub.repo}: there is no such repository, or the token ({hub.token.source}) may not see it",
            "--create makes it, with --private as a private one",
        )
    if found is None:
        hub.create(private)
        aside(f"created {hub.repo}" + (" (private)" if private else ""))
    elif private and not found:
        raise UsageError(f"--private: {hub.repo} exists and is public", "change its settings on the Hub, or drop --private")


def _send(hub: Hub, upload: Upload, message: str | None) -> Published:
    folder = upload.folder
    branch = hub.branch(upload.branch) or _new_branch(hub, upload)
    stale = _stale(hub, branch, folder)
    size = f"{plural(len(upload.names), 'file')}, {file_size(folder.nbytes)}"
    aside(f"{folder.path} -> {hub.repo}, branch {upload.branch}: {size}")
    text = message or f"EXL2 at {bpw_name(folder.bits)} bits per weight ({PROGRAM} {__version__})"
    text = text.replace("{bpw}", bpw_name(folder.bits))
    with tempfile.TemporaryDirectory(prefix="exl2ray-") as names:  # so that progress is shown under the names of files
        files = {name: f.source(Path(names) / name) for name, f in folder.files.items()}
        files |= {**upload.extras, CARD: upload.card.encode("utf-8")}
        return outcome(upload, hub.repo, hub.commit(branch, files, stale, text, folder.check_unchanged))


def _new_branch(hub: Hub, upload: Upload) -> Branch:
    """It begins with the files of main, so those are looked at first."""
    main = hub.branch(MAIN)
    if main is not None:
        _stale(hub, main, upload.folder)
    hub.create_branch(upload.branch)
    branch = hub.branch(upload.branch)
    if branch is None:
        raise HubError(f"{hub.repo}: branch {upload.branch} was created and is not there", "try again in a minute")
    return branch


def _stale(hub: Hub, branch: Branch, folder: Folder) -> list[str]:
    """Shards of an earlier upload that this one does not replace; a loader would read them as part of the model."""
    others = [name for name in branch.files if name not in folder.files and "/" not in name and WEIGHTS.fullmatch(name)]
    foreign = [name for name in others if not OUTPUT_NAME.fullmatch(name)]
    if foreign:
        raise UsageError(
            f"{hub.repo}, branch {branch.name}: holds weights of another model: {some(foreign, 1)}",
            "publish to a repository or branch of its own",
        )
    return others


# ---- main -------------------------------------------------------------------------------------------------------------


def _update_index(hub: Hub, release: Release) -> None:
    """The card on main lists the branches, unless somebody wrote another one there; what is of all of them lies beside it."""
    main = hub.branch(MAIN)
    if main is None:
        aside(f"{hub.repo}: there is no branch main, so no list of branches")
        return
    before = hub.read_text(main, CARD)
    text = _index(release, before)
    if text is None:
        aside(f"{hub.repo}: main has a card of its own, which stays as it is")
        return
    files: dict[str, Path | bytes] = {**release.beside_index(), CARD: text.encode("utf-8")}
    if text != before or release.shared:
        if hub.commit(main, files, [], "List of branches").changed:
            aside(f"{hub.repo}: the card on main lists the branches")


def _index(release: Release, before: str | None) -> str | None:
    """The card on main. before: the one that is there; None for one that has no list of branches."""
    rows = []
    for u in release.uploads:
        if u.branch != MAIN:
            s = u.folder.summary
            rows.append(BranchRow(u.branch, s.decoder_bpw, s.head_bpw, s.total_bytes, u.evaluation))
    if before is not None:
        return with_branches(before, release.repo, rows)
    card = release.uploads[0].card
    base = read_fields(split_card(card)[0]).get("base_model")
    named = release.base_model or (base if isinstance(base, str) and is_repository(base) else None)
    owner, plot = release.repo.partition("/")[0], PLOT if PLOT in release.shared else ""
    return index_card(release.repo, rows, named, owner, original_card(card), plot)
