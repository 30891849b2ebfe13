"""Quantising one module after another as a group: calibration rows stay where they are, weights move.

The calibration rows are cut into ``SHARES`` ranges, the same whatever the size of the group; a member keeps the states of a
run of shares. Per module

1. every member runs its rows through the source module and accumulates a Hessian per input and share,
2. the Hessians of an input are summed on its owner, in the fixed shape of a binary tree over the shares: the sum has the
   same bits whoever held which share,
3. owners factorise, quantise, pack and write the linears of their inputs; the packed tensors are broadcast,
4. everybody runs its rows through the quantised module; the first member commits the record.

With corrected targets (`exl2ray.quant.correct`) the members keep the states of the source model beside those of the
quantised one, and attention and MLP go through 1 to 3 twice: for the first linears, then for the second one.

A group of one does the same without sending anything, so one worker and eight give the same bytes. After a loss the group
is formed anew: shares that a survivor holds are sent to their new holders, lost ones start from a checkpoint or from the
token rows and go forward through packed modules.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.layout import QParams
from exl2ray.model.blocks import Block, check_states
from exl2ray.model.spec import ModuleSpec
from exl2ray.quant.block import by_input
from exl2ray.quant.correct import can_correct, corrected_weights, first_linears, first_sums, second_linears, second_sums
from exl2ray.quant.gptq import Quantized
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.measure import reference_pass, relative_error
from exl2ray.quant.measure_moe import describe_coverage, lanes_of, shares_of
from exl2ray.quant.pack import dequantize
from exl2ray.quant.quantize import quantize_groups, solve_group
from exl2ray.quant.rows import batches, share_rows
from exl2ray.quant.settings import Settings
from exl2ray.store.layout import quant_kind
from exl2ray.store.records import FileRef, Record, hash_inputs
from exl2ray.team.checkpoints import Chain, Checkpoints
from exl2ray.team.comm import Comm, Solo
from exl2ray.team.member import Member
from exl2ray.team.messages import Begun, ChainPass, ItemResult, Ready
from exl2ray.team.owning import Sums, share_out
from exl2ray.team.packed_files import PackedFiles
from exl2ray.team.runner import Runner, option_names, perplexity_of, perplexity_sums
from exl2ray.team.shared_reading import SharedReading
from exl2ray.team.spreading import spread
from exl2ray.team.tree import TreeSum, owner_shares


def quantize(worker: Member, part: ChainPass) -> Iterator[Begun | Ready | ItemResult]:
    """Quantises the modules of one bitrate in order, with a group; they are committed one by one. The first member tells."""
    choices, spec = part.choices, worker.runner.spec
    first, together = part.modules[0], part.meeting.size > 1
    yield worker.begin(Begun("join", first, spec.modules[first].profile_key, choices.bits, together=together))
    begin = time.monotonic()
    # A patched model shares hashes of modules with the model before the patch, but not the states between them.
    plan = hash_inputs(hashes=list(choices.hashes))[:16]
    name = f"quantized:{worker.setup.calibration_sha256[:32]}:{plan}"
    chain = Chain(quant_kind(choices.bits), name, choices.hashes)
    gang = worker.kept
    if not isinstance(gang, Gang) or gang.chain != chain:
        worker.kept = None
        gang = worker.kept = Gang(worker.runner, worker.checkpoints, chain)
    comm = worker.group(part.meeting)
    before = comm.received
    reading = SharedReading(worker.runner, comm)
    if together:
        reading.expect(0, 1)
    gang.join(first, comm, reading)
    reading.close()
    yield Ready("join", time.monotonic() - begin, comm.received - before)
    for index in worker.until_taken(part.modules, comm):
        key = spec.modules[index].profile_key
        yield worker.begin(Begun("chain", index, key, choices.bits, together=together))
        begin, before = time.monotonic(), comm.received
        payload, detail = gang.quantize(index, choices.params)
        received = sum(comm.gather(comm.received - before))
        if comm.rank == 0:
            notes = tuple(payload.get("notes", ()))
            yield worker.result(
                index, key, begin, detail, payload, bits=choices.bits, notes=notes, received=received
            )
        else:
            yield Ready("chain", time.monotonic() - begin)


@dataclass
class Share:
    """States of one range of rows at the entry of module ``index``.

    x (r, T, hidden): what the quantised modules before produce. other (p, T, hidden): some of the rows whose perplexity is
    reported, in the source model; with corrected targets all rows of the share (p = r).
    """

    index: int
    x: Tensor
    other: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, "other": self.other}


class Gang:
    """One member's part in the chain of one bitrate."""

    def __init__(self, runner: Runner, checkpoints: Checkpoints, chain: Chain) -> None:
        self.run, self.checkpoints, self.chain = runner, checkpoints, chain
        self.shares: dict[int, Share] = {}
        self.comm: Comm = Solo()
        rows = len(runner.rows("quantize"))
        self.rows = share_rows(rows)
        self.reported = min(rows, runner.setup.perplexity_rows)
        self.corrected = runner.setup.numerics.target_correction > 0
        self.other_rows = self.rows if self.corrected else share_rows(self.reported)

    # ---- forming -----------------------------------------------------------------------------------------------

    def join(self, index: int, comm: Comm, reading: SharedReading) -> None:
        """Takes over shares that other members hold, brings all of its own to module ``index``.

        reading: of this group, for weights that all members need at the same time.
        """
        self.comm = comm
        wanted = [s for s in owner_shares(comm.rank, comm.size) if len(self.rows[s])]
        self._exchange_shares(index)
        self.shares = {s: self.shares[s] for s in wanted if s in self.shares}
        self._restore([s for s in wanted if s not in self.shares], index, reading)
        self._go_to(index)

    def _go_to(self, index: int) -> None:
        """Brings this member's rows to a module, through those that are finished or have no linears."""
        while behind := [s for s in self.shares.values() if s.index < index]:
            first = min(s.index for s in behind)
            self._step([s for s in behind if s.index == first], self.run.spec.modules[first])

    def _exchange_shares(self, index: int) -> None:
        """Sends shares to the members that now own them, from whoever holds them farthest ahead."""
        usable = {s: share for s, share in self.shares.items() if share.index <= index}
        self.shares = usable
        held = self.comm.gather({s: (h.index, h.x.dtype, tuple(h.x.shape), tuple(h.other.shape)) for s, h in usable.items()})
        for rank in range(self.comm.size):
            for s in owner_shares(rank, self.comm.size):
                holders = [(h[s][0], -r) for r, h in enumerate(held) if s in h]
                best = max(holders, default=(0, 0))
                if not holders or held[rank].get(s, (0,))[0] == best[0]:
                    continue
                source = -best[1]
                if source == self.comm.rank:
                    sent = [t.to(self.run.device).contiguous() for t in usable[s].tensors().values()]
                    self.comm.exchange([(t, rank) for t in sent], [])
                elif rank == self.comm.rank:
                    index, dtype, *shapes = held[source][s]
                    received = [torch.empty(shape, dtype=dtype, device=self.run.device) for shape in shapes]
                    self.comm.exchange([], [(t, source) for t in received])
                    self.shares[s] = Share(index, *map(self.run.place, received))

    def _restore(self, shares: Sequence[int], index: int, reading: SharedReading) -> None:
        """Shares that no member holds: from checkpoints, else from the token rows."""
        saved = {s: self.checkpoints.load(self.chain, index, s) for s in shares}
        for s, found in saved.items():
            if found is not None:
                x, other = (self.run.place(found.tensors[name]) for name in ("x", "other"))
                self.shares[s] = Share(found.index, x, other)
        anew = [s for s, found in saved.items() if found is None]
        together = self.comm.size > 1 and all(self.comm.gather(bool(anew)))
        if not anew:
            return
        block = self.run.load_from(reading, self.run.spec.modules[0]) if together else None
        states = self.run.embedded("quantize", block)
        for s in anew:
            x, other = (states[r.start : r.stop].clone() for r in (self.rows[s], self.other_rows[s]))
            self.shares[s] = Share(1, x, other)

    # ---- forward -----------------------------------------------------------------------------------------------

    def _step(self, shares: Sequence[Share], module: ModuleSpec) -> None:
        """Moves shares through a module that is finished: rows of the source, then rows of the quantised model."""
        block = self.run.load(module)
        self._advance_other(block, shares)
        if module.linears:
            packed = self.run.packed(self.chain.kind, module, self.chain.hashes[module.index])
            for key, p in packed.items():
                block.set_weight(key, dequantize(p, self.run.device))
        for s in shares:
            s.x = self.run.advance(block, s.x, self.run.settings(module, s.x))
            s.index += 1

    def _advance_other(self, block: Block, shares: Sequence[Share]) -> None:
        for s in shares:
            if len(s.other):
                s.other = self.run.advance(block, s.other, self.run.settings(block.module, s.other))

    # ---- one module --------------------------------------------------------------------------------------------

    def quantize(self, index: int, params: Mapping[str, QParams]) -> tuple[dict[str, Any], str]:
        """Quantises one module with the group: payload of its record, and a few words for the display.

        params: linear key -> option.
        """
        module = self.run.spec.modules[index]
        self._go_to(index)
        own = {x.key: params[x.key] for x in module.linears}
        return self._head(module, own) if module.kind == "head" else self._module(module, own)

    def _module(self, module: ModuleSpec, params: Mapping[str, QParams]) -> tuple[dict[str, Any], str]:
        block = self.run.load(module)
        if self.corrected and can_correct(block):
            others, experts, writing, notes = self._corrected(block, params)
            targets = dict(others)
        else:
            targets, others, trees = self._plain(block)
            experts = self._coverage(module, trees)
            writing, notes = self._quantize_linears(block, params, trees)
        errors: list[tuple[int, float]] = []
        outs: dict[int, Tensor] = {}
        for s, share in sorted(self.shares.items()):
            settings = self.run.settings(module, share.x)
            outs[s], error = self._quantized_pass(block, share.x, targets.pop(s), settings)
            errors.append((s, error))
        total = sum(e for _, e in sorted(x for member in self.comm.gather(errors) for x in member))
        error = total / sum(len(r) for r in self.rows)
        payload: dict[str, Any] = {"error": error, "notes": notes, "options": option_names(params)}
        if experts:
            payload["experts"] = experts
            notes.insert(0, describe_coverage(experts))
        self._commit(module, payload, writing)
        self.shares = {s: Share(module.index + 1, out, others[s]) for s, out in outs.items()}
        if self.checkpoints.due():
            tensors: dict[int | None, dict[str, Tensor]] = {s: h.tensors() for s, h in self.shares.items()}
            self.checkpoints.save(self.chain, module.index + 1, tensors, module.index + 1)
        return payload, f"error {error:.5f}"

    def _plain(self, block: Block) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[str, TreeSum]]:
        """Source outputs of the rows, of the rows in the source model, and the Hessians of all inputs."""
        module = block.module
        trees = {group: TreeSum(self.run.sums_on_host(module)) for group in by_input(module.linears)}
        targets: dict[int, Tensor] = {}
        others: dict[int, Tensor] = {}
        for s, share in sorted(self.shares.items()):
            settings = self.run.settings(module, share.x)
            targets[s], hessians = reference_pass(block, share.x, settings, check_states)
            for group, tree in trees.items():
                tree.add(s, hessians.pop(group))
            if len(share.other):
                others[s] = self.run.advance(block, share.other, self.run.settings(module, share.other))
            else:
                others[s] = share.other
        return targets, others, trees

    def _corrected(
        self, block: Block, params: Mapping[str, QParams]
    ) -> tuple[dict[int, Tensor], list[dict[str, float]], dict[str, Future[FileRef]], list[str]]:
        """Quantises a block towards corrected targets: source model's states after it, coverage, files, notes."""
        others: dict[int, Tensor] = {}
        files: dict[str, Future[FileRef]] = {}
        notes: list[str] = []
        first = first_linears(block)
        source = {x.key: block.weights[x.key] for linears in first.values() for x in linears}
        for stage in (first, second_linears(block)):
            on_host = self.run.sums_on_host(block.module)
            trees, crosses = ({group: TreeSum(on_host) for group in stage} for _ in range(2))
            for s, share in sorted(self.shares.items()):
                settings = self.run.settings(block.module, share.x)
                if stage is first:
                    sums = first_sums(block, share.x, share.other, settings)
                else:
                    sums, others[s] = second_sums(block, share.x, share.other, source, settings, check_states)
                for group in stage:
                    own = sums.pop(group)
                    trees[group].add(s, own.hessian)
                    crosses[group].add(s, own.cross)
            experts = self._coverage(block.module, trees) if stage is not first else []
            writing, noted = self._quantize_linears(block, params, trees, crosses)
            files.update(writing)
            notes += noted
        return others, experts, files, notes

    def _quantized_pass(self, block: Block, x: Tensor, target: Tensor, settings: Settings) -> tuple[Tensor, float]:
        """Output of the quantised block, and the sum over rows of its relative error."""
        out = torch.empty_like(x)
        error = 0.0
        for part in batches(x.shape[0], settings.batch_rows):
            result = block.forward(x[part].to(self.run.device))
            check_states(result, f"quantised output of {block.module.profile_key}")
            reference = target[part].to(self.run.device)
            error += relative_error(result, reference)
            out[part] = result.to(out.dtype)
        return out, error

    def _quantize_linears(
        self, block: Block, params: Mapping[str, QParams], trees: dict[str, TreeSum],
        crosses: dict[str, TreeSum] | None = None,
    ) -> tuple[dict[str, Future[FileRef]], list[str]]:
        """Sums Hessians on their owners; quantises and spreads the linears on these inputs, and starts to write them.

        crosses: sums for corrected targets. Returns the files of this member by their first linear, as they will be, and all
        members' notes in order.
        """
        module = block.module
        inputs = by_input(module.linears)
        groups = {group: inputs[group] for group in trees}
        settings = self.run.settings(module, torch.empty(1, self.run.rows("quantize").shape[1], 0))
        owned, owners = share_out(self.run, self.comm, module, groups, Sums(trees, crosses or {}), settings)
        files = PackedFiles(self.run, self.chain.kind, module.profile_key, self.chain.hashes[module.index])
        packed: dict[str, dict[str, PackedLinear]] = {}
        own = [group for group in groups if owners[group] == self.comm.rank]
        if lanes_of(block) > 1:  # they are used on several streams
            for accumulator in owned.hessians.values():
                accumulator.h = accumulator.h.to(self.run.device)

        def solve(group: str) -> dict[str, Quantized]:
            factor = owned.factor(block, group, settings, self.run.device)
            targets = None
            if group in owned.moments:
                strength = settings.numerics.target_correction
                targets = corrected_weights(block, groups[group], factor, owned.moments.pop(group), strength)
            return solve_group(block, groups[group], factor, params, settings, targets)

        for group, packed[group] in quantize_groups(block, own, solve, keep=True):
            files.add(packed[group])
        writing = files.close()
        done: dict[str, list[str]] = {}
        for member in self.comm.gather(owned.notes):
            done.update(member)
        if self.comm.size > 1:
            for group, linears in groups.items():
                mine_too = packed.get(group)
                for key, p in spread(self.comm, linears, mine_too, owners[group], self.run.device).items():
                    if mine_too is None:
                        block.set_weight(key, dequantize(p, self.run.device))
        return writing, [n for g in groups for n in done[g]]

    def _coverage(self, module: ModuleSpec, trees: dict[str, TreeSum]) -> list[dict[str, float]]:
        """Tokens routed to each expert, over all members; empty for a dense module."""
        if module.kind != "moe":
            return []
        groups = [x.input_group for x in module.linears if x.role == "w2"]
        mine = [sum(c[2] for c in trees[g].counts().values()) for g in groups]
        return shares_of([sum(column) for column in zip(*self.comm.gather(mine), strict=True)])

    def _commit(
        self, module: ModuleSpec, payload: dict[str, Any], writing: dict[str, Future[FileRef]]
    ) -> None:
        """Waits until all files are written; the first member writes the record. Nobody goes on before it is durable."""
        mine = {key: future.result() for key, future in writing.items()}
        files: dict[str, FileRef] = {}
        for member in self.comm.gather(mine):
            files.update(member)
        if self.comm.rank == 0:
            inputs_hash = self.chain.hashes[module.index]
            ordered = tuple(files[x.key] for x in module.linears if x.key in files)
            self.run.records.commit(Record(self.chain.kind, module.profile_key, inputs_hash, payload, ordered))
        self.comm.gather(None)

    # ---- head --------------------------------------------------------------------------------------------------

    def _head(self, module: ModuleSpec, params: Mapping[str, QParams]) -> tuple[dict[str, Any], str]:
        block = self.run.load(module)
        linear = module.linears[0]
        before = [(s, self._sums_of(block, h.other, self.other_rows[s])) for s, h in self.shares.items()]
        tree = TreeSum()
        for s, share in sorted(self.shares.items()):
            own = HessianAccumulator(linear.in_features, self.run.device)
            settings = self.run.settings(module, share.x)
            for part in batches(share.x.shape[0], settings.batch_rows):
                own.add(share.x[part].to(self.run.device).to(self.run.dtype), part.stop - part.start)
            tree.add(s, own)
        writing, notes = self._quantize_linears(block, params, {linear.input_group: tree})
        after = [(s, self._sums_of(block, h.x, self.rows[s])) for s, h in self.shares.items()]
        quantised, source = self._perplexity(after), self._perplexity(before)
        payload = {
            "perplexity": quantised,
            "reference_perplexity": source,
            "notes": notes,
            "options": option_names(params),
        }
        self._commit(module, payload, writing)
        shown = ["not a number" if v is None else f"{v:.4g}" for v in (quantised, source)]
        return payload, f"perplexity {shown[0]} (source {shown[1]})"

    def _sums_of(self, block: Block, x: Tensor, rows: range) -> tuple[float, int]:
        """`perplexity_sums` of those of ``rows``, whose normed states x are, that are reported."""
        count = len(range(rows.start, min(rows.stop, self.reported)))
        return perplexity_sums(block, x[:count], self._ids(rows)[:count]) if count else (0.0, 0)

    def _perplexity(self, sums: list[tuple[int, tuple[float, int]]]) -> float | None:
        return perplexity_of([v for _, v in sorted(x for member in self.comm.gather(sums) for x in member)])

    def _ids(self, rows: range) -> Tensor:
        return self.run.rows("quantize")[rows.start : rows.stop]
