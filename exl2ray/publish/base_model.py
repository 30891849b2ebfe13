"""What a card says about where a model comes from: the base model, the original card, and the command that made it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exl2ray.formats.elsewhere import mount_at
from exl2ray.formats.hub_names import is_repository
from exl2ray.formats.links import outside
from exl2ray.publish.file_kinds import CARD
from exl2ray.publish.frontmatter import Value, read_fields, split_card
from exl2ray.recipe import SETTINGS, USUAL_HEAD_BITS, Recipe, place_name
from exl2ray.terminal.console import clean

MAX_CARD_BYTES = 1 << 20
KEPT_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Tags that name a library or a format of the original files, which a quantised model is not for.
NOT_TAGS = {"transformers", "pytorch", "safetensors", "tf", "jax", "onnx", "gguf", "gptq", "awq", "endpoints_compatible"}
MAX_VALUE = 200  # characters of a kept value

CACHE_FOLDER = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")
ADDRESS = re.compile(r"hf://(?P<id>[^/@]+/[^/@]+)")
GIT_REMOTE = re.compile(
    r"^[ \t]*url[ \t]*=[ \t]*\S*?\b(?:huggingface\.co|hf\.co)[/:](?P<id>[^/\s]{1,96}/[^/\s]{1,96}?)(?:\.git)?/?[ \t\r]*$",
    re.MULTILINE,
)  # linear in what it reads: these files come with a model


@dataclass(frozen=True)
class OriginalCard:
    """Of the source model. fields: those of its YAML block that are kept. text: the card without the block."""

    fields: tuple[tuple[str, Value], ...] = ()
    tags: tuple[str, ...] = ()
    text: str = ""


NO_CARD = OriginalCard()


def original_card(card: str) -> OriginalCard:
    """What is kept of a card."""
    block, body = split_card(card)
    found = {name: value for name, value in read_fields(block).items() if _reasonable(value)}
    tags = found.get("tags", [])
    own = [t for t in ([tags] if isinstance(tags, str) else tags) if t.lower() not in NOT_TAGS]
    kept = tuple((name, found[name]) for name in KEPT_FIELDS if name in found)
    return OriginalCard(kept, tuple(own), body.strip())


def read_original(in_dir: str | Path) -> OriginalCard:
    """The card of a source model; an empty one where there is none, or none that could be a text.

    Never raises: a card is no reason to lose a conversion.
    """
    try:
        path = Path(in_dir) / CARD
        if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES or outside(path, Path(in_dir)):
            return NO_CARD
        return original_card(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return NO_CARD


def _reasonable(value: Value) -> bool:
    return all(0 < len(v) <= MAX_VALUE and v.isprintable() for v in ([value] if isinstance(value, str) else value))


def base_model_of(in_dir: str | Path) -> str | None:
    """owner/name of a source model that the Hub's cache holds, or that was cloned from the Hub; else None.

    ``_name_or_path`` in config.json is no help: for a fine-tune it often names the model that was tuned.
    """
    mount = mount_at(in_dir)
    if mount is not None:  # its address is the place that it was read from
        found = ADDRESS.match(mount.address)
        return found["id"] if found else None
    path = Path(in_dir).absolute()
    for part in (*path.parts, *path.resolve().parts):
        found = CACHE_FOLDER.fullmatch(part)
        if found and is_repository(f"{found['owner']}/{found['name']}"):
            return f"{found['owner']}/{found['name']}"
    try:
        config = path / ".git" / "config"
        text = config.read_text(encoding="utf-8", errors="replace") if config.stat().st_size <= 1 << 16 else ""
    except OSError:
        return None
    remote = GIT_REMOTE.search(text)
    return remote["id"] if remote and is_repository(remote["id"]) else None


# ---- how it was made ------------------------------------------------------------------------------------------------

# Parts of a job that a card says elsewhere, or that are names of places on one machine.
ELSEWHERE = ("in_dir", "bits", "compile_full")
SHOWN = ("propagate", "objective", "damping", "measurement_length", "seed")  # also where they have their defaults


def command(recipe: Recipe, bits: float, base_model: str | None, patches: Sequence[str] = ()) -> str:
    """The command that makes the same model again; paths are reduced to names, so it is the same on every machine.

    ``patches``: texts of --set that ``exl2ray patch`` applied afterwards, which makes a second command.
    """
    model = base_model.partition("/")[2] if base_model else "MODEL"
    words = ["exl2ray", "convert", "-i", model, "-o", "work", "-b", f"{bits:g}", "-cf", "out"]
    for name, value in _changed(recipe).items():
        words += _flag(name, value)
    lines = [shlex.join(words)]
    if patches:
        lines.append(shlex.join(["exl2ray", "patch", "-o", "work", *_flag("overrides", tuple(patches)), "-cf", "patched"]))
    return "\n".join(lines)


def settings(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """(flag, value) of the settings that results depend on: the changed ones, and some that are worth knowing anyway."""
    names = [*SHOWN, *(name for name in _changed(recipe) if name not in SHOWN)]
    hidden = {"head_bits", "cal_dataset", "length", "dataset_rows", "shard_size"}  # the card has them in words
    if recipe.measurement is not None:
        hidden |= {"measurement_length", "measurement_rows"}
    if recipe.objective == "norm":
        names.insert(names.index("objective") + 1, "objective_power")
    out = []
    for name in dict.fromkeys(names):
        if name not in hidden:
            value = _shown(name, getattr(recipe, name))
            out.append((SETTINGS[name].long, _text(value)))
    return tuple(out)


def quality_text(recipe: Recipe) -> str:
    """What --quality and the flags of its parts did, in a sentence."""
    done = [recipe.numerics.describe() or "the plain algorithm, GPTQ with error feedback"]
    by = {"linear": "bits per linear, by its effect on the model", "module": "bits per module, by its error"}
    return f"`--quality {recipe.quality}`: {'; '.join([*done, by[recipe.allocates]])}."


def _changed(recipe: Recipe) -> dict[str, Any]:
    """Fields of a job that differ from their defaults, in the order of ``Recipe``; the same for the recipe of a command line
    and for the one that a resume has from the job, which says in full what was left out there.
    """
    if recipe.allocates != "linear" and recipe.head_bits == USUAL_HEAD_BITS:
        recipe = replace(recipe, head_bits=None)
    if recipe.cal_dataset is None:  # numbers of rows are of -c only, and a job does not keep them otherwise
        recipe = replace(recipe, dataset_rows=Recipe.dataset_rows, measurement_rows=Recipe.measurement_rows)
    out = {}
    for name, about in SETTINGS.items():
        value = getattr(recipe, name)
        if (about.job or name == "cal_dataset") and name not in ELSEWHERE and value != about.default:
            out[name] = _shown(name, value)
    return out


def _shown(name: str, value: Any) -> Any:
    if name in ("cal_dataset", "tune_text") and value is not None:
        return tuple(map(place_name, (value,) if isinstance(value, str) else value))
    if name == "measurement" and value is not None:
        return "measurement.json"  # by whatever name or link it was given: a resume knows the file, not how it was called
    return Path(value).name if SETTINGS[name].metavar == "FILE" and value is not None else value


def _flag(name: str, value: Any) -> list[str]:
    """Words of a command line: a flag and its value, several of them for a tuple."""
    flag, negative = SETTINGS[name].flag, SETTINGS[name].negative
    if isinstance(value, bool):
        return [flag if value or not negative else negative]
    values = value if isinstance(value, tuple) else (value,)
    return [word for v in values for word in (flag, _text(v))]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else clean(str(value))  # a name with a line end would end the block
