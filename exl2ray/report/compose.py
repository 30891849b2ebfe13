"""From facts to a page: summary, notes and settings, and the drawn sections between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from exl2ray.recipe import JOB_FLAGS
from exl2ray.report import sections
from exl2ray.report.facts import Facts, Note
from exl2ray.report.page import Block, Items, Page, Section, Table, Text
from exl2ray.report.style import PAGE, drawing
from exl2ray.terminal.console import file_size, perplexity, plural

_STATES = {
    "running": "A conversion is running in this directory: what follows is what was there when the report was written.",
    "crashed": "The last driver ended without notice. The same command goes on where it was.",
}
_MAX_NOTES, _MAX_PLACES = 60, 4


def report_page(facts: Facts) -> Page:
    """The page for ``facts``; sections for which there is nothing are left out."""
    with drawing(PAGE):
        drawn = [
            sections.quality(facts), sections.allocation(facts), sections.curves(facts), sections.chain(facts),
            sections.experts(facts), sections.time(facts),
        ]  # fmt: skip
    parts = [_summary(facts), _warnings(facts), _notes(facts), *drawn, _settings(facts)]
    identity = _section(facts, "identity")
    source = str(identity.get("in_dir") or "")
    title = f"Conversion of {PurePath(source).name or facts.root} to EXL2"
    subtitle = ", ".join(str(x) for x in (identity.get("architecture"), source, f"work directory {facts.root}") if x)
    return Page(title, subtitle, tuple(p for p in parts if p is not None))


def _section(facts: Facts, name: str) -> Mapping[str, Any]:
    return facts.job.job.get(name, {}) if facts.job is not None else {}


def _summary(facts: Facts) -> Section:
    blocks: list[Block] = []
    if facts.state in _STATES:
        blocks.append(Text(_STATES[facts.state]))
    if not facts.bitrates:
        measured = len({c.key for c in facts.curves})
        state = f"{plural(measured, 'module')} measured" if measured else "nothing is measured"
        blocks.append(Text(f"Nothing is quantised yet; {state}."))
        return Section("summary", "Summary", tuple(blocks))
    columns = ["target bpw", "achieved", "from the optimum", "modules", "tensors", "calibration perplexity", "written to"]
    rows = []
    for b in facts.bitrates:
        done = len(b.chain.modules)
        rows.append([
            f"{b.bits:g}",
            "-" if b.achieved_bpw is None else f"{b.achieved_bpw:.4f}",
            "-" if b.gap is None else f"{100 * max(0.0, b.gap):.4f} %",
            f"{done} of {b.modules}" if done < b.modules else f"{done}",
            file_size(b.chain.nbytes) if b.chain.nbytes else "-",
            "-" if b.chain.perplexity is None else perplexity(b.chain.perplexity),
            b.directory or "-",
        ])  # fmt: skip
    blocks.append(Table(columns, rows))
    return Section("summary", "Summary", tuple(blocks))


def _warnings(facts: Facts) -> Section | None:
    """What may make the models worse than their bitrates promise."""
    if not facts.warnings:
        return None
    return Section("warnings", "Warnings that concern the result", tuple(Text(w, bad=True) for w in _first(facts.warnings)))


def _notes(facts: Facts) -> Section:
    """What was degraded or damaged; a section that says so where there is nothing."""
    blocks: list[Block] = []
    if facts.problems:
        blocks.append(Text("Left out of this report, because it is damaged or missing:", bad=True))
        blocks.append(Items(_first(facts.problems)))
    if facts.notes:
        rows = [[n.text, _places(n), f"{n.count}"] for n in facts.notes[:_MAX_NOTES]]
        blocks.append(Table(["what happened", "where", "times"], rows))
        if len(facts.notes) > _MAX_NOTES:
            blocks.append(Text(f"and {len(facts.notes) - _MAX_NOTES} more kinds of notes"))
    if not blocks:
        blocks.append(Text("Nothing was degraded: no fallback, no lost worker, no damaged record."))
    return Section("notes", "Notes", tuple(blocks))


def _first(texts: tuple[str, ...]) -> tuple[str, ...]:
    more = len(texts) - _MAX_NOTES
    return (*texts[:_MAX_NOTES], f"and {more} more") if more > 0 else texts


def _places(note: Note) -> str:
    more = len(note.places) - _MAX_PLACES
    return ", ".join(note.places[:_MAX_PLACES]) + (f" and {more} more" if more > 0 else "")


def _settings(facts: Facts) -> Section | None:
    if facts.job is None:
        return None
    rows = []
    for section, settings in facts.job.job.items():
        for name, value in settings.items():
            if value is not None:
                text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                rows.append([section, name.replace("_", " "), JOB_FLAGS.get(f"{section}.{name}", ""), text])
    rows += [["version", name, "", str(version)] for name, version in facts.job.versions.items()]
    return Section("settings", "Settings and versions", (
        Text(f"The job was started {sections.moment_text(facts.job.created)}, with these versions."),
        Table(["section", "setting", "flag", "value"], rows),
    ))  # fmt: skip
