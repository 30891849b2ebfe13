"""What goes to a repository: directories, with the cards that they are published with and what goes along.

Figures are those of the models as they are: results of what a directory held before stay here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from exl2ray.errors import UsageError
from exl2ray.evaluate.record import EVALUATION, Evaluation
from exl2ray.evaluate.standing import EARLIER, standing
from exl2ray.publish.base_model import MAX_CARD_BYTES
from exl2ray.publish.card import PROGRAM, model_card, of_directory, with_evaluation, with_loading, without_evaluation
from exl2ray.publish.file_kinds import CARD
from exl2ray.publish.frontmatter import Value, read_fields, split_card, with_fields
from exl2ray.publish.selection import Folder
from exl2ray.terminal.console import aside

PLOT = "ladder.png"


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
class Release:
    """All that goes to a repository. base_model: if asked for. shared: files that are of all directories, by name. results:
    the figures, of other models too if those were evaluated with these.
    """

    repo: str
    base_model: str | None
    uploads: Sequence[Upload]
    shared: Mapping[str, bytes]
    results: Sequence[Evaluation]

    def evaluation_file(self) -> bytes:
        """evaluation.json of all of them."""
        branches = {u.evaluation.model: u.branch for u in self.uploads if u.evaluation is not None}
        return evaluation_file(self.results, branches, self.base_model)

    def beside_index(self) -> dict[str, bytes]:
        """What goes to main with the list of the other branches, by name; there is no list where all goes to main."""
        return {**self.shared, EVALUATION: self.evaluation_file()} if self.shared and self.results else dict(self.shared)


# ---- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """of: by path of a directory. outdated: directories whose results are not of what they hold now. results: all others."""

    of: Mapping[Path, Evaluation]
    outdated: Sequence[Path]
    results: Sequence[Evaluation]


def figures_of(folders: Sequence[Folder], paths: Sequence[str], results: Sequence[Evaluation]) -> Figures:
    """The result of each directory, found by its path, or else by its name. UsageError if none is about any of them.

    paths: the files that the results are from.
    """
    found: dict[Path, Evaluation] = {}
    for e in results:
        same = [f.path for f in folders if f.path.resolve() == Path(e.model).resolve()]
        found.update(dict.fromkeys(same or [f.path for f in folders if f.path.resolve().name == Path(e.model).name], e))
    if paths and not found:
        names = ", ".join(sorted({e.model for e in results})[:5]) or "nothing"
        hint = "evaluate what is published, or give the --work of its conversion"
        raise UsageError(f"{paths[0]}: is about {names}, not about what is published", hint)
    outdated = [f.path for f in folders if f.path in found and standing(found[f.path], [f.path]) == EARLIER]
    for path in outdated:
        aside(f"{path}: written again since its evaluation, so no figures go along: exl2ray eval {path} --json > FILE")
    dropped = [found.pop(path) for path in outdated]
    return Figures(found, outdated, [e for e in results if e not in dropped])


def evaluation_file(results: Sequence[Evaluation], branches: Mapping[str, str], base_model: str | None) -> bytes:
    """evaluation.json with names in place of folders: branches, and the source model."""
    found = []
    for e in results:
        model, reference = branches.get(e.model, PurePath(e.model).name), base_model or PurePath(e.reference).name
        warnings = [w.replace(e.model, model).replace(e.reference or "\0", reference) for w in e.warnings]
        found.append({**e.raw, "model": model, "reference": reference or None, "warnings": warnings})
    return (json.dumps({"results": found}, indent=1) + "\n").encode()


# ---- one directory ----------------------------------------------------------------------------------------------------


def upload(
    folder: Folder, repo: str, branch: str, base_model: str | None, figures: Figures, extras: Mapping[str, bytes]
) -> Upload:
    """A directory as it is published. extras: files that go along, but for those that it has itself."""
    evaluation = figures.of.get(folder.path)
    card = _card(folder, repo, branch, base_model)
    if evaluation is not None:
        card = with_evaluation(card, evaluation, PLOT if PLOT in extras else "")
    elif folder.path in figures.outdated:
        card = without_evaluation(card)
    return Upload(folder, branch, card, evaluation, {n: c for n, c in extras.items() if n not in folder.files})


def _card(folder: Folder, repo: str, branch: str, base_model: str | None) -> str:
    """README.md: the directory's own, or a new one, with its publisher and what was asked for."""
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
    return with_loading(text, repo, branch)
