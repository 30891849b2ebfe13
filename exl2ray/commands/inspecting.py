"""``exl2ray inspect`` and ``exl2ray verify``: what is in an EXL2 directory, and whether it is sound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from exl2ray.evaluate.soundness import problems_of
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.summary import DirectorySummary, LinearSummary, mean_bpw
from exl2ray.formats.verify_rules import Problem
from exl2ray.model.arch import load_spec
from exl2ray.remote.source import local
from exl2ray.terminal.console import show_text
from exl2ray.terminal.live import show_table
from exl2ray.wording import file_size, plural

MOST_SHOWN = 1000  # problems of one directory

def inspect_json(d: DirectorySummary) -> dict[str, Any]:
    """The summary of a directory as JSON values."""
    return {
        "path": d.path,
        "architecture": d.architecture,
        "settings": d.settings,
        "decoder_bpw": d.decoder_bpw,
        "head_bpw": d.head_bpw,
        "file_bpw": d.file_bpw,
        "layers": [{"layer": i, "bpw": bpw} for i, bpw in d.layer_bpw().items()],
        "linears": [
            {
                "key": x.key,
                "layer": x.layer,
                "in_features": x.in_features,
                "out_features": x.out_features,
                "bpw": x.bits_per_weight,
                "bytes": x.nbytes,
                "layout": x.layout,
                "has_bias": x.has_bias,
            }
            for x in d.linears
        ],
        "plain_tensors": d.plain_tensors,
        "plain_bytes": d.plain_bytes,
        "files": d.files,
        "total_bytes": d.total_bytes,
    }


def show_inspect(d: DirectorySummary, every_linear: bool) -> None:
    """Prints sizes, settings and bits per weight; ``every_linear``: of each linear, else of each layer."""
    show_text(f"{d.path}: {d.architecture}, {file_size(d.total_bytes)} in {plural(len(d.files), 'file')}")
    head = f"{d.head_bpw:.4f}" if d.head_bpw else "not quantised"
    show_text(f"decoder {d.decoder_bpw:.4f} bits per weight, head {head}, whole file {d.file_bpw:.4f}")
    quantised = f"{plural(len(d.linears), 'quantised linear')} {file_size(sum(x.nbytes for x in d.linears))}"
    show_text(f"{quantised}, {plural(d.plain_tensors, 'other tensor')} {file_size(d.plain_bytes)}")
    settings = [[key, value] for key, value in _flat(d.settings)]
    show_table("\nsettings", ["name", "value"], settings)
    if every_linear:
        rows = [[x.key, f"{x.in_features} x {x.out_features}", _bpw(x), file_size(x.nbytes), x.layout] for x in d.linears]
        show_table("\nlinears", ["linear", "in x out", "bpw", "size", "rows x width/group size"], rows)
    else:
        show_table("\nbits per weight", *_layers(d))


def _layers(d: DirectorySummary) -> tuple[list[str], list[list[str]]]:
    """A row per layer, a column per kind of linear; the experts of a layer share one."""
    kinds = list(dict.fromkeys(_kind(x) for x in d.linears if x.layer is not None))
    rows = []
    for layer, bpw in d.layer_bpw().items():
        linears = [x for x in d.linears if x.layer == layer]
        size = file_size(sum(x.nbytes for x in linears))
        cells = [_mean([x for x in linears if _kind(x) == kind]) for kind in kinds]
        rows.append([str(layer), f"{bpw:.3f}", size, *cells])
    for x in d.linears:
        if x.layer is None:
            rows.append([x.key, _bpw(x), file_size(x.nbytes), *["" for _ in kinds]])
    return ["layer", "bpw", "size", *kinds], rows


def _kind(linear: LinearSummary) -> str:
    return linear.key.rsplit(".", 1)[-1].removesuffix("_proj")


def _bpw(linear: LinearSummary) -> str:
    return f"{linear.bits_per_weight:.3f}"


def _mean(linears: list[LinearSummary]) -> str:
    return f"{mean_bpw(linears):.3f}" if linears else "-"


def _flat(settings: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def verify(path: str, in_dir: str | None) -> list[Problem]:
    """Problems of the directory; with ``in_dir`` also where it differs from the shapes of its source model."""
    expected = None
    if in_dir is not None:
        linears = load_spec(SourceModel(local(in_dir))).linears
        expected = {x.key: LinearShape(x.in_features, x.out_features, x.has_bias) for x in linears}
    return problems_of(path, expected)


def show_verify(path: str, problems: list[Problem]) -> None:
    """Prints a problem on each line, and the verdict."""
    for p in problems[:MOST_SHOWN]:
        show_text(str(p))
    if len(problems) > MOST_SHOWN:
        print(f"... and {len(problems) - MOST_SHOWN} more; --json shows them all")
    show_text(f"{path}: {plural(len(problems), 'problem')}" if problems else f"{path}: sound")
