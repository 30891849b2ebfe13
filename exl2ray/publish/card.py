"""The model card: README.md of an output directory, with the YAML block that the Hugging Face Hub expects.

A card is a function of plain facts, without dates, times or places, so a conversion repeated writes the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl2ray import __version__
from exl2ray.evaluate.record import Evaluation
from exl2ray.formats.files import atomic_file
from exl2ray.formats.summary import DirectorySummary
from exl2ray.publish.figures import evaluation_section, with_evaluation
from exl2ray.publish.frontmatter import Value, write_block
from exl2ray.publish.origin import CARD, NO_CARD, OriginalCard, base_model_of, command, read_original, settings
from exl2ray.recipe import Recipe, bpw_name
from exl2ray.terminal.console import file_size, plural

TAGS = ("exl2", "exllamav2", "quantized")
PROGRAM = "exl2ray"  # quantized_by, until somebody publishes the model


@dataclass(frozen=True)
class Making:
    """How a conversion made the model. Perplexities are those on calibration rows; None: not finite, or not known."""

    command: str
    settings: tuple[tuple[str, str], ...]  # (flag, value)
    perplexity: float | None
    reference_perplexity: float | None  # of the source model, on the same rows
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
    evaluation: Evaluation | None = None
    quantized_by: str = PROGRAM
    warnings: tuple[str, ...] = ()


def model_card(info: CardInfo) -> str:
    """The whole card."""
    name = info.base_model.partition("/")[2] if info.base_model else info.architecture
    parts = [
        f"# {name}, EXL2 at {bpw_name(info.bits)} bits per weight",
        _introduction(info),
        _facts(info),
        _warnings(info.warnings),
        evaluation_section(info.evaluation),
        LOADING,
    ]
    if info.making is not None:
        parts.append(_making(info.making))
    if info.original.text:
        parts += ["## Original model card", info.original.text]
    return front_matter(info.base_model, info.quantized_by, info.original) + "\n" + "\n\n".join(filter(None, parts)) + "\n"


def front_matter(base_model: str | None, quantized_by: str, original: OriginalCard) -> str:
    """The YAML block: what the Hub needs to list the model under its base model, and what is kept of the original."""
    fields: dict[str, Value] = {}
    if base_model is not None:
        fields.update(base_model=base_model, base_model_relation="quantized")
    fields.update(quantized_by=quantized_by, library_name="exllamav2", **dict(original.fields))
    fields["tags"] = list(dict.fromkeys([*TAGS, *original.tags]))
    return write_block(fields)


def _introduction(info: CardInfo) -> str:
    source = f"[{info.base_model}](https://huggingface.co/{info.base_model})" if info.base_model else "the model below"
    if not info.base_model and not info.original.text:
        source = f"a model of the architecture {info.architecture}"
    with_ = f", converted with exl2ray {info.making.version}" if info.making is not None else ""
    return (
        f"This is {source} in the EXL2 format of [ExLlamaV2](https://github.com/turboderp-org/exllamav2){with_}. "
        "EXL2 gives every layer as many bits as its measured sensitivity asks for, within the average named above."
    )


def _facts(info: CardInfo) -> str:
    source = "built-in set" if info.calibration is None else f"own data ({_cell(info.calibration)})"
    size = f"{file_size(info.file_bytes)} in {plural(info.files, 'file')}"
    rows = [
        ("architecture", _cell(info.architecture)),
        ("bits per weight", f"{info.achieved_bpw:.3f} in the decoder layers ({info.bits:g} requested)"),
        ("output head", f"{info.head_bits} bits"),
        ("size", size),
        ("calibration", f"{source}, {info.rows} rows x {info.length} tokens"),
    ]
    if info.making is not None:
        after, before = _perplexity(info.making.perplexity), _perplexity(info.making.reference_perplexity)
        rows.append(("perplexity on calibration rows", f"{after} (source model: {before})"))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _warnings(warnings: Sequence[str]) -> str:
    """What whoever uses the model should know; nothing where nothing was found."""
    if not warnings:
        return ""
    return "\n".join(["## Warnings of the conversion", "", *(f"* {_prose(text)}" for text in warnings)])


def _prose(text: str) -> str:
    """Text that stays text: names of tensors and files may hold what Markdown and HTML read as markup."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", plain)


def _perplexity(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _making(making: Making) -> str:
    table = "\n".join(["| setting | value |", "|---|---|", *(f"| `{flag}` | {_cell(v)} |" for flag, v in making.settings)])
    return f"## How it was made\n\n```sh\n{making.command}\n```\n\n{table}"


def _cell(text: str) -> str:
    """Text in a cell of a table; names of files may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|")


LOADING = """\
## Loading

In [TabbyAPI](https://github.com/theroyallab/tabbyAPI), put this directory below `model_dir` and name it as `model_name` in
`config.yml`. In Python, with ExLlamaV2:

```python
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.generator import ExLlamaV2DynamicGenerator

config = ExLlamaV2Config("this/directory")
model = ExLlamaV2(config)
cache = ExLlamaV2Cache(model, max_seq_len=4096, lazy=True)
model.load_autosplit(cache)
generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=ExLlamaV2Tokenizer(config))
print(generator.generate(prompt="Once upon a time,", max_new_tokens=100, add_bos=True))
```"""


# ---- files ----------------------------------------------------------------------------------------------------------


def write_card(directory: str | Path, info: CardInfo) -> Path:
    """README.md of a directory, in the place of the source's that was copied there. Raises StoreError."""
    return _write(Path(directory), model_card(info))


def add_evaluation(directory: str | Path, evaluation: Evaluation) -> Path:
    """Puts the figures on the card of a directory. Raises StoreError if it cannot be written."""
    path = Path(directory) / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    wanted = with_evaluation(text, evaluation)
    return path if wanted == text else _write(Path(directory), wanted)


def _write(directory: Path, text: str) -> Path:
    path = directory / CARD
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
    return CardInfo(
        architecture=architecture,
        bits=bits,
        achieved_bpw=achieved_bpw,
        head_bits=recipe.usual_head_bits,
        file_bytes=sum(p.stat().st_size for p in files),
        files=len(files),
        calibration=recipe.calibration_name,
        rows=rows,
        length=recipe.length,
        making=Making(command(recipe, bits, base, patches), settings(recipe), perplexity, reference_perplexity),
        base_model=base,
        original=read_original(recipe.in_dir),
    )


def of_directory(summary: DirectorySummary) -> CardInfo:
    """What an EXL2 directory without a card says of itself."""
    q = summary.settings
    calibration = q.get("calibration")
    data = calibration if isinstance(calibration, dict) else {}
    dataset = str(data.get("dataset", "(default)"))
    return CardInfo(
        architecture=summary.architecture,
        bits=float(q.get("bits", summary.decoder_bpw)),
        achieved_bpw=summary.decoder_bpw,
        head_bits=int(q.get("head_bits", 0)),
        file_bytes=summary.total_bytes,
        files=len(summary.files),
        calibration=None if dataset == "(default)" else dataset,
        rows=int(data.get("rows", 0)),
        length=int(data.get("length", 0)),
    )
