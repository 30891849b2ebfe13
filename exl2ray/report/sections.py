"""The sections of a report that are drawn: each returns None where the work directory has nothing for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from markupsafe import Markup
from matplotlib.figure import Figure

from exl2ray.report.chains import ModuleResult
from exl2ray.report.facts import Bitrate, Facts
from exl2ray.report.figures import (
    COVERAGE_STEPS,
    allocation_figure,
    chain_figure,
    curves_figure,
    experts_figure,
    timeline_figure,
)
from exl2ray.report.ladder import ladder_figure
from exl2ray.report.page import Block, Picture, Section, Table, Text
from exl2ray.report.prediction import PredictedKL, prediction_figure, usable
from exl2ray.report.style import svg_text
from exl2ray.report.timeline import busy_share
from exl2ray.terminal.console import duration, file_size, perplexity, plural

STARVED = COVERAGE_STEPS[0]  # of a fair share; below it, conversions warn
_SHOWN = 12  # rows of tables that could grow with the model


def picture(figure: Figure, name: str, caption: str, title: str = "") -> Picture:
    return Picture(Markup(svg_text(figure, name)), caption, title)  # the page's only markup besides its template


def quality(facts: Facts) -> Section | None:
    """Perplexity and KL by bitrate, from an evaluation; of calibration rows from the conversion itself."""
    blocks: list[Block] = []
    if facts.evaluations:
        rows = [e.row for e in facts.evaluations]
        reference = next((e.reference_perplexity for e in facts.evaluations if e.reference_perplexity is not None), None)
        caption = (
            "Points carry the bits per weight of the quantised linears; bars are standard errors over rows; that of "
            "the perplexity is of its distance from the source."
        )
        blocks.append(picture(ladder_figure(rows, reference_perplexity=reference), "ladder", caption))
        blocks.append(_evaluations_table(facts))
        blocks += _prediction(facts)
        blocks += [Text(w, bad=True) for w in dict.fromkeys(w for e in facts.evaluations for w in e.warnings)]
    elif facts.bitrates:
        command = "exl2ray eval --model OUT --reference MODEL --text FILE --json > eval.json"
        blocks.append(
            Text(
                "No evaluation is recorded here. Measure the models on held-out text, and give the result to "
                "exl2ray report with --eval eval.json, or keep it as evaluation.json in the work directory:",
                command,
            )
        )
    known = [b for b in facts.bitrates if b.chain.perplexity is not None]
    if known:
        body = [
            [f"{b.bits:g}", perplexity(b.chain.perplexity), _figure(b.chain.reference_perplexity),
             _increase(b.chain.perplexity, b.chain.reference_perplexity)]
            for b in known
        ]  # fmt: skip
        title = "Perplexity on calibration rows, as a check that nothing broke"
        blocks.append(Table(["target bpw", "quantised", "source", "increase"], body, title))
    return Section("quality", "Perplexity and KL divergence", tuple(blocks)) if blocks else None


def _prediction(facts: Facts) -> list[Block]:
    """Predicted beside measured KL, where the models of the evaluation are those that were written."""
    paths = {PurePath(b.directory): b for b in facts.bitrates if b.directory}
    names = Counter(path.name for path in paths)
    moved = {path.name: b for path, b in paths.items() if names[path.name] == 1}
    points = []
    for e in facts.evaluations:
        path = PurePath(e.model)
        b = paths.get(path) or moved.get(path.name)
        if b is not None and usable(b.predicted_kl, e.row.kl):
            points.append(PredictedKL(b.bits, b.predicted_kl or 0.0, e.row.kl or 0.0, e.row.kl_error))
    if not points:
        return []
    caption = (
        "KL divergence from the source: as the allocation predicted it from sensitivities and losses, and as measured. "
        "Dashed: equal. Points carry the bits per weight asked for; bars are standard errors over rows."
    )
    return [picture(prediction_figure(points), "prediction", caption, "Predicted and measured KL")]


def _evaluations_table(facts: Facts) -> Table:
    columns = ["model", "bpw", "size", "perplexity", "KL, nats", "top-1", "top-5"]
    rows = []
    for e in facts.evaluations:
        r = e.row
        shares = ["-" if s is None else f"{100 * s:.2f} %" for s in (r.top1, e.top5)]
        rows.append([e.model, f"{r.bpw:.3f}", file_size(r.file_bytes), f"{r.perplexity:.4f}",
                     "-" if r.kl is None else f"{r.kl:.5f}", *shares])  # fmt: skip
    first = facts.evaluations[0]
    if first.reference_perplexity is not None:
        rows.append([f"{first.reference} (source)", "-", "-", f"{first.reference_perplexity:.4f}", "-", "-", "-"])
    return Table(columns, rows)


def allocation(facts: Facts) -> Section | None:
    """A heat map per bitrate, all on one scale."""
    shown = [b for b in facts.bitrates if b.allocation.bpw]
    if not shown:
        return None
    values = [v for b in shown for v in b.allocation.bpw.values()]
    overrides = facts.job is not None and facts.job.job.get("quantize", {}).get("overrides")
    unset = ", before --set" if overrides else ""
    blocks: list[Block] = []
    for i, b in enumerate(shown):
        a = b.allocation
        what = "as stored, scales and permutations included" if a.exact else "widths and scales of the option"
        ahead = "" if _complete(b) else f" {len(b.chain.modules)} modules are quantised; the others as planned{unset}."
        figure = allocation_figure(a, min(values), max(values))
        caption = f"Bits per weight, {what}. Experts of a layer share a cell.{ahead}" if _has_experts(facts) else (
            f"Bits per weight, {what}.{ahead}")  # fmt: skip
        blocks.append(picture(figure, f"allocation{i}", caption, f"{b.bits:g} bpw"))
    return Section("allocation", "Chosen bits by layer and projection", tuple(blocks))


def curves(facts: Facts) -> Section | None:
    if not facts.curves:
        return None
    blocks: list[Block] = []
    if not facts.complete_measurement:
        blocks.append(Text(f"The measurement is not complete: {len({c.key for c in facts.curves})} modules so far."))
    caption = (
        "Relative Frobenius error of a module's output with each measured option, on calibration rows that pass through the "
        "source model. A line per layer through the options that none beats (dots: all of them). Where shapes are not known "
        "yet, storage in MB takes the place of bits per weight."
    )
    blocks.append(picture(curves_figure(facts.curves), "curves", caption))
    return Section("curves", "Error over bits, measured", tuple(blocks))


def chain(facts: Facts) -> Section | None:
    """Error of each module as quantised, and the table with the measured one beside it."""
    if not any(m.error is not None and m.layer is not None for b in facts.bitrates for m in b.chain.modules):
        return None
    caption = (
        "Relative Frobenius error of each quantised module's output, against the source module on the same states. By "
        "default these states come from the quantised modules before it."
    )
    figure = picture(chain_figure([b.chain for b in facts.bitrates]), "chain", caption)
    return Section("chain", "Error of the quantised modules", (figure, _modules_table(facts.bitrates)))


def _modules_table(bitrates: Sequence[Bitrate]) -> Table:
    by_key: dict[str, dict[float, ModuleResult]] = {}
    for b in bitrates:
        for m in b.chain.modules:
            by_key.setdefault(m.key, {})[b.bits] = m
    columns = ["module"]
    for b in bitrates:
        columns += [f"{b.bits:g} bpw", "measured"]
    rows = []
    for key, found in by_key.items():
        row = [key]
        for b in bitrates:
            error = found[b.bits].error if b.bits in found else None
            row += [_figure(error), _figure(b.planned_errors.get(key))]
        if any(cell != "-" for cell in row[1:]):
            rows.append(row)
    return Table(columns, rows, f"Every module: error in the chain, and as measured ({len(rows)})", folded=True)


def time(facts: Facts) -> Section | None:
    t = facts.timeline
    if t is None or not t.spans:
        return None
    share = busy_share(t)
    summary = f"{duration(t.seconds)} of running in {plural(len(t.runs) or 1, 'run')}"
    summary += f", from {moment_text(t.started)} to {moment_text(t.ended)}."
    if share is not None:
        summary += f" The workers (a GPU each, or the CPU) had work for {100 * share:.0f} % of the time they were there."
    stages = [
        [s.name, f"{s.finished}", duration(s.wall_seconds), duration(s.worker_seconds), f"{s.workers}",
         "-" if s.mean_busy is None else f"{s.mean_busy:.1f}"]
        for s in t.stages
    ]  # fmt: skip
    caption = (
        "When each worker had work. Busy means: from the moment a call was handed over until its item was complete, so it is "
        "the most that a GPU can have been used. Stages of several bitrates run side by side. Dotted: a new run."
    )
    columns = ["stage", "items", "wall time", "worker time", "workers", "of them busy, on average"]
    blocks = (Text(summary), Table(columns, stages), picture(timeline_figure(t), "timeline", caption), _workers_table(facts))
    return Section("time", "Time and use of the workers", blocks)


def _workers_table(facts: Facts) -> Table:
    spans = facts.timeline.spans if facts.timeline is not None else ()
    stages, workers = (list(dict.fromkeys(x)) for x in ([s.stage for s in spans], [s.worker for s in spans]))
    busy = {(w, s): 0.0 for w in workers for s in stages}
    for span in spans:
        busy[span.worker, span.stage] += span.end - span.begin
    shown = stages[:_SHOWN]
    rows = [[w, *[duration(busy[w, s]) if busy[w, s] else "-" for s in shown]] for w in workers]
    title = f"Time with work per worker and stage ({plural(len(workers), 'worker')})"
    return Table(["worker", *shown], rows, title, folded=True)


def experts(facts: Facts) -> Section | None:
    if not _has_experts(facts):
        return None
    blocks: list[Block] = []
    caption = (
        "Calibration tokens routed to each expert, as multiples of a fair share of its layer. An expert with few tokens "
        "is calibrated on little of its own data."
    )
    for i, (name, counts) in enumerate(facts.experts.items()):
        blocks.append(picture(experts_figure(counts), f"experts{i}", caption if i == 0 else "", f"In the {name}"))
        low = [
            (tokens, layer, e, sum(c) / len(c))
            for layer, c in counts.items() for e, tokens in enumerate(c) if tokens * len(c) < STARVED * sum(c)
        ]  # fmt: skip
        total = sum(len(c) for c in counts.values())
        text = f"{len(low)} of {total} experts got less than {100 * STARVED:.0f} % of a fair share."
        blocks.append(Text(text, bad=bool(low)))
        if low:
            fewest = sorted(low)[:_SHOWN]
            rows = [[f"{layer}", f"{e}", f"{tokens}", f"{fair:.0f}"] for tokens, layer, e, fair in fewest]
            title = f"Fewest tokens ({len(rows)} of {len(low)})"
            blocks.append(Table(["layer", "expert", "tokens", "fair share"], rows, title, folded=True))
    return Section("experts", "Expert coverage", tuple(blocks))


def _has_experts(facts: Facts) -> bool:
    return bool(facts.experts)


def _complete(b: Bitrate) -> bool:
    """Whether all modules are quantised: the head, which has no layer, comes last."""
    return any(m.layer is None for m in b.chain.modules) and len(b.chain.modules) >= b.modules


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def moment_text(stamp: str) -> str:
    """A time stamp of the work directory for people: to the second."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?Z", stamp)
    return f"{found[1]} {found[2]} UTC" if found else stamp


def _increase(after: float | None, before: float | None) -> str:
    return "-" if after is None or not before else f"{100 * (after / before - 1):+.2f} %"
