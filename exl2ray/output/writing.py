"""From packed modules in the work directory to the files of a model.

The shards are filled while modules are still being quantised, and become files of the output as hard links, wherever the
output can have such (`exl2ray.store.assembly`); on another file system they are filled there (`exl2ray.store.copies`). From a
work directory in an object store they are written at the end.

Writing is a step like others. Its record (key `output` of a bitrate) names the shards with size, SHA-256 and time, under a
hash of the packed tensors' hashes. A file with the recorded size and time counts as intact; one that was touched or copied is
hashed. So a finished job writes nothing. config.json is removed, durably, before anything else changes, and written last:
what has one is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from exl2ray.allocation.planning import Plan, head_bits, head_bpw
from exl2ray.errors import UnfitError, UsageError
from exl2ray.events import OutputSummary
from exl2ray.formats.claim import existing_shards
from exl2ray.formats.files import atomic_file, holds
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.shards import Shard, config_bytes, output_config, write_config, write_shards
from exl2ray.formats.side_files import copy_side_files, stale_side_files
from exl2ray.formats.target import Owner, check_claim, check_target, claim_target, release_target, withdraw
from exl2ray.model.hyper import loader_config
from exl2ray.model.spec import ModelSpec
from exl2ray.output.contents import Contents
from exl2ray.output.filling import Filling
from exl2ray.output.targets import Targets, owner_of
from exl2ray.publish.card import CardInfo, converted, model_card, write_card
from exl2ray.publish.file_kinds import CARD
from exl2ray.recipe import Recipe, bpw_name
from exl2ray.result_warnings import ResultWarnings
from exl2ray.store.file_names import CALIBRATION, OUTPUT, PERPLEXITY, quant_kind
from exl2ray.store.records import Record, hash_inputs, reading
from exl2ray.store.workdir import WorkDir
from exl2ray.wording import shown

WRITTEN = 1  # how a model is written; another number when the same tensors would become other files


@dataclass(frozen=True)
class OutputWriter:
    """Writes the files of a bitrate. ``fingerprint``: of the source. ``calibration_rows`` of the quantisation pass: for
    config.json. ``warnings``: for the card.
    """

    recipe: Recipe
    spec: ModelSpec
    source: SourceModel
    work: WorkDir
    _: KW_ONLY
    fingerprint: str
    calibration_rows: int
    warnings: ResultWarnings | None = None
    side_files: Mapping[str, bytes] = field(default_factory=dict)  # in place of the source's, or beside them
    targets: Targets = field(default_factory=Targets)  # locked for this conversion

    @cached_property
    def filling(self) -> Filling:
        """The shards of all bitrates, on the way."""
        contents = Contents(self.spec, self.source, self.work.store)
        return Filling(contents, self.work, self.fingerprint, self.recipe.shard_bytes)

    @property
    def owner(self) -> Owner:
        """The conversion as the claim of its target names it."""
        return owner_of(self.recipe, self.fingerprint, self.work.id, self.side_files)

    def records(self, plan: Plan) -> dict[int, Record]:
        """Records of all quantised modules of one bitrate, head included; the head's has both perplexities."""
        kind = quant_kind(plan.bits)
        out: dict[int, Record] = {}
        for module in self.spec.modules:
            if not module.linears:
                continue
            out[module.index] = self.work.records.required(kind, module.profile_key, plan.hashes[module.index])
        last = self.spec.modules[-1].index
        if "perplexity" not in out[last].payload:
            separate = self.work.records.find(kind, PERPLEXITY, plan.hashes[-1])
            value = None if separate is None else separate.payload.get("perplexity")
            out[last] = replace(out[last], payload={**out[last].payload, "perplexity": value})
        with reading(self.work.store, out[last]) as payload:
            for name in ("perplexity", "reference_perplexity"):
                if payload[name] is not None and not isinstance(payload[name], (int, float)):
                    raise UnfitError(f"{name} is {shown(payload[name])}")
        return out

    def finished(self, plan: Plan, records: Mapping[int, Record]) -> OutputSummary | None:
        """The summary of what is there already, if it is what `write` would write; None if anything is missing or altered.

        The card may have changed since: evaluations are added to it.
        """
        target, stored = self.target(plan), self._stored(plan, records)
        shards = None if stored is None else self._intact(plan, records, stored)
        if stored is None or shards is None:
            return None
        if self.recipe.compile_full is not None:
            config = target / "config.json"
            stale = [n for n in stale_side_files(self.recipe.in_dir, target) if n not in (CARD, *self.side_files)]
            stale += [n for n, data in self.side_files.items() if not holds(target / n, data)]
            if stale or not config.is_file() or config.read_bytes() != config_bytes(self._config(plan)):
                return None
            card = _identity(self._card(plan, records, shards))
            if card != stored.payload.get("card") or not (target / CARD).is_file():
                return None
            release_target(target)  # a run that was killed at its very end left the claim
        return self._summary(plan, records, shards)

    def check(self, plan: Plan) -> None:
        """Raises UsageError if `write` would, so that nothing is quantised in vain."""
        if self.recipe.compile_full is not None:
            check_target(self.target(plan), self.owner)

    def write(self, plan: Plan, records: Mapping[int, Record]) -> OutputSummary:
        """Shards, and with -cf a complete model directory. Reports nothing: it runs beside the scheduler.

        Shards that are there already stay as they are. With -cf, config.json is gone before anything changes and comes back
        last. Raises UsageError if the directory has files of something else, StoreError if it is gone.
        """
        target, stored = self.target(plan), self._stored(plan, records)
        complete = self.recipe.compile_full is not None
        shards = None if stored is None else self._intact(plan, records, stored)
        payload: dict[str, Any] = {} if stored is None else dict(stored.payload)
        if complete:
            self.targets.check(target)
            claim_target(target, self.owner, self.filling.assembly(plan, target).names)

        def begin() -> None:
            if complete:
                withdraw(target)

        if shards is None:
            ours = [*existing_shards(target), CALIBRATION]
            if self.filling.possible:
                shards, others = self.filling.link(plan, records, target, ours, payload.get("others"), begin)
                payload = {"others": others}
            else:
                entries = self.filling.contents.entries(plan, records)
                shards, payload = write_shards(target, entries, self.recipe.shard_bytes, ours, begin), {}
        else:
            begin()
        payload |= {"shards": [asdict(s) for s in shards]}
        if complete:
            payload["card"] = self._complete(plan, records, shards, target)
        self.work.records.commit(Record(quant_kind(plan.bits), OUTPUT, self._hash(records), payload))
        self.filling.finish(plan)
        return self._summary(plan, records, shards)

    def _complete(self, plan: Plan, records: Mapping[int, Record], shards: Sequence[Shard], target: Path) -> str:
        """Everything but the shards, config.json last; the identity of the card."""
        self.targets.check(target)
        copy_side_files(self.recipe.in_dir, target)
        for name, data in self.side_files.items():
            with atomic_file(target / name) as f:
                f.write(data)
        card = self._card(plan, records, shards)
        write_card(target, card)
        self.targets.check(target)
        check_claim(target, self.owner)
        write_config(target, self._config(plan))
        release_target(target)
        return _identity(card)

    def _intact(self, plan: Plan, records: Mapping[int, Record], stored: Record) -> list[Shard] | None:
        """The shards of a record if they, and no others, are in the output as they were written."""
        target = self.target(plan)
        try:
            shards = [Shard.parse(s) for s in stored.payload["shards"]]
        except (KeyError, TypeError):  # not of this form: written again
            return None
        if existing_shards(target) != sorted(s.name for s in shards):
            return None
        if all(s.is_intact(target) for s in shards):
            return shards
        others = stored.payload.get("others")
        if any(s.sha256 for s in shards) or not isinstance(others, str):
            return None
        return shards if self.filling.same(plan, records, target, others) else None

    def _hash(self, records: Mapping[int, Record]) -> str:
        """Hash of all that the shards contain."""
        tensors = [[ref.sha256 for ref in records[i].files] for i in sorted(records)]
        return hash_inputs(
            written=WRITTEN, source=self.fingerprint, tensors=tensors, shard_size=self.recipe.shard_size,
            **self.spec.rotation_entry,
        )  # fmt: skip

    def _stored(self, plan: Plan, records: Mapping[int, Record]) -> Record | None:
        """The record of having written these shards; where, it does not say: they may have been moved."""
        return self.work.records.find(quant_kind(plan.bits), OUTPUT, self._hash(records))

    def _perplexities(self, records: Mapping[int, Record]) -> tuple[float | None, float | None]:
        """On calibration rows, of the quantised model and of its source."""
        head = records[self.spec.modules[-1].index].payload
        return head["perplexity"], head["reference_perplexity"]

    def _card(self, plan: Plan, records: Mapping[int, Record], shards: Sequence[Shard]) -> CardInfo:
        paths, rows = [self.target(plan) / s.name for s in shards], self.calibration_rows
        name, perplexities = self.spec.arch.name, self._perplexities(records)
        info = converted(self.recipe, plan.bits, plan.achieved_bpw, name, rows, paths, *perplexities, plan.patches)
        warnings = () if self.warnings is None else self.warnings.of(plan.bits)
        return replace(info, head_bits=head_bits(self.recipe, self.spec, plan), warnings=warnings)

    def _config(self, plan: Plan) -> dict[str, Any]:
        """config.json of the output."""
        config = output_config(
            loader_config(self.spec.arch, self.source.config), plan.bits, head_bits(self.recipe, self.spec, plan),
            self.calibration_rows, self.recipe.length, self.recipe.calibration_name,
        )  # fmt: skip
        overrides = [*self.recipe.overrides, *plan.patches]
        if overrides:  # loaders ignore what they do not know
            config["quantization_config"]["overrides"] = overrides
        config["quantization_config"].update(self.spec.rotation_entry)
        if self.spec.rotation is not None and self.spec.hyper.tie_embeddings:
            config["tie_word_embeddings"] = False  # the head is no longer the embedding's transpose
        return config

    def _summary(self, plan: Plan, records: Mapping[int, Record], shards: Sequence[Shard]) -> OutputSummary:
        return OutputSummary(
            plan.bits, plan.achieved_bpw, self.recipe.output_dir(plan.bits),
            tuple(str(self.target(plan) / s.name) for s in shards), sum(s.size for s in shards),
            *self._perplexities(records), head_bpw=head_bpw(self.spec, plan.params),
        )  # fmt: skip

    def target(self, plan: Plan) -> Path:
        """The directory of the shards."""
        return target_of(self.recipe, self.work, plan.bits)


def target_of(recipe: Recipe, work: WorkDir, bits: float) -> Path:
    """The directory of the shards: without -cf the work directory, one folder per bitrate if there are several."""
    directory = recipe.output_dir(bits)
    if directory is not None:
        return Path(directory)
    if not work.store.is_local:
        raise UsageError("-cf is needed when the work directory is not a local path", "give -cf DIR")
    root = Path(work.store.root)
    return root if len(recipe.bits) == 1 else root / "quant" / bpw_name(bits) / "output"


def _identity(card: CardInfo) -> str:
    """Hash of what a card says, whatever version of exl2ray writes it."""
    making = None if card.making is None else replace(card.making, version="")
    return hash_inputs(card=model_card(replace(card, making=making)))
