"""Calibration sets of `quality.py`, and the conversion that uses them. A draw is another selection of the same text."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from exl2ray.calibration.cutting import uniform_rows
from exl2ray.calibration.rows import ROW_CATEGORIES, Rows
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.errors import UsageError
from exl2ray.events import Reporter
from exl2ray.recipe import Recipe
from exl2ray.steps import Job

WITHOUT = "builtin-without:"
DEPENDENT = {"multilingual": ("shuffled",)}  # row sets made of another one's rows


@dataclass(frozen=True)
class Calibration:
    """``name`` as in the table; ``file`` for a Parquet file, ``without``: row sets of the built-in set to leave out."""

    name: str
    file: Path | None = None
    without: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Calibration:
        """From the command line; UsageError for what is none of builtin, random, builtin-without:SET and a file."""
        if text in ("builtin", "random"):
            return Calibration(text)
        if text.startswith(WITHOUT):
            name = text[len(WITHOUT) :]
            if name not in {s.name for s in ROW_CATEGORIES}:
                raise UsageError(f"--calibration {text}: unknown set", f"known: {', '.join(s.name for s in ROW_CATEGORIES)}")
            return Calibration(text, without=(name, *DEPENDENT.get(name, ())))
        if not Path(text).is_file():
            raise UsageError(f"--calibration {text}: no such file", "or one of builtin, random, builtin-without:SET")
        return Calibration(Path(text).stem, Path(text))

    @property
    def identity(self) -> str:
        """What tells this set from others: its name, or the hash of its file."""
        return self.name if self.file is None else hashlib.sha256(self.file.read_bytes()).hexdigest()

    def recipe(self, recipe: Recipe, draw: int, work: Path) -> Recipe:
        """``recipe`` with draw ``draw`` of this set. A file's data rows are shuffled into a file under ``work``."""
        recipe = replace(recipe, seed=recipe.seed + draw)
        if self.file is None or draw == 0:
            return replace(recipe, cal_dataset=None if self.file is None else str(self.file))
        shuffled = work / "calibration" / f"{self.file.stem}-{self.identity[:12]}-{draw}.parquet"
        if not shuffled.exists():
            table = pq.read_table(self.file)
            order = list(range(table.num_rows))
            random.Random(draw).shuffle(order)
            shuffled.parent.mkdir(parents=True, exist_ok=True)
            temp = shuffled.with_suffix(f".{random.SystemRandom().getrandbits(32):08x}")
            pq.write_table(table.take(order), temp)
            temp.replace(shuffled)
        return replace(recipe, cal_dataset=str(shuffled))

    def change(self, name: str, rows: Rows, vocab_size: int, seed: int) -> Rows:
        """The rows of a pass (``name``: measure, quantize) as this set has them, made of the built-in ones."""
        if self.name != "random" and not self.without:
            return rows
        count, length = rows.ids.shape
        if self.name == "random":
            ids = torch.from_numpy(uniform_rows(count, length, vocab_size, random.Random(f"{seed}/{name}")))
            return Rows(ids, ("random",) * count, "random")
        kept = [i for i, kind in enumerate(rows.kinds) if kind not in self.without]
        return Rows(rows.ids[kept], tuple(rows.kinds[i] for i in kept), rows.source, rows.notes)


class Experiment(Job):
    """A conversion with rows that no option of the command line gives."""

    def __init__(self, recipe: Recipe, calibration: Calibration, reporter: Reporter) -> None:
        super().__init__(recipe, reporter)
        hyper = self.spec.hyper
        size = load_tokenizer(recipe.in_dir, self.source.config, hyper.vocab_size).vocab_size
        self.rows = {name: calibration.change(name, rows, size, recipe.seed) for name, rows in self.rows.items()}
