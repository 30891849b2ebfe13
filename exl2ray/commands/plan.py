"""``exl2ray plan``: what a conversion will make, need and take, and everything that would stop it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from exl2ray.plan.compose import Report, Wishes, compose
from exl2ray.plan.fit import Fit
from exl2ray.plan.probe import ProbeResult
from exl2ray.plan.sizes import OutputSize
from exl2ray.recipe import USUAL_HEAD_BITS, Recipe
from exl2ray.terminal.console import aside, clean, is_terminal, show_text
from exl2ray.terminal.live import show_table
from exl2ray.wording import duration, file_size, plural

SHOWN_PROBLEMS = 30  # of one topic; --json has all
STAGES = {"measure": "measure", "sensitivity": "find sensitivities", "quantize": "quantise", "head": "quantise the head"}


def plan(recipe: Recipe, wishes: Wishes, bits_given: bool, notes: Sequence[str] = ()) -> Report:
    """See `exl2ray.plan.compose.compose`. What the probe is at goes to standard error. ``notes`` head its own."""
    report = compose(recipe, wishes, bits_given, aside)
    report.warnings[:0] = notes
    return report


def show(report: Report) -> None:
    """Prints a plan, section by section; what is not known is left out."""
    _show_model(report)
    if report.sizes:
        _show_sizes(report)
    if report.fit is not None:
        _show_fit(report.fit)
    if report.memory:
        _show_memory(report)
    if report.disks:
        _show_disks(report)
    if report.disks_not_examined is not None:
        show_text(report.disks_not_examined)
    if report.sizes:
        _show_times(report)
    _show_problems(report)


def plan_json(report: Report) -> dict[str, Any]:
    """Everything, with bytes and seconds as numbers."""
    fields = {k: v for k, v in vars(report).items() if k not in ("problems", "sizes", "times", "probe")}
    return {
        **fields,
        "sizes": [{**vars(s), "exact": s.exact} for s in report.sizes],
        "times": [{**vars(t), "least_seconds": t.least_seconds, "most_seconds": t.most_seconds} for t in report.times],
        "probe": None if report.probe is None else _probe_json(report.probe),
        "problems": [{"topic": t, "message": e.message, "hint": e.hint, "code": e.exit_code} for t, e in report.problems],
        "sound": not report.problems,
    }


def _probe_json(probe: ProbeResult) -> dict[str, Any]:
    items = [
        {
            "stage": p.timed.stage, "module": p.module, "rows": p.timed.rows, "tokens": p.timed.tokens,
            "seconds": p.timed.seconds, "first_seconds": p.first_seconds, "gpu_bytes": p.gpu_bytes,
        }
        for p in probe.items
    ]  # fmt: skip
    return {"items": items, "ram_bytes": probe.ram_bytes}


# ---- for people -------------------------------------------------------------------------------------------------------


def _show_model(report: Report) -> None:
    parts = [report.architecture or "model of an unknown kind"]
    if report.layers is not None:
        parts.append(plural(report.layers, "layer"))
    if report.weights is not None and report.source_bytes is not None:
        unit, count = ("billion", 1e9) if report.weights >= 1e9 else ("million", 1e6)
        parts.append(f"{report.weights / count:.3g} {unit} weights")
        parts.append(f"{file_size(report.source_bytes)} in {plural(report.source_files or 0, 'file')}")
    show_text(f"{report.model}: {', '.join(parts)}")
    if report.rows:
        verbs = {"measure": "to measure", "quantize": "to quantise"}
        rows = [f"{count} rows of {tokens} tokens {verbs[name]}" for name, (count, tokens) in report.rows.items()]
        show_text(f"calibration: {', '.join(rows)}")
    if report.reachable_bpw is not None:
        low, high = report.reachable_bpw
        show_text(f"reachable: {low:.4f} to {high:.4f} bits per weight of the decoder, scales and permutations included")


def _show_sizes(report: Report) -> None:
    rows = []
    for s in report.sizes:
        bpw = f"{s.achieved_bpw:.4f}" if s.achieved_bpw is not None else "free" if _shared(s) else f"<= {s.bits:g}"
        size = f"{s.high_bytes:,}" if s.exact else f"{s.low_bytes:,} to {s.high_bytes:,}"
        held = "free" if s.held_bpw is None else f"{s.held_bpw[0]:.2f} to {s.held_bpw[1]:.2f}"
        head = held if s.head_bpw is None else f"{s.head_bpw:.4f}"
        files = str(len(s.files)) if s.exact else "-"
        rows.append([f"{s.bits:g}", bpw, head, _file_bpw(report, s), size, file_size(s.high_bytes), files])
    _heading("output")
    show_table("", ["-b", "decoder bpw", "head bpw", "file bpw", "bytes of the weights", "about", "files"], rows)
    note = f"{report.other_bytes or 0:,} bytes of tokenizer and other files are copied beside them; config.json is written"
    if any(not s.exact for s in report.sizes):
        note = "the allocation decides where between: exact with a measurement (-m). " + note
    if any(map(_shared, report.sizes)):
        note = f"decoder and head share what -b and a head of -hb bits ({USUAL_HEAD_BITS} if absent) come to; " + note
    show_text(note)


def _shared(size: OutputSize) -> bool:
    return size.achieved_bpw is None and size.head_bpw is None


def _file_bpw(report: Report, size: OutputSize) -> str:
    """Bits of the files per weight of the model, embedding included."""
    low, high = (f"{8 * n / report.weights:.2f}" if report.weights else "?" for n in (size.low_bytes, size.high_bytes))
    return low if low == high else f"{low} to {high}"


def _show_fit(fit: Fit) -> None:
    _heading(f"fit into {file_size(fit.memory_bytes)}")
    cache = f"{fit.cache} cache of {fit.context:,} tokens"
    rows = [
        ["weights on the GPU", file_size(fit.weight_bytes), "all but the embedding table"],
        [cache, file_size(fit.cache_bytes), "keys and values of all layers"],
        ["allowance", file_size(fit.allowance_bytes), "a formula: CUDA 0.5 GB, one decoded linear, a chunk of 2048 tokens"],
        ["left", file_size(max(0, fit.free_bytes - fit.weight_bytes)), ""],
    ]
    show_table("", ["what", "bytes", "how"], rows)
    if fit.bits is not None:
        host = file_size(fit.host_bytes)
        show_text(f"largest bitrate that fits: -b {fit.bits:g}; {host} of embeddings stay in main memory")
    if fit.windowed_cache_bytes < fit.cache_bytes:
        show_text(
            "sliding layers count with the whole context, as ExLlamaV2 keeps it; a runtime that keeps only their windows "
            f"needs {file_size(fit.windowed_cache_bytes)} for the cache"
        )


def _show_memory(report: Report) -> None:
    rows = []
    for device in report.memory:
        for i, p in enumerate(device.peaks):
            gpu = "-" if p.gpu_bytes is None else file_size(p.gpu_bytes)
            rows.append([device.device if i == 0 else "", STAGES[p.stage], gpu, file_size(p.ram_bytes), "; ".join(p.notes)])
    columns = ["on", "to", "GPU", "main", "because"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    _heading("memory of one worker (estimated peaks)")
    show_table("", columns, rows)
    show_text(f"this machine has {file_size(report.main_memory_bytes)} of main memory")


def _show_disks(report: Report) -> None:
    rows = []
    for need in report.disks:
        free = "not known" if need.free_bytes is None else file_size(need.free_bytes)
        rows.append([need.what, file_size(need.least_bytes), file_size(need.bytes), free, need.path])
    _heading("disk, still to be written")
    show_table("", ["what", "at least", "at most", "free", "where"], rows)


def _show_times(report: Report) -> None:
    for times in report.times:
        same = times.least_seconds == times.most_seconds
        rows = []
        for s in times.stages:
            text = duration(s.least_seconds)
            if s.least_seconds != s.most_seconds:
                text += f" to {duration(s.most_seconds)}"
            rows.append([s.stage, str(s.modules or "-"), text])
        total = duration(times.least_seconds)
        total = total if same else f"{total} to {duration(times.most_seconds)}"
        rows.append(["total", "", total])
        _heading(f"time on one {times.device} (estimate)" if times.device != "CPU" else "time on this CPU (estimate)")
        show_table("", ["pass", "modules", "time"], rows)
        show_text(f"basis: {times.basis}. Several GPUs: docs/scaling.md")
    if report.probe is not None:
        _show_probe(report.probe)
        return
    if not report.times:
        _heading("time")
    which = "other devices" if report.times else "CPUs"
    show_text(f"no figures are known for {which}; --probe times the largest layer and the head on this machine")


def _show_probe(probe: ProbeResult) -> None:
    rows = []
    for p in probe.items:
        gpu = "-" if p.gpu_bytes is None else file_size(p.gpu_bytes)
        size = f"{p.timed.rows} x {p.timed.tokens}"
        rows.append([STAGES[p.timed.stage], p.module, size, duration(p.timed.seconds), duration(p.first_seconds), gpu])
    _heading("probe")
    show_table("", ["to", "module", "rows", "time", "first time", "GPU"], rows)
    show_text(f"main memory of this process at its highest: {file_size(probe.ram_bytes)}")


def _show_problems(report: Report) -> None:
    if report.warnings:
        _heading("warnings and notes")
        for text in report.warnings:
            show_text(text, "- ")
    if not report.problems:
        _heading("no problem found: `exl2ray convert` with the same flags can start")
        return
    count = len(report.problems)
    _heading(plural(count, "problem"))
    shown: dict[str, int] = {}
    for number, (topic, error) in enumerate(report.problems, 1):
        shown[topic] = shown.get(topic, 0) + 1
        if shown[topic] > SHOWN_PROBLEMS:
            continue
        first, *rest = error.lines
        show_text(f"{topic}: {first}", f"{number}. ")
        for line in rest:
            show_text(line.strip(), "   ")
        last = number == count or report.problems[number][1].hint != error.hint
        if error.hint and (last or shown[topic] == SHOWN_PROBLEMS):
            show_text(error.hint, "   -> ")
    for topic, n in shown.items():
        if n > SHOWN_PROBLEMS:
            show_text(f"and {n - SHOWN_PROBLEMS} more of {topic}; --json lists all")


def _heading(text: str) -> None:
    print()
    bold = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    print(f"\033[1m{clean(text)}\033[0m" if bold else clean(text))
