"""Quantising one module after another as a group: calibration rows stay where they are, weights move.

The calibration rows are cut into ``SHARES`` ranges, the same whatever the size of the group; a member keeps the states of a
run of shares. What is done per module is `exl2ray.quant.module.quantize_module`; the first member commits the record. With
corrected targets the members keep the states of the source model beside those of the quantised one.

A group of one does the same without sending anything, so one worker and eight give the same bytes. After a loss the group
is formed anew: shares that a survivor holds are sent to their new holders, lost ones start from a checkpoint or from the
token rows and go forward through packed modules.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from exl2ray.formats.layout import QParams
from exl2ray.model.blocks import Block, check_states
from exl2ray.model.spec import ModuleSpec
from exl2ray.quant.group import Comm, Solo
from exl2ray.quant.module import quantize_module
from exl2ray.quant.pack import dequantize
from exl2ray.quant.rows import owner_shares, share_rows
from exl2ray.store.file_names import quant_kind
from exl2ray.store.records import FileRef, Record, hash_inputs
from exl2ray.team.checkpoints import Chain, Checkpoints
from exl2ray.team.member import Member
from exl2ray.team.messages import Begun, ChainPass, ItemResult, Ready
from exl2ray.team.packed_files import PackedFiles
from exl2ray.team.runner import Runner, option_names, perplexity_of, perplexity_sums
from exl2ray.team.shared_reading import shared_embedding
from exl2ray.wording import perplexity

PERPLEXITIES = ("perplexity", "reference_perplexity")  # of the quantised and of the source model, in the head's record


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
    states = worker.kept
    if not isinstance(states, ChainStates) or states.chain != chain:
        worker.kept = None
        states = worker.kept = ChainStates(worker.runner, worker.checkpoints, chain)
    comm = worker.group(part.meeting)
    before = comm.received
    states.join(first, comm)
    yield Ready("join", time.monotonic() - begin, comm.received - before)
    for index in worker.until_taken(part.modules, comm):
        key = spec.modules[index].profile_key
        yield worker.begin(Begun("chain", index, key, choices.bits, together=together))
        begin, before = time.monotonic(), comm.received
        payload, detail = states.quantize(index, choices.params)
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


class ChainStates:
    """The states of one member of the group that goes through the chain of one bitrate, and what the member does there."""

    def __init__(self, runner: Runner, checkpoints: Checkpoints, chain: Chain) -> None:
        self.run, self.checkpoints, self.chain = runner, checkpoints, chain
        self.shares: dict[int, Share] = {}
        self.comm: Comm = Solo()
        rows = len(runner.rows("quantize"))
        self.rows = share_rows(rows)
        self.reported = min(rows, runner.setup.perplexity_rows)
        corrected = runner.setup.numerics.target_correction > 0
        self.other_rows = self.rows if corrected else share_rows(self.reported)

    # ---- forming -----------------------------------------------------------------------------------------------

    def join(self, index: int, comm: Comm) -> None:
        """Takes over shares that other members hold, brings all of its own to module ``index``."""
        self.comm = comm
        wanted = [s for s in owner_shares(comm.rank, comm.size) if len(self.rows[s])]
        self._exchange_shares(index)
        self.shares = {s: self.shares[s] for s in wanted if s in self.shares}
        self._restore([s for s in wanted if s not in self.shares], index)
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
                    self.shares[s] = Share(index, *(self.run.place(t, "quantize") for t in received))

    def _restore(self, shares: Sequence[int], index: int) -> None:
        """Shares that no member holds: from checkpoints, else from the token rows."""
        saved = {s: self.checkpoints.load(self.chain, index, s) for s in shares}
        for s, found in saved.items():
            if found is not None:
                x, other = (self.run.place(found.tensors[name], "quantize") for name in ("x", "other"))
                self.shares[s] = Share(found.index, x, other)
        anew = [s for s, found in saved.items() if found is None]
        together = self.comm.size > 1 and all(self.comm.gather(bool(anew)))
        if not anew:
            return
        states = self.run.embedded("quantize", shared_embedding(self.run, self.comm) if together else None)
        for s in anew:
            x, other = (states[r.start : r.stop].clone() for r in (self.rows[s], self.other_rows[s]))
            self.shares[s] = Share(1, x, other)

    # ---- forward -----------------------------------------------------------------------------------------------

    def _step(self, shares: Sequence[Share], module: ModuleSpec) -> None:
        """Moves shares through a module that is finished: rows of the source, then rows of the quantised model."""
        block = self.run.load(module)
        for s in shares:
            if len(s.other):
                s.other = self.run.advance(block, s.other)
        if module.linears:
            packed = self.run.packed(self.chain.kind, module, self.chain.hashes[module.index])
            for key, p in packed.items():
                block.set_weight(key, dequantize(p, self.run.device))
        for s in shares:
            s.x = self.run.advance(block, s.x)
            s.index += 1

    # ---- one module --------------------------------------------------------------------------------------------

    def quantize(self, index: int, params: Mapping[str, QParams]) -> tuple[dict[str, Any], str]:
        """Quantises one module with the group: payload of its record, and a few words for the display.

        params: linear key -> option. Nobody goes on before the record is durable.
        """
        module, run = self.run.spec.modules[index], self.run
        self._go_to(index)
        block = run.load(module)
        payload: dict[str, Any] = {"options": option_names({x.key: params[x.key] for x in module.linears})}
        if module.kind == "head":
            payload["reference_perplexity"] = self._perplexity(block, "other", self.other_rows)
        x, other = ({s: t.tensors()[name] for s, t in self.shares.items()} for name in ("x", "other"))
        if self._lets_go(module):
            self.shares = {}  # after an error they are restored
        rows, tokens = run.rows("quantize").shape
        settings = run.settings(module, max(map(len, self.rows)), tokens)
        files = PackedFiles(run.writers, self.chain.kind, module.profile_key, self.chain.hashes[index])
        result = quantize_module(block, x, other, rows, params, settings, check_states, files, self.comm)
        payload["notes"] = result.notes
        if result.experts:
            payload["experts"] = result.experts
        if result.error is None:
            payload["perplexity"] = self._perplexity(block, "x", self.rows)
            self._commit(module, payload, files)
            quantised, source = (perplexity(payload[n]) for n in PERPLEXITIES)
            return payload, f"perplexity {quantised} (source {source})"
        payload["error"] = result.error
        self._commit(module, payload, files)
        self.shares = {s: Share(index + 1, out, result.other[s]) for s, out in result.x.items()}
        if self.checkpoints.due():
            tensors: dict[int | None, dict[str, Tensor]] = {s: h.tensors() for s, h in self.shares.items()}
            self.checkpoints.save(self.chain, index + 1, tensors, index + 1)
        return payload, f"error {result.error:.5f}"

    def _lets_go(self, module: ModuleSpec) -> bool:
        """Whether states before a module are given up while it is quantised: those in main memory, so that it holds two sets.
        A group keeps them, so that a member that is lost does not cost the others theirs."""
        in_memory = all(share.x.device.type == "cpu" for share in self.shares.values())
        return in_memory and self.comm.size == 1 and module.kind != "head"

    def _commit(self, module: ModuleSpec, payload: dict[str, Any], packed: PackedFiles) -> None:
        """Waits until all files are written; the first member writes the record."""
        mine = {key: future.result() for key, future in packed.flush().items()}
        files: dict[str, FileRef] = {}
        for member in self.comm.gather(mine):
            files.update(member)
        if self.comm.rank == 0:
            inputs_hash = self.chain.hashes[module.index]
            ordered = tuple(files[x.key] for x in module.linears if x.key in files)
            self.run.records.commit(Record(self.chain.kind, module.profile_key, inputs_hash, payload, ordered))
        self.comm.gather(None)

    def _perplexity(self, head: Block, name: Literal["x", "other"], ranges: Sequence[range]) -> float | None:
        """Of the reported ones among the rows ``ranges`` of the shares, whose normed states are ``name``; by all members."""
        mine, ids = [], self.run.rows("quantize")[: self.reported]
        for s, share in self.shares.items():
            own = ids[ranges[s].start : ranges[s].stop]
            mine.append((s, perplexity_sums(head, share.tensors()[name][: len(own)], own)))
        return perplexity_of([v for _, v in sorted(x for member in self.comm.gather(mine) for x in member)])
