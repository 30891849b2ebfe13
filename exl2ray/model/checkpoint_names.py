"""What a checkpoint calls its tensors, and whether it has all of them: names, layers, shards that are missing."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.hfconfig import config_value
from exl2ray.formats.source.model_shards import INDEX, gaps
from exl2ray.model.rules import Arch, Names
from exl2ray.wording import some

Layout = tuple[tuple[str, str], ...]  # (start of a name in the table, what stands there), first match applies
# Keys for layers that are stored after the others and predict further tokens; loaders leave them out.
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
HEADS = ("lm_head", "output", "embed_out", "output_layer")  # what a head is called, in other places or families
FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)(\.weight)?$")  # of all experts of a layer
FUSED = re.compile(r"\.(qkv_proj|gate_up_proj)\.(weight|bias)$")
PARTS = re.compile(r"\.([qkv]|gate|up)_proj\.(weight|bias)$")
INCOMPLETE = "the weights do not fit config.json, or are incomplete"


def relocated(name: str, layout: Layout) -> str:
    for start, actual in layout:
        if name.startswith(start):
            return actual + name[len(start) :]
    return name


def names_in(arch: Arch, source: SourceModel, tied: bool) -> Names:
    """The source names of ``arch`` as this checkpoint spells them.

    Its known layouts, else whatever stands before the first layer's norm: ``model.`` may be missing or doubled, or come after
    the name of a larger model. ``tied``: an embedding that is not stored is read from the head. Raises SourceError if no
    tensor looks like those of ``arch``.
    """
    tried = []
    for layout in arch.source_layouts or ((("", arch.prefix),),):
        names = _at(arch.source, layout)
        tried.append(f"{names.embed}.weight")
        if tried[-1] in source:
            return _with_head(arch, names, source) if arch.source_layouts else names
    stored = set(source.names())
    root = arch.source.embed[: arch.source.embed.rfind(".") + 1]
    first = f"{arch.source.attn_norm.format(L=0)}.weight".removeprefix(root)
    roots = _roots(stored, first) or _roots(source.absent, first)  # what an index alone names may be another model's
    if not roots:
        raise SourceError(
            f"{source.path}: no tensor {' or '.join(tried)}; the weights have {_some(source.names())}",
            f"the weights are not those of a {arch.name}, which config.json names",
        )
    if len(roots) > 1:
        raise SourceError(
            f"{source.path}: weights of {len(roots)} models, under {' and '.join(repr(r) for r in roots[:3])}",
            "leave the tensors of one of them in the folder",
        )
    names = _at(arch.source, (*_head(arch, roots[0], stored), (root, roots[0])))
    if tied and f"{names.embed}.weight" not in stored and f"{names.head}.weight" in stored:
        names = replace(names, embed=names.head)
    return names


def _roots(names: Iterable[str], end: str) -> list[str]:
    """What stands before ``end`` in the names that end in it."""
    return sorted({n[: -len(end)] for n in names if n == end or n.endswith("." + end)})


def _head(arch: Arch, root: str, stored: Iterable[str]) -> Layout:
    """Where the head is: beside the rest of the model, or further out."""
    parts = root.split(".")[:-1]
    places = [".".join(parts[:n]) + "." if n else "" for n in range(len(parts) + 1)]
    head = arch.source.head
    found = next((p for p in places if f"{p}{head}.weight" in stored), places[max(0, len(places) - 2)])
    return ((head, found + head),)


def _with_head(arch: Arch, names: Names, source: SourceModel) -> Names:
    """With the head where it is, if it is not where the layout of the rest has it."""
    if f"{names.head}.weight" in source:
        return names
    ((_, head),) = _head(arch, names.embed[: names.embed.rfind(".") + 1], source.names())
    return replace(names, head=head) if f"{head}.weight" in source else names


def _at(names: Names, layout: Layout) -> Names:
    return Names(**{k: v and relocated(v, layout) for k, v in vars(names).items()})


def _some(names: list[str]) -> str:
    return f"{names[0]}, {names[-1]}" if len(names) > 1 else ", ".join(names) or "no tensors"


@dataclass(frozen=True)
class Layers:
    """Decoder layers. ``start``: of their tensors' names; ``stored``: how many there are; ``configured``: of config.json;
    ``further``: of MTP, which may follow.
    """

    start: str
    stored: int
    configured: int
    further: int = 0

    def number(self, name: str) -> int:
        """The layer of a tensor; -1 if it is of none."""
        digits = name[len(self.start) :].partition(".")[0] if name.startswith(self.start) else ""
        return int(digits) if digits.isdigit() and len(digits) < 9 else -1

    @property
    def missing(self) -> bool:
        return 0 < self.stored < self.configured

    @property
    def surplus(self) -> str:
        """A warning, or nothing."""
        if self.stored <= self.configured + self.further:
            return ""
        return (
            f"the weights have {self.stored} layers, config.json says {self.configured}: those from {self.configured} on are "
            "left out, as transformers does; for a model of all its layers set num_hidden_layers"
        )


def count_layers(arch: Arch, source: SourceModel, configured: int) -> Layers:
    """``arch``: with the names of this checkpoint."""
    layers = Layers(arch.source.attn_norm.partition("{L}")[0], 0, configured)
    numbers = {layers.number(n) for n in (*source.names(), *source.absent)} - {-1}
    text = source.config.get("text_config")
    levels: list[Mapping[str, Any]] = [source.config, text] if isinstance(text, Mapping) else [source.config]
    further = next((v for c in levels for k in MTP_KEYS if type(v := c.get(k)) is int), 0)
    return replace(layers, stored=len(numbers), further=further)


def incomplete(source: SourceModel) -> SourceError | None:
    """An error if files of the model are missing, by its index or by the numbers in their names."""
    lost = sorted({*source.absent.values()}) or gaps(list(source.files))
    if not lost:
        return None
    return SourceError(
        f"{source.path}: {some(f[:80] for f in lost)} {'is' if len(lost) == 1 else 'are'} missing",
        _where_they_are(source, lost),
    )


def _where_they_are(source: SourceModel, lost: Sequence[str]) -> str:
    """What to do about files that an index names and that do not lie beside it."""
    below = [f for f in lost if "/" in f and ".." not in f and not f.startswith("/") and os.path.isfile(source.path / f)]
    if below:
        return f"move what is in {posixpath.dirname(below[0])[:80]}/ beside config.json: files in folders below are not read"
    return "the download is incomplete: fetch the missing shards"


def missing_tensors(
    arch: Arch, source: SourceModel, names: list[str], layers: Layers, tied: bool
) -> dict[str, str]:
    """What is wrong -> hint, for tensors that the model needs and the folder lacks: as few sentences as say it."""
    found: dict[str, str] = {}
    files = sorted({source.absent[n] for n in names if n in source.absent})
    if files:
        count = sum(n in source.absent for n in names)
        verb = "is" if len(files) == 1 else "are"
        text = f"{INDEX} names {some(f[:80] for f in files)}, which {verb} missing"
        found[f"{text}, for {count} tensors"] = _where_they_are(source, files)
    names = [n for n in names if n not in source.absent]
    lost = gaps(list(source.files))
    hint = f"the download is incomplete: fetch {lost[0]}" if lost else INCOMPLETE
    if layers.missing and names and not lost:
        whole = [n for n in names if layers.number(n) >= layers.stored]
        if whole:
            found[f"the weights have {layers.stored} layers, config.json says {layers.configured}"] = (
                "set num_hidden_layers in config.json to the layers of these weights, or fetch the weights that are missing"
            )
            names = [n for n in names if n not in whole]
    fused = [n for n in source.names() if FUSED_EXPERTS.search(n)] if arch.moe and not arch.experts_fused and names else []
    if fused and (files or lost):  # half of a layer, whose other half is in a file that is not there
        names = [n for n in names if layers.number(n) < 0]
        if lost and not files:
            found[f"{some(lost)} {'is' if len(lost) == 1 else 'are'} missing"] = hint
    elif fused:
        found[f"the experts of a layer are stored as one tensor, {fused[0]}, and not as transformers 5 stores that"] = (
            "load the model there, and write it with save_pretrained(NEW, save_original_format=True)"
        )
        names = [n for n in names if layers.number(n) < 0]
    fused = [n for n in source.names() if FUSED.search(n)] if names else []
    if fused and any(PARTS.search(n) for n in names):
        found[f"linears of a layer are stored as one tensor, {fused[0]}, as programs hold them that run a model"] = (
            "fetch the model's own weights, or write it with save_pretrained of transformers"
        )
        names = [n for n in names if not PARTS.search(n)]
    for name in names:
        head = name == f"{arch.source.head}.weight" and not tied and not lost
        found[f"{name} is missing"] = _headless(source, name) if head else hint if lost else _other_form(source, name) or hint
    return found


def _other_form(source: SourceModel, name: str) -> str:
    """What to do about a tensor whose layer is stored in another form, or which config.json alone asks for; else nothing."""
    layer, _, what = name.rpartition(".")
    key = "mlp_bias" if ".mlp." in name else "attention_bias"
    if what == "bias" and f"{layer}.weight" in source and config_value(source.config, key) is True:
        return f'if the model has no such biases, set "{key}": false in config.json'
    inside = [n.removeprefix(f"{layer}.") for n in source.names() if n.startswith(f"{layer}.") and not n.endswith(".bias")]
    if what != "weight" or not inside:
        return ""
    return (
        f"{layer} has {some(inside, 3)} instead: training changed the layer (pruning, weight norm, an adapter); undo that "
        "in the program that did it (prune.remove, remove_parametrizations, a merge) and save the model again"
    )


def _headless(source: SourceModel, name: str) -> str:
    if any(n.split(".")[-2:-1] in (["score"], ["classifier"], ["v_head"]) for n in source.names()):
        return "the model has a head that gives scores, not one for words: convert the language model that it was made from"
    rows = source.config.get("vocab_size")
    alike = [n for n in source.names() if n.split(".")[-2:-1] and n.split(".")[-2] in HEADS and n.endswith(".weight")]
    alike = [n for n in alike if len(source.shape(n)) == 2 and (type(rows) is not int or source.shape(n)[0] == rows)]
    if alike:
        return f"{alike[0]} looks like the head: if it is, rename it to {name}"
    return f'if the head shares the embedding, set "tie_word_embeddings": true in config.json; else {name} was lost'
