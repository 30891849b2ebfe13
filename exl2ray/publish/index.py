"""The card on main of a repository that has a branch for each bitrate.

The Hub lists a repository by the card on main, and people land there. The table of branches stands between two comments,
so that a later upload adds its rows to those of earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from exl2ray.evaluate.record import Evaluation
from exl2ray.publish.card import front_matter
from exl2ray.publish.origin import OriginalCard
from exl2ray.terminal.console import file_size

START, END = "<!-- exl2ray: branches -->", "<!-- exl2ray: end of branches -->"
HEAD = "| branch | bits per weight | head | size | perplexity | KL (nats) | top-1 |\n|---|---|---|---|---|---|---|"
ROW = re.compile(r"^\| \[(?P<branch>[^\]|]+)\]\(.*\|$", re.MULTILINE)


@dataclass(frozen=True)
class BranchRow:
    """One branch. bpw: of the decoder layers; head_bpw: 0 if the head is not quantised."""

    branch: str
    bpw: float
    head_bpw: float
    nbytes: int
    evaluation: Evaluation | None


def index_card(repo: str, rows: Sequence[BranchRow], base_model: str | None, owner: str, original: OriginalCard) -> str:
    """The whole card."""
    owner_name, name = repo.split("/")
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else name
    branch = rows[0].branch
    format_ = "the EXL2 format of [ExLlamaV2](https://github.com/turboderp-org/exllamav2)"
    return (
        f"{front_matter(base_model, owner, original)}\n# {name}\n\n"
        f"{source} in {format_}, a branch for each bitrate:\n\n"
        f"{_section(repo, rows, {})}\n\n"
        "Perplexity, KL divergence from the source model and agreement of the most probable tokens are of `exl2ray eval`, "
        "where it was run; the card of each branch says on what. To download one branch:\n\n"
        f"```sh\nhf download {owner_name}/{name} --revision {branch} --local-dir {name}-{branch.replace('/', '-')}\n```\n"
    )


def with_branches(card: str, repo: str, rows: Sequence[BranchRow]) -> str | None:
    """``card`` with these branches added to its table or replaced there; None if it has no such table."""
    before, start, rest = card.partition(START)
    table, end, after = rest.partition(END)
    if not (start and end):
        return None
    kept = {found["branch"]: found[0] for found in ROW.finditer(table)}
    return f"{before}{_section(repo, rows, kept)}{after}"


def _section(repo: str, rows: Sequence[BranchRow], kept: dict[str, str]) -> str:
    lines = {**kept, **{row.branch: _line(repo, row) for row in rows}}
    return "\n".join([START, HEAD, *(lines[branch] for branch in sorted(lines, key=_natural)), END])


def _natural(branch: str) -> list[tuple[bool, float, str]]:
    """10.0bpw comes after 4.0bpw."""
    parts = re.split(r"(\d+(?:\.\d+)?)", branch)
    return [(i % 2 == 1, float(p) if i % 2 else 0.0, p) for i, p in enumerate(parts)]


def _line(repo: str, row: BranchRow) -> str:
    e = row.evaluation
    link = f"[{row.branch}](https://huggingface.co/{repo}/tree/{row.branch})"
    cells = [
        link,
        f"{row.bpw:.3f}",
        f"{row.head_bpw:.2f}" if row.head_bpw else "16",
        file_size(row.nbytes),
        f"{e.perplexity.value:.4g}" if e is not None else "-",
        f"{e.kl.value:.4f}" if e is not None and e.kl is not None else "-",
        f"{e.top1.value:.1%}" if e is not None and e.top1 is not None else "-",
    ]
    return f"| {' | '.join(cells)} |"
