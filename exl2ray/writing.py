"""From packed modules in the work directory to the files of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.config import Recipe, bpw_name
from exl2ray.convert import OutputSummary
from exl2ray.dist.worker import PERPLEXITY
from exl2ray.errors import NumericError, StoreError, UsageError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.shards import TensorEntry, copy_side_files, output_config, write_config, write_shards
from exl2ray.model.hyper import loader_config
from exl2ray.model.spec import ModelSpec
from exl2ray.model.weights import output_tensors, read_plain
from exl2ray.planning import Plan, head_bits
from exl2ray.publish.card import converted, write_card
from exl2ray.store.layout import CALIBRATION, quant_kind
from exl2ray.store.records import Record
from exl2ray.store.tensors import get_tensors
from exl2ray.store.workdir import WorkDir

_DTYPE_NAMES = {torch.int32: "I32", torch.int16: "I16", torch.float16: "F16"}


@dataclass(frozen=True)
class OutputWriter:
    """Writes the files of a bitrate. ``calibration_rows`` of the quantisation pass and texts of --set: for config.json."""

    recipe: Recipe
    spec: ModelSpec
    source: SourceModel
    work: WorkDir
    calibration_rows: int
    overrides: tuple[str, ...] = ()

    def records(self, plan: Plan) -> dict[int, Record]:
        """Records of all quantised modules of one bitrate, head included; the head's has both perplexities."""
        kind = quant_kind(plan.bits)
        out: dict[int, Record] = {}
        for module in self.spec.modules:
            if not module.linears:
                continue
            record = self.work.records.find(kind, module.profile_key, plan.hashes[module.index])
            if record is None:
                raise StoreError(
                    f"{module.profile_key}: the record written a moment ago cannot be read back",
                    "is the disk healthy? run the same command again",
                )
            out[module.index] = record
        last = self.spec.modules[-1].index
        if "perplexity" not in out[last].payload:
            separate = self.work.records.find(kind, PERPLEXITY, plan.hashes[-1])
            value = None if separate is None else separate.payload["perplexity"]
            out[last] = replace(out[last], payload={**out[last].payload, "perplexity": value})
        return out

    def write(self, plan: Plan, records: Mapping[int, Record]) -> OutputSummary:
        """Shards, and with -cf a complete model directory. Reports nothing: it runs beside the scheduler."""
        recipe = self.recipe
        directory = recipe.output_dir(plan.bits)
        target = Path(directory) if directory is not None else self._bare_output(plan)
        entries = self._entries(plan, records)
        paths = write_shards(target, entries, recipe.shard_size << 20, ours=[*_existing_outputs(target), CALIBRATION])
        head = records[self.spec.modules[-1].index].payload
        perplexities = head["perplexity"], head["reference_perplexity"]
        if directory is not None:
            copy_side_files(recipe.in_dir, target)
            name, rows, patches = self.spec.arch.name, self.calibration_rows, self.overrides[len(recipe.overrides) :]
            info = converted(recipe, plan.bits, plan.achieved_bpw, name, rows, paths, *perplexities, patches)
            bits = head_bits(recipe, self.spec, plan)
            write_card(target, replace(info, head_bits=bits))
            config = output_config(
                loader_config(self.spec.arch, self.source.config), plan.bits, bits,
                self.calibration_rows, recipe.length, recipe.cal_dataset,
            )  # fmt: skip
            if self.overrides:  # loaders ignore what they do not know
                config["quantization_config"]["overrides"] = list(self.overrides)
            write_config(target, config)
        return OutputSummary(
            plan.bits, plan.achieved_bpw, directory, tuple(str(p) for p in paths),
            sum(p.stat().st_size for p in paths), *perplexities,
        )  # fmt: skip

    def _bare_output(self, plan: Plan) -> Path:
        """Where the shards go without -cf: the work directory, one folder per bitrate if there are several."""
        if not self.work.store.is_local:
            raise UsageError("-cf is needed when the work directory is not a local path", "give -cf DIR")
        root = Path(self.work.store.root)
        return root if len(self.recipe.bits) == 1 else root / "quant" / bpw_name(plan.bits) / "output"

    def _entries(self, plan: Plan, records: Mapping[int, Record]) -> list[TensorEntry]:
        """Every tensor of the output in order, read when its turn comes; checks sizes against the plan."""
        out: list[TensorEntry] = []
        loaded: dict[int, dict[str, Tensor]] = {}
        quantised_bytes = 0

        def tensors(index: int) -> dict[str, Tensor]:
            if index not in loaded:
                loaded.clear()  # files are mapped; one module's at a time
                loaded[index] = {}
                for file in records[index].files:
                    loaded[index].update(get_tensors(self.work.store, file.rel))
            return loaded[index]

        for entry in output_tensors(self.spec):
            if entry.linear is not None and entry.module is not None:
                index = entry.module.index
                packed = PackedLinear.from_tensors(entry.linear.key, tensors(index).get)
                for name, t in packed.tensors().items():
                    quantised_bytes += t.numel() * t.element_size()
                    out.append(
                        TensorEntry(
                            name, _DTYPE_NAMES[t.dtype], tuple(t.shape), lambda i=index, n=name: tensors(i)[n]  # type: ignore[misc]
                        )
                    )
            elif entry.plain is not None:
                plain = entry.plain
                shape = tuple(read_plain(self.spec, plain, self.source).shape)
                out.append(
                    TensorEntry(entry.name, "F16", shape, lambda p=plain: read_plain(self.spec, p, self.source))  # type: ignore[misc]
                )
            elif entry.copied is not None:
                name = entry.copied.source_name
                out.append(
                    TensorEntry(
                        entry.name, self.source.dtype(name), self.source.shape(name), lambda n=name: self.source.load(n)  # type: ignore[misc]
                    )
                )
        if quantised_bytes != plan.predicted_bytes:
            raise NumericError(
                f"the quantised tensors take {quantised_bytes} bytes, the allocation predicted {plan.predicted_bytes}",
                "this is a defect of exl2ray: please report it",
            )
        return out


def _existing_outputs(directory: Path) -> list[str]:
    """Shards of an earlier run in this directory: they may be replaced."""
    return [p.name for p in directory.glob("output*.safetensors")] if directory.is_dir() else []
