"""Model cards: README.md of an output directory, and of a repository that has a branch for each bitrate.

The texts are the templates beside this file; a card is a function of plain facts, without dates, times or places, so a
conversion repeated writes the same bytes. What later commands replace stands between two comments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from exl2ray import __version__
from exl2ray.evaluate.record import TAIL_NAMES, Evaluation, judged
from exl2ray.formats.files import atomic_file
from exl2ray.formats.summary import DirectorySummary
from exl2ray.publish.base_model import (
    NO_CARD,
    OriginalCard,
    base_model_of,
    command,
    quality_text,
    read_original,
    settings,
)
from exl2ray.publish.file_kinds import CARD
from exl2ray.publish.frontmatter import Value, write_block
from exl2ray.recipe import Recipe, bpw_name
from exl2ray.wording import file_size, perplexity

TAGS = ("exl2", "exllamav2", "quantized")
PROGRAM = "exl2ray"  # quantized_by, until somebody publishes the model
EVALUATION_MARKS = ("<!-- exl2ray: evaluation -->", "<!-- exl2ray: end of evaluation -->")
TUNING_MARKS = ("<!-- exl2ray: tuning -->", "<!-- exl2ray: end of tuning -->")
BRANCH_MARKS = ("<!-- exl2ray: branches -->", "<!-- exl2ray: end of branches -->")
LOADING_MARKS = ("<!-- exl2ray: loading -->", "<!-- exl2ray: end of loading -->")
HEAD = "| branch | decoder bpw | head bpw | size | perplexity | KL (nats) | KL, 99 % | flipped top-1 |\n" + "|---" * 8 + "|"
OUTDATED = "## Evaluation\n\nThe model was written again after its last evaluation: there are no figures of it as it is."
ROW = re.compile(r"^\| \[(?P<branch>[^\]|]+)\]\(.*\|$", re.MULTILINE)


@dataclass(frozen=True)
class Making:
    """How a conversion made the model. Perplexities are those on calibration rows; None: not finite, or not known.

    quality: what --quality and the flags of its parts did, in a sentence.
    """

    command: str
    settings: tuple[tuple[str, str], ...]  # (flag, value)
    perplexity: float | None
    reference_perplexity: float | None  # of the source model, on the same rows
    quality: str = ""
    version: str = __version__


@dataclass(frozen=True)
class CardInfo:
    """Everything that a card says.

    bits: requested. achieved_bpw: of the decoder layers, overheads included. calibration: name of the user's file, None
    for the built-in set. making: None for a model that another program converted. warnings: those of the conversion.
    """

    architecture: str
    bits: float
    achieved_bpw: float
    head_bits: int
    file_bytes: int
    files: int
    calibration: str | None
    rows: int
    length: int
    making: Making | None = None
    base_model: str | None = None  # owner/name on the Hub
    original: OriginalCard = NO_CARD
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BranchRow:
    """One branch. bpw: of the decoder layers; head_bpw: 0 if the head is not quantised."""

    branch: str
    bpw: float
    head_bpw: float
    nbytes: int
    evaluation: Evaluation | None


def model_card(info: CardInfo) -> str:
    """The whole card of one model."""
    name = info.base_model.partition("/")[2] if info.base_model else info.architecture
    source = _link(info.base_model) if info.base_model else "the model below"
    if not info.base_model and not info.original.text:
        source = f"a model of the architecture {info.architecture}"
    front = front_matter(info.base_model, PROGRAM, info.original)
    evaluation = _marked(EVALUATION_MARKS, "")
    return _render("card", i=info, front=front, name=name, bits=bpw_name(info.bits), source=source, evaluation=evaluation,
                   loading=_marked(LOADING_MARKS, loading_section()))  # fmt: skip


def index_card(
    repo: str, rows: Sequence[BranchRow], base_model: str | None, owner: str, original: OriginalCard, plot: str
) -> str:
    """The whole card of a repository with branches. People land there, and the Hub lists a repository by it."""
    name, front = repo.partition("/")[2], front_matter(base_model, owner, original)
    source, loading = _link(base_model) if base_model else name, loading_section(repo, rows[0].branch)
    table = _table(repo, rows, {})
    return _render("index", front=front, name=name, table=table, plot=plot, source=source, loading=loading)


def front_matter(base_model: str | None, quantized_by: str, original: OriginalCard) -> str:
    """The YAML block: what the Hub needs to list the model under its base model, and what is kept of the original."""
    fields: dict[str, Value] = {}
    if base_model is not None:
        fields.update(base_model=base_model, base_model_relation="quantized")
    fields.update(quantized_by=quantized_by, library_name="exllamav2", **dict(original.fields))
    fields["tags"] = list(dict.fromkeys([*TAGS, *original.tags]))
    return write_block(fields)


def evaluation_section(e: Evaluation, plot: str) -> str:
    """Figures and what they mean. plot: name of a picture beside the card."""
    before, kl, top1 = (f.value if f is not None else None for f in (e.reference_perplexity, e.kl, e.top1))
    word, sentence = judged(e.perplexity.value, before, kl, top1) if before is not None else ("", "")
    tail = {n: f"KL divergence, {'maximum' if n == 'max' else label + ' are below'}" for n, label in TAIL_NAMES.items()}
    return _render("evaluation", e=e, word=word, sentence=sentence, tail=tail, plot=plot)


def loading_section(repo: str = "", branch: str = "") -> str:
    """How to load it, a line for each program; from a repository, if there is one."""
    where = f'"{repo}", revision="{branch}"' if repo else '"DIRECTORY"'
    return _render("loading", repo=repo, branch=branch, where=where)


def with_evaluation(card: str, evaluation: Evaluation, plot: str = "") -> str:
    """``card`` with its evaluation replaced; below everything else on a card that has no place for one."""
    section = _marked(EVALUATION_MARKS, evaluation_section(evaluation, plot))
    return _replaced(card, EVALUATION_MARKS, section) or f"{card.rstrip()}\n\n{section}\n"


def without_evaluation(card: str) -> str:
    """``card`` saying, in place of figures, that those there are were made of what the model was before."""
    section = _marked(EVALUATION_MARKS, OUTDATED)
    return _replaced(card, EVALUATION_MARKS, section) or f"{card.rstrip()}\n\n{section}\n"


def with_loading(card: str, repo: str, branch: str) -> str:
    """``card`` saying how the model is loaded from where it is published; as it is, if it has no place for that."""
    return _replaced(card, LOADING_MARKS, _marked(LOADING_MARKS, loading_section(repo, branch))) or card


def with_branches(card: str, repo: str, rows: Sequence[BranchRow]) -> str | None:
    """``card`` with these branches added to its table or replaced there; None if it has no such table."""
    table = card.partition(BRANCH_MARKS[0])[2].partition(BRANCH_MARKS[1])[0]
    kept = {found["branch"]: found[0] for found in ROW.finditer(table)}
    return _replaced(card, BRANCH_MARKS, _table(repo, rows, kept))


# ---- parts ------------------------------------------------------------------------------------------------------------


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FunctionLoader(lambda n: resources("exl2ray.publish").joinpath(f"{n}.jinja").read_text(encoding="utf-8")),
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=template in ("card", "index"),
    )  # fmt: skip
    environment.filters.update(cell=_cell, prose=_prose, size=file_size, perplexity=perplexity)
    return environment.get_template(template).render(**values)


def _marked(marks: tuple[str, str], text: str) -> str:
    return "\n".join(filter(None, (marks[0], text, marks[1])))


def _replaced(card: str, marks: tuple[str, str], section: str) -> str | None:
    """``card`` with ``section`` in place of what stands between the marks and of themselves; None if they are not there."""
    before, start, rest = card.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    return f"{before}{section}{after}" if start and end else None


def _link(repo: str) -> str:
    return f"[{repo}](https://huggingface.co/{repo})"


def _prose(text: str) -> str:
    """Text that stays text: names of tensors and files may hold what Markdown and HTML read as markup."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", plain)


def _cell(text: str) -> str:
    """Text in a cell of a table; names of files may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|")


def _table(repo: str, rows: Sequence[BranchRow], kept: dict[str, str]) -> str:
    lines = {**kept, **{row.branch: _line(repo, row) for row in rows}}
    return _marked(BRANCH_MARKS, "\n".join([HEAD, *(lines[branch] for branch in sorted(lines, key=_natural))]))


def _natural(branch: str) -> list[tuple[bool, float, str]]:
    """10.0bpw comes after 4.0bpw."""
    parts = re.split(r"(\d+(?:\.\d+)?)", branch)
    return [(i % 2 == 1, float(p) if i % 2 else 0.0, p) for i, p in enumerate(parts)]


def _line(repo: str, row: BranchRow) -> str:
    e = row.evaluation
    figures = (None, None, None, None) if e is None else (e.perplexity, e.kl, e.kl_tail.get("p99"), e.top1)
    forms = ("{:.4g}", "{:.4f}", "{:.3f}", "{:.1%}")
    cells = [
        f"[{row.branch}](https://huggingface.co/{repo}/tree/{row.branch})", f"{row.bpw:.3f}",
        f"{row.head_bpw:.2f}" if row.head_bpw else "16", file_size(row.nbytes),
        *("-" if f is None else form.format(1 - f.value if "%" in form else f.value)
          for f, form in zip(figures, forms, strict=True)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


# ---- files ------------------------------------------------------------------------------------------------------------


def write_card(directory: str | Path, info: CardInfo) -> Path:
    """README.md of a directory, in the place of the source's that was copied there. Raises StoreError."""
    return _write(directory, model_card(info))


def add_evaluation(directory: str | Path, evaluation: Evaluation) -> Path:
    """Puts the figures on the card of a directory. Raises StoreError if it cannot be written."""
    text = _card_in(directory)
    return _write(directory, with_evaluation(text, evaluation), text)


def add_tuning(
    directory: str | Path, before: Mapping[str, float], after: Mapping[str, float], kept: str, tokens: int,
    worse: Sequence[str],
) -> Path:  # fmt: skip
    """Says on the card of a directory what a tuning has brought: KL (nats) by kind of text. Raises StoreError."""
    text = _card_in(directory)
    section = _marked(TUNING_MARKS, tuning_section(before, after, kept, tokens, worse))
    wanted = _replaced(text, TUNING_MARKS, section)
    if not wanted:  # in front of the evaluation, which belongs to the tuned model
        head, mark, tail = text.partition(EVALUATION_MARKS[0])
        wanted = f"{head.rstrip()}\n\n{section}\n" + (f"\n{mark}{tail}" if mark else "")
    return _write(directory, wanted, text)


def tuning_section(
    before: Mapping[str, float], after: Mapping[str, float], kept: str, tokens: int, worse: Sequence[str]
) -> str:
    """How a model was tuned, in a table. worse: kinds of text for the sake of which it was rolled back."""
    done = f"{kept[0].upper()}{kept[1:]} were tuned"
    if kept == "nothing":
        why = f"made {', '.join(map(_prose, worse))} worse" if worse else "gained nothing"
        done = f"Tuning {why} and was left out"
    rows = [f"| {_cell(kind)} | {kl:.4f} | {after[kind]:.4f} |" for kind, kl in before.items()]
    return "\n".join([
        "## Tuning", "", f"{done}, on {tokens:,} tokens of text, towards what the source model predicts.", "",
        "| held-out text | KL (nats) before | after |", "|---|---|---|", *rows,
    ])  # fmt: skip


def _card_in(directory: str | Path) -> str:
    path = Path(directory) / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write(directory: str | Path, text: str, before: str | None = None) -> Path:
    """``before``: what is there already."""
    path = Path(directory) / CARD
    if text != before:
        with atomic_file(path) as f:
            f.write(text.encode("utf-8"))
    return path


def converted(
    recipe: Recipe, bits: float, achieved_bpw: float, architecture: str, rows: int, files: list[Path],
    perplexity: float | None, reference_perplexity: float | None, patches: Sequence[str] = (),
) -> CardInfo:  # fmt: skip
    """The facts of a conversion. ``files``: shards. ``rows``: calibration rows of the quantisation pass. ``patches``: texts
    of --set that were applied to the finished model.
    """
    base = base_model_of(recipe.in_dir)
    how = (command(recipe, bits, base, patches), settings(recipe), perplexity, reference_perplexity, quality_text(recipe))
    return CardInfo(
        architecture, bits, achieved_bpw, recipe.usual_head_bits, sum(p.stat().st_size for p in files), len(files),
        recipe.calibration_name, rows, recipe.length,
        Making(*how), base, read_original(recipe.in_dir),
    )  # fmt: skip


def of_directory(summary: DirectorySummary) -> CardInfo:
    """What an EXL2 directory without a card says of itself."""
    q = summary.settings
    calibration = q.get("calibration")
    data = calibration if isinstance(calibration, dict) else {}
    dataset = str(data.get("dataset", "(default)"))
    return CardInfo(
        summary.architecture, float(q.get("bits", summary.decoder_bpw)), summary.decoder_bpw,
        int(q.get("head_bits") or round(summary.head_bpw) or 16),
        summary.total_bytes, len(summary.files), None if dataset == "(default)" else dataset,
        int(data.get("rows", 0)), int(data.get("length", 0)),
    )  # fmt: skip
