"""``exl2ray convert --publish``: a conversion whose models go to the Hub, from where its source may have come.

    ready     token and repository are looked at before anything is computed
    convert   as ever; a run that is stopped goes on with the same command
    publish   a branch for each bitrate; what has arrived is not sent again
    note      what was published is noted in the work directory
    clean     with --clean: models and everything large in the work directory go, once all of it has arrived

Each step finds out what of it is done, so the same command goes on wherever the last one ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exl2ray import convert as story
from exl2ray.commands.publish import publish
from exl2ray.errors import UsageError
from exl2ray.events import Reporter
from exl2ray.formats.hub_names import check_repository
from exl2ray.publish.selection import OWN
from exl2ray.publish.sending import Published, ready_repository
from exl2ray.recipe import Recipe
from exl2ray.remote.hub_library import need_hub_library
from exl2ray.store.file_names import EVENTS, FOLDERS, is_ours
from exl2ray.store.fs import Store
from exl2ray.store.job_file import JOB_FILE
from exl2ray.store.open import open_store
from exl2ray.store.records import Records, hash_inputs

BRANCH = "{bpw}bpw"
NOTED = "logs/published.json"  # in the work directory
PLACES = ("out_dir", "in_dir", "compile_full", "device", "gpus", "executor", "ray_address", "no_resume", "reuse")


@dataclass(frozen=True)
class Wishes:
    """repo: owner/name. private: make it private. clean: leave no model here."""

    repo: str
    private: bool = False
    clean: bool = False


def default_places(repo: str) -> dict[str, str]:
    """-o and -cf where they are not given: folders below one that is named after the repository. Raises UsageError."""
    check_repository("--publish", repo)
    name = repo.partition("/")[2]
    return {"out_dir": f"{name}/work", "compile_full": f"{name}/{{bpw}}bpw"}


def convert(recipe: Recipe, wishes: Wishes, reporter: Reporter) -> None:
    """Raises what conversions and uploads raise; before anything is computed, UsageError and HubError for a token or a
    repository that will not do.
    """
    check_repository("--publish", wishes.repo)
    if recipe.output_measurement is not None:
        raise UsageError("--publish: there is no model to publish with -om", "drop one of them")
    store = open_store(recipe.out_dir)
    identity = _identity(recipe, wishes, store)
    noted = None if recipe.no_resume else _noted(store, identity)
    if noted is None:
        _ready(wishes)
        held = _Held(reporter)
        done = story.convert(recipe, held)
        directories = [o.directory for o in done.outputs if o.directory is not None]
        published = publish(directories, wishes.repo, branch=BRANCH, work=recipe.out_dir)
        noted = [asdict(p) for p in published]
        store.put(NOTED, json.dumps({"inputs": identity, "published": noted}, indent=1).encode())
        _say(reporter, published)
        held.release()
    else:
        reporter.event("note", message=f"published already: {', '.join(p['url'] for p in noted)}")
    if wishes.clean:
        _clean(store, noted, reporter)


def _ready(wishes: Wishes) -> None:
    need_hub_library("--publish")
    from exl2ray.publish.hub import Hub, stored_token

    ready_repository(Hub(wishes.repo, stored_token()), create=True, private=wishes.private)


class _Held:
    """A reporter that keeps "done" until the models are where they belong: it is the last event of a run."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._done = reporter, dict[str, Any]()

    def event(self, name: str, **fields: Any) -> None:
        if name == "done":
            self._done = fields
        else:
            self._reporter.event(name, **fields)

    def release(self) -> None:
        self._reporter.event("done", **self._done)

    def close(self) -> None:
        self._reporter.close()


def _identity(recipe: Recipe, wishes: Wishes, store: Store) -> str:
    """Of what is published: a model that was patched is another one."""
    from exl2ray.steps.patching import patches_of

    settings = {n: v for n, v in asdict(recipe).items() if n not in PLACES}
    found = {f"{bits:g}": patches_of(Records(store), bits) for bits in recipe.bits}
    patches = {bits: [list(texts) for _, texts in some] for bits, some in found.items() if some}
    more = {"patches": patches} if patches else {}
    return hash_inputs(recipe=json.loads(json.dumps(settings, default=str)), repo=wishes.repo, **more)


def _noted(store: Store, identity: str) -> list[dict[str, Any]] | None:
    """What was published of this very job; None if that is not noted."""
    if not store.exists(NOTED):
        return None
    try:
        found = json.loads(store.get(NOTED))
        return [dict(p) for p in found["published"]] if found["inputs"] == identity else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _say(reporter: Reporter, published: Iterable[Published]) -> None:
    for p in published:
        reporter.event("note", message=f"{p.directory}: {p.url}" + ("" if p.changed else " (nothing to change)"))


def _clean(store: Store, published: Iterable[dict[str, Any]], reporter: Reporter) -> None:
    """Removes what was published and what exl2ray made in the work directory, but for the job, its log and the note."""
    for p in published:
        folder = Path(p["directory"])
        own = [q.name for q in folder.iterdir() if q.name.startswith(OWN)] if folder.is_dir() else []
        for name in [*p["files"], *own]:
            with suppress(FileNotFoundError):
                (folder / name).unlink()
        left = sorted(q.name for q in folder.iterdir()) if folder.is_dir() else []
        if left:
            reporter.event("note", message=f"--clean: {folder} keeps what was not published: {', '.join(left[:5])}")
        elif folder.is_dir():
            folder.rmdir()
    kept = (JOB_FILE, EVENTS, NOTED)
    names = [*store.entries(), *(name for folder in FOLDERS for name in store.list(folder))]
    for name in dict.fromkeys(names):
        if name not in kept and is_ours(name) and store.exists(name):
            store.delete(name)
    store.prune(FOLDERS)
    reporter.event("note", message=f"--clean: no model is left here; {store.root} keeps the job and what it published")
