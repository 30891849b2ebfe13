"""From facts to the page: what each section says, for the template ``page.html``, which escapes whatever it is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from exl2ray.evaluate.record import TAIL, TAIL_NAMES, Evaluation, Figure, judged
from exl2ray.recipe import JOB_FLAGS, RUN
from exl2ray.report import figures
from exl2ray.report.chains import ModuleResult
from exl2ray.report.facts import Bitrate, Facts
from exl2ray.report.ladder import ladder_plots
from exl2ray.report.style import svg_uris
from exl2ray.report.time_spent import busy_share
from exl2ray.report.tuned import Tuning
from exl2ray.terminal.console import clean, is_numeric
from exl2ray.wording import duration, file_size, nats, perplexity, plural, some, some_lines

TITLES = {
    "summary": "Summary", "warnings": "Warnings that concern the result", "quality": "Perplexity and KL divergence",
    "allocation": "Chosen bits by layer and projection", "curves": "Error over bits, measured",
    "chain": "Error of the quantised modules", "experts": "Expert coverage", "time": "Time and use of the workers",
    "notes": "Notes", "settings": "Settings and versions",
}  # fmt: skip
STARVED = figures.COVERAGE_STEPS[0]  # of a fair share; below it, conversions warn
_SHOWN, _MAX_NOTES, _MAX_PLACES = 12, 60, 4  # rows of tables that could grow with the model; notes; places of a note
_TITLE = re.compile(rb"<!doctype html>\n<html.*<title>[^<]* in EXL2</title>", re.DOTALL)
_PATH = re.compile(r"(?<![\w:/.~-])~?/(?:[^\s/'\",;:()]+/)+([^\s/'\",;:()]+)/?")


def render(facts: Facts, show_paths: bool = False) -> tuple[str, tuple[str, ...]]:
    """(HTML, names of its sections); sections for which there is nothing are left out.

    Every text is escaped, and what cannot be printed is spelled out. Without ``show_paths``, folders of this machine are
    reduced to their names.
    """
    found = {
        "summary": _summary(facts), "warnings": some_lines(facts.warnings, _MAX_NOTES), "quality": _quality(facts),
        "allocation": _allocation(facts), "curves": figures.curves_plots(facts.curves), "chain": _chain(facts),
        "experts": _experts(facts), "time": _time(facts), "notes": _notes(facts), "settings": _settings(facts),
    }  # fmt: skip
    names = tuple(name for name in TITLES if found[name])
    hide = _hider(facts) if not show_paths else lambda text: text

    def printable(value: Any) -> Any:
        return clean(hide(value)) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=printable, trim_blocks=True)
    # The only texts that reach the page as they are: pictures in base64.
    environment.filters.update(uris=lambda plot: {k: Markup(v) for k, v in svg_uris(plot).items()}, numeric=_numeric)
    source = files("exl2ray.report").joinpath("page.html").read_text(encoding="utf-8")
    identity = facts.job.job.get("identity", {}) if facts.job is not None else {}
    name = PurePath(str(identity.get("in_dir") or facts.root)).name
    html = environment.from_string(source).render(
        name=name, architecture=identity.get("architecture"), root=facts.root, titles={n: TITLES[n] for n in names}, **found
    )
    return html.lstrip(), names


def is_page(content: bytes) -> bool:
    """Whether ``content`` is a page that `render` made."""
    return _TITLE.match(content[:4096]) is not None


def _hider(facts: Facts) -> Any:
    """A function that leaves only the last part of absolute paths: those of the job exactly, others by their form."""
    settings = facts.job.job.values() if facts.job is not None else ()
    given = [str(v) for s in settings for v in s.values() if str(v).startswith("/")]
    evaluations = (*facts.evaluations, *facts.earlier)
    given += [b.directory for b in facts.bitrates] + [x for e in evaluations for x in (e.model, e.reference)]
    known = sorted({p for p in [facts.root, *given] if p.startswith("/") and p.strip("/")}, key=len, reverse=True)

    def hide(text: str) -> str:
        for path in known if "/" in text else ():
            text = text.replace(path, PurePath(path).name)
        return _PATH.sub(r"\1", text)

    return hide


def _numeric(rows: Sequence[Sequence[str]]) -> set[int]:
    """Columns of numbers: aligned to the right."""
    columns = zip(*rows, strict=True)
    return {i for i, cells in enumerate(columns) if is_numeric(cells) and any(c not in ("", "-") for c in cells)}


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


# ---- sections ---------------------------------------------------------------------------------------------------------


def _summary(facts: Facts) -> dict[str, Any]:
    measured = len({c.key for c in facts.curves})
    overrides = facts.job is not None and bool(facts.job.job.get("quantize", {}).get("overrides"))
    t = facts.timeline
    workers = len({s.worker for s in t.spans}) if t is not None else 0
    cost = "" if t is None or not t.spans else f"{duration(t.seconds)} of running on {plural(workers, 'worker')}"
    if t is not None and len(t.runs) > 1:
        cost += f", in {len(t.runs)} runs"
    return {
        "state": facts.state, "cost": cost, "cards": [_card(b, overrides) for b in facts.bitrates],
        "measured": f"{plural(measured, 'module')} measured" if measured else "nothing is measured",
    }  # fmt: skip


def _card(b: Bitrate, overrides: bool) -> dict[str, Any]:
    """The first thing to know of one bitrate: good or not, how large, where the bits are. overrides: whether --set was."""
    e, done = b.evaluation, len(b.chain.modules)
    note = word = ""
    if e is not None:
        word, sentence = judged(e.perplexity.value, *(f.value if f else None for f in (e.reference_perplexity, e.kl, e.top1)))
    elif not b.complete:
        sentence = f"Not finished: {done} of {b.modules or '?'} modules are quantised."
    elif b.chain.perplexity is None:
        sentence = "Its perplexity on calibration rows is not a finite number, or not known."
    else:
        word, sentence = judged(b.chain.perplexity, b.chain.reference_perplexity, None)
        note = "Judged by calibration rows alone, which is a rough measure; exl2ray eval has a better one, see below."
    if b.was_evaluated:
        note = f"Written again since its evaluation, by a patch for one: that is left out here. {note}".rstrip()
    if b.untuned:
        note = f"Only solved so far: --tune is still to come, with the same command again. {note}".rstrip()
    elif b.tuning is not None and e is None and word:
        note = f"This is of the model before it was tuned. {note}".rstrip()
    bits = [(n, v) for n, v in (("decoder", b.decoder_bpw), ("head", b.head_bpw), ("whole file", e and e.file_bpw)) if v]
    spare = b.decoder_bpw is not None and b.decoder_bpw > b.bits + 0.02 and not overrides
    return {
        "asked": f"{b.bits:g}", "word": word, "sentence": sentence, "note": note,
        "size": file_size(b.file_bytes) if b.file_bytes else "",
        "tensors": file_size(b.chain.nbytes) if b.chain.nbytes else "",
        "bits": [f"{name} {value:.2f}" for name, value in bits],
        "spare": "the head needs less than usual, the decoder got the rest: the size is as asked for" if spare else "",
        "tuned": "" if b.tuning is None else _gained(b.tuning), "directory": b.directory,
        "predicted": "" if b.predicted_kl is None else f"{b.predicted_kl:.2g} nats per token",
        "gap": f"{b.gap:.2%} from the optimum" if b.gap is not None and b.gap > 5e-4 else "",
    }  # fmt: skip


def _gained(t: Tuning) -> str:
    """What tuning brought, as `exl2ray tune` says it."""
    if t.kept == "nothing":
        why = f"worse on {', '.join(t.worse)}, so all was rolled back" if t.worse else "nothing gained"
        return f"{why}: the model is as it was, KL {nats(t.before)} nats on held-out text"
    share = f" ({t.after / t.before:.3f} times)" if t.before else ""
    return f"KL {nats(t.before)} -> {nats(t.after)} nats on held-out text{share}; kept: {t.kept}"


def _quality(facts: Facts) -> dict[str, Any] | None:
    """Perplexity and KL by bitrate, from an evaluation; of calibration rows from the conversion itself."""
    known = [
        [f"{b.bits:g}", perplexity(p), _number(r), "-" if not r else f"{p / r - 1:+.2%}"]
        for b in facts.bitrates if (p := b.chain.perplexity) is not None for r in [b.chain.reference_perplexity]
    ]  # fmt: skip
    if not (facts.evaluations or facts.earlier or facts.bitrates):
        return None
    out: dict[str, Any] = {"calibration": known, "plots": [], "warnings": [], "tables": [], "unbound": "", "earlier": None}
    if facts.evaluations:
        labels = [(_number(e.decoder_bpw, ".2f"), e) for e in facts.evaluations]
        out["plots"] = ladder_plots([m for m in labels if m[1].file_bytes])
        out["warnings"] = list(dict.fromkeys(w for e in facts.evaluations for w in e.warnings))
        out["tables"] = _evaluation_tables(facts.evaluations)
        unbound = [e.model for e in facts.evaluations if not e.weights and not e.is_gguf]
        if unbound:
            why = "An earlier version of exl2ray made these, and did not note of what state of the model"
            out["unbound"] = f"{why}: {some(unbound, 4)}."
        out["predictions"] = f"{facts.evaluations[0].predictions} predictions in {facts.evaluations[0].rows} rows"
    if facts.earlier:
        out["earlier"] = _evaluation_tables(facts.earlier)[0][1:]
    return out


def _evaluation_tables(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows)"""

    def percent(f: Figure | None) -> str:
        return "-" if f is None else f"{f.value:.2%}"

    columns = ["model", "decoder bpw", "head bpw", "file bpw", "size", "perplexity", "KL, nats", "top-1", "top-5"]
    rows = [
        [e.model, _number(e.decoder_bpw, ".3f"), _number(e.head_bpw, ".3f"), _number(e.file_bpw, ".3f"),
         file_size(e.file_bytes) if e.file_bytes else "-", f"{e.perplexity.value:.4f}",
         "-" if e.kl is None else e.kl.text(".5f"), percent(e.top1), percent(e.top5)]
        for e in evaluations
    ]  # fmt: skip
    first = evaluations[0]
    if first.reference_perplexity is not None:
        rows.append([f"{first.reference} (source)", *["-"] * 4, f"{first.reference_perplexity.value:.4f}", *["-"] * 3])
    used = [i for i, cells in enumerate(zip(*rows, strict=True)) if set(cells) != {"-"}]
    tables = [("", [columns[i] for i in used], [[row[i] for i in used] for row in rows])]
    tails = [[e.model, *[_number(f.value if (f := e.kl_tail.get(n)) else None, ".4f") for n in TAIL]]
             for e in evaluations if e.kl_tail]  # fmt: skip
    if tails:
        tables.append(("The tail: KL divergence of single tokens, nats", ["model", *[TAIL_NAMES[n] for n in TAIL]], tails))
    kinds = [[e.model, name, f"{k.predictions}", k.perplexity.text(".4g", ".2g"),
              k.kl.text(".5f") if k.kl else "-", f"{1 - k.top1.value:.1%}" if k.top1 else "-"]
             for e in evaluations for name, k in e.kinds.items()]  # fmt: skip
    if kinds:
        tables.append(("By kind of text", ["model", "text", "tokens", "perplexity", "KL, nats", "flipped top-1"], kinds))
    return tables


def _allocation(facts: Facts) -> dict[str, Any] | None:
    """A heat map per bitrate, all on one scale."""
    shown = [b for b in facts.bitrates if b.allocation.bpw]
    if not shown:
        return None
    values = [v for b in shown for v in b.allocation.bpw.values()]
    return {
        "plots": [figures.allocation_plot(b.bits, b.allocation, min(values), max(values)) for b in shown],
        "exact": all(b.allocation.exact for b in shown), "experts": bool(facts.experts),
        "partly": [f"At {b.bits:g} bits, {plural(len(b.chain.modules), 'module')} so far." for b in shown if not b.complete],
    }  # fmt: skip


def _chain(facts: Facts) -> dict[str, Any] | None:
    """Error of each module as quantised."""
    if not any(m.error is not None and m.layer is not None for b in facts.bitrates for m in b.chain.modules):
        return None
    by_key: dict[str, dict[float, ModuleResult]] = {}
    for b in facts.bitrates:
        for m in b.chain.modules:
            by_key.setdefault(m.key, {})[b.bits] = m
    rows = [
        [key, *[_number(found[b.bits].error if b.bits in found else None) for b in facts.bitrates]]
        for key, found in by_key.items() if any(m.error is not None for m in found.values())
    ]  # fmt: skip
    columns = ["module", *[f"at {b.bits:g}" for b in facts.bitrates]]
    return {"plots": figures.chain_plots([b.chain for b in facts.bitrates]), "columns": columns, "rows": rows}


def _experts(facts: Facts) -> list[dict[str, Any]]:
    out = []
    for name, counts in facts.experts.items():
        low = sorted(
            (tokens, layer, e, sum(c) / len(c))
            for layer, c in counts.items() for e, tokens in enumerate(c) if tokens * len(c) < STARVED * sum(c)
        )  # fmt: skip
        rows = [[f"{layer}", f"{e}", f"{tokens}", f"{fair:.0f}"] for tokens, layer, e, fair in low[:_SHOWN]]
        text = f"{len(low)} of {sum(len(c) for c in counts.values())} experts got less than {STARVED:.0%} of a fair share."
        out.append({"plot": figures.experts_plot(name, counts), "text": text, "low": len(low), "rows": rows})
    return out


def _time(facts: Facts) -> dict[str, Any] | None:
    t = facts.timeline
    if t is None or not t.spans:
        return None
    stages = [
        [s.name, f"{s.finished}", duration(s.wall_seconds), duration(s.worker_seconds), f"{s.workers}",
         _number(s.mean_busy, ".1f")]
        for s in t.stages
    ]  # fmt: skip
    names, workers = (list(dict.fromkeys(x)) for x in ([s.stage for s in t.spans], [s.worker for s in t.spans]))
    busy = {(w, s): 0.0 for w in workers for s in names}
    for span in t.spans:
        busy[span.worker, span.stage] += span.end - span.begin
    rows = [[w, *[duration(busy[w, s]) if busy[w, s] else "-" for s in names[:_SHOWN]]] for w in workers]
    share = busy_share(t)
    return {
        "running": f"{duration(t.seconds)} of running in {plural(len(t.runs) or 1, 'run')}",
        "span": f"from {_moment(t.started)} to {_moment(t.ended)}", "busy": "" if share is None else f"{share:.0%}",
        "stages": stages, "plot": figures.timeline_plot(t), "columns": ["worker", *names[:_SHOWN]], "workers": rows,
    }  # fmt: skip


def _notes(facts: Facts) -> dict[str, Any]:
    """What was degraded or damaged; a section that says so where there is nothing."""
    rows = []
    for n in facts.notes[:_MAX_NOTES]:
        rows.append([n.text, some(n.places, _MAX_PLACES), f"{n.count}"])
    return {"problems": some_lines(facts.problems, _MAX_NOTES), "rows": rows, "more": max(0, len(facts.notes) - _MAX_NOTES)}


def _settings(facts: Facts) -> dict[str, Any] | None:
    if facts.job is None:
        return None
    rows = [
        [section, name.replace("_", " "), JOB_FLAGS.get(f"{section}.{name}", ""),
         ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for section, settings in facts.job.job.items() for name, value in settings.items()
        if value is not None and name != RUN
    ]  # fmt: skip
    rows += [["version", name, "", str(version)] for name, version in facts.job.versions.items()]
    return {"created": _moment(facts.job.created), "rows": rows}


def _moment(stamp: str) -> str:
    """A time stamp of the work directory for people: to the second."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?Z", stamp)
    return f"{found[1]} {found[2]} UTC" if found else stamp
