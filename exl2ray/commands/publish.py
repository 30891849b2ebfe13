"""``exl2ray publish``: EXL2 directories to a repository on the Hugging Face Hub, one branch each."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from exl2ray.errors import Interrupted, StoreError, UsageError
from exl2ray.evaluate.record import EVALUATION, Evaluation, read_evaluations
from exl2ray.formats.hub_names import check_repository
from exl2ray.formats.measurement import MAX_MEASUREMENT_BYTES, parse_measurement
from exl2ray.publish.release import PLOT, Release, evaluation_file, figures_of, upload
from exl2ray.publish.selection import Folder, branch_names, read_folder, refuse_secret
from exl2ray.publish.sending import Published, has_index, outcome, ready_repository, send
from exl2ray.remote.hub_library import need_hub_library
from exl2ray.remote.token import Token, read_token
from exl2ray.report.ladder import plot_ladder
from exl2ray.store.apart import is_missing
from exl2ray.store.file_names import MEASUREMENT
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.terminal.console import aside, clean, show_text, text_table
from exl2ray.wording import file_size, plural

if TYPE_CHECKING:
    from exl2ray.publish.hub import Hub


def publish(
    directories: Sequence[str],
    repo: str,
    *,
    branch: str | None = None,
    private: bool = False,
    create: bool = False,
    message: str | None = None,
    token_file: str | None = None,
    base_model: str | None = None,
    work: str | None = None,
    evaluations: Sequence[str] = (),
    extras: bool = True,
    include: Sequence[str] = (),
    dry_run: bool = False,
) -> list[Published]:
    """Checks all directories, then uploads them one after the other; in the order given.

    work: the work directory of their conversion, for its measurement.json and evaluation.json. extras: send these two and the
    plot of sizes against quality along. Raises UsageError, FormatError and StoreError before anything is sent; HubError;
    Interrupted.
    """
    for flag, name in (("--repo", repo), ("--base-model", base_model)):
        if name is not None:
            check_repository(flag, name)
    token = None if token_file is None else read_token(token_file)
    with ExitStack() as closing:
        folders = []
        for directory in directories:
            folders.append(read_folder(directory, include))
            closing.callback(folders[-1].close)
        _check_include(folders, include)
        branches = branch_names(folders, branch)
        store = None if work is None else _work(work)
        if store is not None and not evaluations and store.exists(EVALUATION):
            evaluations = [store.full_name(EVALUATION)]
        release = _release(folders, repo, branches, base_model, store, evaluations, extras)
        hub = None if dry_run else _hub(repo, token)
        if (secret := token if hub is None else hub.token) is not None:
            for folder in folders:
                refuse_secret(folder, secret.value)
        if hub is None:
            if has_index(release):
                beside = "".join(f", {name} ({file_size(len(x))})" for name, x in sorted(release.beside_index().items()))
                aside(f"{repo}, branch main: README.md with the list of branches{beside} would go there")
            return [outcome(u, repo) for u in release.uploads]
        try:
            ready_repository(hub, create, private)
            return send(hub, release, message)
        except KeyboardInterrupt:
            hint = "run the same command again: what has arrived is not sent again"
            raise Interrupted(f"{repo}: stopped while publishing", hint) from None


def _check_include(folders: Sequence[Folder], include: Sequence[str]) -> None:
    there = {name for f in folders for name in (*f.files, *(x.name for x in f.left_out))}
    for pattern in include:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in there):
            raise UsageError(f"--include {pattern}: there is no such file", "it is compared with names, without folders")


def _work(folder: str) -> Store:
    store = open_store(folder)
    if not (store.exists(MEASUREMENT) or store.exists(EVALUATION)):
        why = "does not exist" if is_missing(store.root) else f"has neither {MEASUREMENT} nor {EVALUATION}"
        raise StoreError(f"--work {folder}: {why}", "give the conversion's own -o")
    return store


def _hub(repo: str, token: Token | None) -> Hub:
    need_hub_library("publishing")
    from exl2ray.publish.hub import Hub, stored_token

    return Hub(repo, token or stored_token())


# ---- what goes where --------------------------------------------------------------------------------------------------


def _release(
    folders: Sequence[Folder], repo: str, branches: Sequence[str], base_model: str | None, store: Store | None,
    evaluations: Sequence[str], extras: bool,
) -> Release:  # fmt: skip
    found = figures_of(folders, evaluations, [e for path in evaluations for e in read_evaluations(path)])
    shared = _shared_files(store, found.results if found.of else [], repo) if extras else {}
    uploads = []
    for folder, branch in zip(folders, branches, strict=True):
        evaluation, own = found.of.get(folder.path), dict[str, bytes]()
        if len(folders) == 1:
            own |= shared
        elif evaluation is not None:
            own |= {name: content for name, content in shared.items() if name != MEASUREMENT}  # that is on main
        if extras and evaluation is not None:
            own[EVALUATION] = evaluation_file([evaluation], {evaluation.model: branch}, base_model)
        uploads.append(upload(folder, repo, branch, base_model, found, own))
    return Release(repo, base_model, uploads, shared, found.results)


def _shared_files(store: Store | None, results: Sequence[Evaluation], repo: str) -> Mapping[str, bytes]:
    """measurement.json of a work directory, so that others need not measure; the plot, where several models are evaluated."""
    out = {}
    if store is not None and store.exists(MEASUREMENT) and store.size(MEASUREMENT) <= MAX_MEASUREMENT_BYTES:
        out[MEASUREMENT] = parse_measurement(store.get(MEASUREMENT), store.full_name(MEASUREMENT)).to_bytes()
    drawn = [(PurePath(e.model).name, e) for e in results if e.file_bytes]
    if len(drawn) > 1:
        with tempfile.TemporaryDirectory(prefix="exl2ray-") as folder:
            plot_ladder(drawn, Path(folder) / PLOT, repo.partition("/")[2])
            out[PLOT] = (Path(folder) / PLOT).read_bytes()
    return out


# ---- shown ------------------------------------------------------------------------------------------------------------


def show(published: Sequence[Published]) -> None:
    for p in published:
        if not p.url:
            show_text(f"{p.directory}: {file_size(p.nbytes)} would go to {p.repo}, branch {p.branch}:")
            _table(p, p.files)
        if p.left_out:
            show_text(f"{p.directory}: {plural(len(p.left_out), 'name')} left out:")
            _table(p, p.left_out)
        if p.url:
            show_text(f"{p.directory}: {p.url}" + ("" if p.changed else " (nothing to change)"))


def _table(p: Published, names: Sequence[str]) -> None:
    rows = [[n, file_size(p.sizes[n]) if n in p.sizes else "-", p.reasons.get(n, "")] for n in names]
    for line in text_table(["", "", ""], rows)[1:]:
        print(clean(f"  {line.rstrip()}"))
