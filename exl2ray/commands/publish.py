"""``exl2ray publish``: EXL2 directories to a repository on the Hugging Face Hub, one branch each."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from exl2ray import __version__
from exl2ray.errors import HubError, Interrupted, StoreError, UsageError
from exl2ray.evaluate.record import EVALUATION, Evaluation, read_evaluations
from exl2ray.evaluate.standing import EARLIER, standing
from exl2ray.formats.measurement import MAX_MEASUREMENT_BYTES, parse_measurement
from exl2ray.formats.shards import OUTPUT_NAME
from exl2ray.publish.base_model import MAX_CARD_BYTES, REPOSITORY, original_card
from exl2ray.publish.card import (
    PROGRAM,
    BranchRow,
    index_card,
    model_card,
    of_directory,
    with_branches,
    with_evaluation,
    with_loading,
    without_evaluation,
)
from exl2ray.publish.file_kinds import CARD
from exl2ray.publish.frontmatter import Value, read_fields, split_card, with_fields
from exl2ray.publish.selection import Folder, branch_names, read_folder, refuse_secret
from exl2ray.recipe import bpw_name
from exl2ray.remote.hub_library import need_hub_library
from exl2ray.remote.token import read_token
from exl2ray.report.ladder import plot_ladder
from exl2ray.store.file_names import MEASUREMENT
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.terminal.console import clean, text_table
from exl2ray.wording import file_size, plural, some

if TYPE_CHECKING:
    from exl2ray.publish.upload import Branch, Hub

MAIN, PLOT = "main", "ladder.png"
WEIGHTS = re.compile(r".*\.(safetensors|gguf)|pytorch_model.*\.bin|consolidated\..*", re.IGNORECASE)


@dataclass(frozen=True)
class Upload:
    """One directory on its way to one branch. card: README.md as it is published. extras: files besides those of the folder,
    by name.
    """

    folder: Folder
    branch: str
    card: str
    evaluation: Evaluation | None
    extras: dict[str, bytes]

    @property
    def names(self) -> list[str]:
        return sorted({*self.folder.files, *self.extras, CARD})


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


def publish(
    directories: Sequence[str],
    repo: str,
    branch: str | None,
    private: bool,
    create: bool,
    message: str | None,
    token_file: str | None,
    base_model: str | None,
    evaluations: Sequence[str],
    include: Sequence[str],
    dry_run: bool,
    work: str | None = None,
    extras: bool = True,
) -> list[Published]:
    """Checks all directories, then uploads them one after the other; in the order given.

    work: the work directory of their conversion, for its measurement.json and evaluation.json. extras: send these two and the
    plot of sizes against quality along. Raises UsageError, FormatError and StoreError before anything is sent; HubError;
    Interrupted.
    """
    for flag, name in (("--repo", repo), ("--base-model", base_model)):
        if name is not None and not REPOSITORY.fullmatch(name):
            raise UsageError(f"{flag} {name}: not the name of a repository", "it is OWNER/NAME, as in the Hub's addresses")
    with ExitStack() as closing:
        folders = []
        for directory in directories:
            folders.append(read_folder(directory, include))
            closing.callback(folders[-1].close)
        _check_include(folders, include)
        branches = branch_names(folders, branch)
        store = open_store(work) if work is not None else None
        if store is not None and not (store.exists(MEASUREMENT) or store.exists(EVALUATION)):
            raise StoreError(f"--work {work}: has neither {MEASUREMENT} nor {EVALUATION}", "give the conversion's own -o")
        if store is not None and not evaluations and store.exists(EVALUATION):
            evaluations = [store.full_name(EVALUATION)]
        results = [e for path in evaluations for e in read_evaluations(path)]
        figures = match_evaluations(folders, evaluations, results)
        outdated = _outdated(folders, figures)
        results = [e for e in results if e not in outdated.values()]
        figures = [None if f.path in outdated else e for f, e in zip(folders, figures, strict=True)]
        shared = shared_files(store, results if any(figures) else [], repo) if extras else {}
        uploads = []
        for f, b, e in zip(folders, branches, figures, strict=True):
            own = dict(shared) if len(folders) == 1 or e is not None else {}
            if len(folders) > 1:
                own.pop(MEASUREMENT, None)  # it is of all of them: on main
            if extras and e is not None:
                own[EVALUATION] = published_results([e], {e.model: b}, base_model)
            card = card_text(f, repo, b, base_model, e, PLOT if PLOT in own else "")
            card = without_evaluation(card) if f.path in outdated else card
            uploads.append(Upload(f, b, card, e, {n: c for n, c in own.items() if n not in f.files}))
        if dry_run:
            return [_result(u, repo) for u in uploads]
        return _send(uploads, repo, private, create, message, token_file, base_model, shared, results)


def _check_include(folders: Sequence[Folder], include: Sequence[str]) -> None:
    there = {name for f in folders for name in (*f.files, *(x.name for x in f.left_out))}
    for pattern in include:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in there):
            raise UsageError(f"--include {pattern}: there is no such file", "it is compared with names, without folders")


def _send(
    uploads: Sequence[Upload], repo: str, private: bool, create: bool, message: str | None, token_file: str | None,
    base_model: str | None, shared: Mapping[str, bytes], results: Sequence[Evaluation],
) -> list[Published]:  # fmt: skip
    need_hub_library("publishing")
    from exl2ray.publish.upload import Hub, stored_token

    token = read_token(token_file) if token_file is not None else stored_token()
    for u in uploads:
        refuse_secret(u.folder, token.value)
    hub = Hub(repo, token)
    try:
        ready_repository(hub, create, private)
        done = [_upload(hub, u, message) for u in uploads]
        if any(u.branch != MAIN for u in uploads):
            _update_index(hub, uploads, base_model, shared, results)
    except KeyboardInterrupt:
        hint = "run the same command again: what has arrived is not sent again"
        raise Interrupted(f"{repo}: stopped while publishing", hint) from None
    return done


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
        _say(f"created {hub.repo}" + (" (private)" if private else ""))
    elif private and not found:
        raise UsageError(f"--private: {hub.repo} exists and is public", "change its settings on the Hub, or drop --private")


def _upload(hub: Hub, upload: Upload, message: str | None) -> Published:
    folder = upload.folder
    branch = hub.branch(upload.branch) or _new_branch(hub, upload)
    stale = _stale(hub, branch, folder)
    size = f"{plural(len(upload.names), 'file')}, {file_size(folder.nbytes)}"
    _say(f"{folder.path} -> {hub.repo}, branch {upload.branch}: {size}")
    text = message or f"EXL2 at {bpw_name(folder.bits)} bits per weight ({PROGRAM} {__version__})"
    text = text.replace("{bpw}", bpw_name(folder.bits))
    with tempfile.TemporaryDirectory(prefix="exl2ray-") as names:  # so that progress is shown under the names of files
        files = {name: f.source(Path(names) / name) for name, f in folder.files.items()}
        files |= {**upload.extras, CARD: upload.card.encode("utf-8")}
        commit = hub.commit(branch, files, stale, text, folder.check_unchanged)
    return _result(upload, hub.repo, commit.url, commit.oid, commit.changed)


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


def _update_index(
    hub: Hub, uploads: Sequence[Upload], base_model: str | None, shared: Mapping[str, bytes], results: Sequence[Evaluation]
) -> None:
    """The card on main lists the branches, unless somebody wrote another one there; what is of all of them lies beside it."""
    rows = [
        BranchRow(u.branch, s.decoder_bpw, s.head_bpw, s.total_bytes, u.evaluation)
        for u in uploads
        if u.branch != MAIN
        for s in [u.folder.summary]
    ]
    main = hub.branch(MAIN)
    if main is None:
        _say(f"{hub.repo}: there is no branch main, so no list of branches")
        return
    before = hub.read_text(main, CARD)
    if before is not None:
        text = with_branches(before, hub.repo, rows)
        if text is None:
            _say(f"{hub.repo}: main has a card of its own, which stays as it is")
            return
    else:
        fields = read_fields(split_card(uploads[0].card)[0])
        base = fields.get("base_model")
        named = base_model or (base if isinstance(base, str) and REPOSITORY.fullmatch(base) else None)
        original = original_card(uploads[0].card)
        text = index_card(hub.repo, rows, named, hub.repo.partition("/")[0], original, PLOT if PLOT in shared else "")
    files: dict[str, Path | bytes] = {**shared, CARD: text.encode("utf-8")}
    if shared and results:
        branches = {u.evaluation.model: u.branch for u in uploads if u.evaluation is not None}
        files[EVALUATION] = published_results(results, branches, base_model)
    if text != before or shared:
        if hub.commit(main, files, [], "List of branches").changed:
            _say(f"{hub.repo}: the card on main lists the branches")


# ---- what goes along --------------------------------------------------------------------------------------------------


def shared_files(store: Store | None, results: Sequence[Evaluation], repo: str) -> dict[str, bytes]:
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


def published_results(results: Sequence[Evaluation], branches: Mapping[str, str], base_model: str | None) -> bytes:
    """evaluation.json with names in place of folders: branches, and the source model."""
    found = []
    for e in results:
        model, reference = branches.get(e.model, PurePath(e.model).name), base_model or PurePath(e.reference).name
        warnings = [w.replace(e.model, model).replace(e.reference or "\0", reference) for w in e.warnings]
        found.append({**e.raw, "model": model, "reference": reference or None, "warnings": warnings})
    return (json.dumps({"results": found}, indent=1) + "\n").encode()


# ---- cards ----------------------------------------------------------------------------------------------------------


def card_text(
    folder: Folder, repo: str, branch: str, base_model: str | None, evaluation: Evaluation | None, plot: str = ""
) -> str:
    """README.md as it is published: the directory's own, or a new one, with its publisher and what was asked for."""
    text = folder.card
    if text is None:
        text = model_card(of_directory(folder.summary))
    elif folder.files[CARD].nbytes > MAX_CARD_BYTES * 2:
        raise UsageError(f"{folder.path / CARD}: larger than {MAX_CARD_BYTES >> 19} MiB", "shorten it")
    found = read_fields(split_card(text)[0])
    fields: dict[str, Value] = {}
    if base_model is not None:
        fields.update(base_model=base_model, base_model_relation="quantized")
    if found.get("quantized_by", PROGRAM) == PROGRAM:
        fields["quantized_by"] = repo.partition("/")[0]
    if fields:
        text = with_fields(text, fields)
    text = with_loading(text, repo, branch)
    return text if evaluation is None else with_evaluation(text, evaluation, plot)


def match_evaluations(
    folders: Sequence[Folder], paths: Sequence[str], results: Sequence[Evaluation]
) -> list[Evaluation | None]:
    """The result of each directory, found by its path, or else by its name. UsageError if none is about any of them."""
    found: dict[Path, Evaluation] = {}
    for e in results:
        same = [f.path for f in folders if f.path.resolve() == Path(e.model).resolve()]
        found.update(dict.fromkeys(same or [f.path for f in folders if f.path.resolve().name == Path(e.model).name], e))
    if paths and not found:
        names = ", ".join(sorted({e.model for e in results})[:5]) or "nothing"
        raise UsageError(f"--eval {paths[0]}: is about {names}, not about what is published", "evaluate those directories")
    return [found.get(f.path) for f in folders]


def _outdated(folders: Sequence[Folder], figures: Sequence[Evaluation | None]) -> dict[Path, Evaluation]:
    """Results of what directories held before they were written again, by a patch for one. They are not published."""
    pairs = zip(folders, figures, strict=True)
    found = {f.path: e for f, e in pairs if e is not None and standing(e, [f.path]) == EARLIER}
    for path in found:
        _say(f"{path}: written again since its evaluation, so no figures go along: exl2ray eval {path} --json > FILE")
    return found


# ---- shown ----------------------------------------------------------------------------------------------------------


def _result(upload: Upload, repo: str, url: str = "", commit: str = "", changed: bool = False) -> Published:
    folder = upload.folder
    sizes = {name: f.nbytes for name, f in folder.files.items()} | {n: len(c) for n, c in upload.extras.items()}
    sizes |= {CARD: len(upload.card.encode("utf-8"))}
    total = sum(sizes.values())
    sizes |= {x.name: x.nbytes for x in folder.left_out if x.nbytes is not None}
    return Published(
        str(folder.path), repo, upload.branch, tuple(upload.names), tuple(x.name for x in folder.left_out),
        total, url, commit, changed, sizes, {x.name: x.why for x in folder.left_out},
    )  # fmt: skip


def _say(text: str) -> None:
    print(clean(text), file=sys.stderr, flush=True)


def show(published: Sequence[Published]) -> None:
    for p in published:
        if not p.url:
            print(clean(f"{p.directory}: {file_size(p.nbytes)} would go to {p.repo}, branch {p.branch}:"))
            _table(p, p.files)
        if p.left_out:
            print(clean(f"{p.directory}: {plural(len(p.left_out), 'name')} left out:"))
            _table(p, p.left_out)
        if p.url:
            print(clean(f"{p.directory}: {p.url}" + ("" if p.changed else " (nothing to change)")))


def _table(p: Published, names: Sequence[str]) -> None:
    rows = [[n, file_size(p.sizes[n]) if n in p.sizes else "-", p.reasons.get(n, "")] for n in names]
    for line in text_table(["", "", ""], rows)[1:]:
        print(clean(f"  {line.rstrip()}"))


def published_json(published: Sequence[Published]) -> dict[str, Any]:
    return {"published": list(published)}
