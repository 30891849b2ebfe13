"""The story of a tuning.

    open      the EXL2 model and its source                                  exl2ray.tune.opening
    rows      text to tune on, a part held out                               exl2ray.tune.rows
    train     steps of Adam on KL(source || model)                           exl2ray.tune.training
    decide    norms, attention, MLPs, head: what gains on held-out text    exl2ray.tune.judge
    write     the same tensors, the tuned ones in their place                exl2ray.tune.output
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.calibration.data.sources import WRITTEN, Source
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.calibration.tokenizer_files import has_tokenizer
from exl2ray.errors import NumericError, SourceError
from exl2ray.events import Reporter
from exl2ray.formats.shards import Shard
from exl2ray.formats.target import Owner, locked, release_target
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.store.records import hash_inputs
from exl2ray.tune import judge, state
from exl2ray.tune.documents import Kind
from exl2ray.tune.grid import REACH
from exl2ray.tune.memory import check_memory
from exl2ray.tune.module import NORMS
from exl2ray.tune.opening import Pair, load_finished, load_source, load_tuned, open_pair, trainable
from exl2ray.tune.output import Produce, finished, write_record, write_tuned
from exl2ray.tune.rows import TuningRows, batches, naming, tuning_rows
from exl2ray.tune.training import Rates, Trainer, schedule
from exl2ray.tune.written import self_written

VERSION = 3  # of what equal settings come to
WORK = ".exl2ray-tune"  # in the output directory, until it is complete
EVALUATIONS = 8
PATIENCE = 4  # evaluations in a row that are worse than the best one
HOPELESS = math.log(2)  # worse than the best score by that much
STAGE = "tune"
PLACES = ("directory", "reference", "output", "sources", "work", "text_flag", "written")  # settings that no byte depends on


@dataclass(frozen=True)
class Settings:
    """directory: the EXL2 model. reference: its source. output: where the tuned one goes. sources: text; none: built-in.

    tokens: to train on. length: of a row. step_tokens: of a step. rate: of Adam, for latents in steps of the grid; gain_rate:
    for norms and biases, relative to their size. reach: how far latents may begin from their integers. dtype: of the
    products; None: float32 on CPUs, bfloat16 elsewhere. work: folder for what is not finished, beside it (its name and .json)
    a record of what is; None: in the output, hidden. text_flag: what messages about the text call it. written: work
    directory that keeps what the source writes; None: ``work``, where it stays for a finished tuning that is run again.
    """

    directory: str
    reference: str
    output: str
    sources: tuple[Source, ...] = ()
    tokens: int = 1_000_000
    length: int = 1024
    step_tokens: int = 8192
    rate: float = 2e-3
    gain_rate: float = 2e-3
    reach: float = REACH
    warmup: int = 20
    seed: int = 0
    checkpoint_seconds: float = 60.0
    dtype: torch.dtype | None = None
    work: str | None = None
    text_flag: str = "--text"
    written: str | None = None

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        return self.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


@dataclass(frozen=True)
class Tuned:
    """kept: what of the training is in the output, in words (`exl2ray.tune.judge`). before, after: KL by kind of held-out
    text; with "mean" over all of it. changed: share of the integers. worse: kinds of text for the sake of which nothing was
    kept. peak_bytes: of the GPU's memory; 0 without one. seconds: by part."""

    directory: str
    kept: str
    ratio: float
    steps: int
    tokens: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    changed: float
    worse: tuple[str, ...]
    file_bytes: int
    peak_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def tune(settings: Settings, device: torch.device, reporter: Reporter, owner: Owner | None = None) -> Tuned:
    """Writes the tuned model. Raises Exl2RayError; what is done survives a kill, and the same call goes on; a finished one
    computes and writes nothing. owner: who writes into the output (`exl2ray.formats.target`); None: this tuning."""
    clock = _Clock()
    if device.type == "cuda":  # products with one workspace, so that torch may be asked for what is reproducible
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    pair = open_pair(settings.directory, settings.reference)
    with naming(settings.text_flag):
        rows = _rows(settings, pair, device, reporter)
    for note in rows.notes:
        reporter.event("note", message=note)
    clock.lap("text")
    identity = _identity(settings, pair, rows, device)
    target = Path(settings.output)
    work = Path(settings.work or target / WORK)
    record = work.with_name(f"{work.name}.json")
    owner = owner or Owner(pair.exl2.fingerprint(), str(pair.start.path), identity, os.path.abspath(work))
    with locked(target, owner), torch.no_grad():
        done = finished(record, identity, pair.start.path, target)
        if done is not None:
            release_target(target)  # a run that was killed at its very end left the claim
            reporter.event("note", message=f"{target} has the tuned model already")
            return Tuned(**{**done, "directory": settings.output, "worse": tuple(done["worse"])})
        check_memory(pair.start.spec, device)
        trainer = _load(pair, settings, device, reporter)
        clock.lap("load")
        progress = _train(trainer, settings, rows, identity, open_store(str(work)), reporter)
        clock.lap("train")
        result, shards = _finish(trainer, pair, settings, rows, progress, owner, clock)
        write_record(record, identity, target, asdict(result), shards)
        if (work / "written").is_dir():  # for the same call again
            state.forget(open_store(str(work)))
        else:
            shutil.rmtree(work, ignore_errors=True)
    return result


def _rows(settings: Settings, pair: Pair, device: torch.device, reporter: Reporter) -> TuningRows:
    folder = next((m for m in (pair.start, pair.source) if has_tokenizer(m.path)), None)
    if folder is None:
        raise SourceError(
            f"{pair.start.path} and {pair.source.path} have no tokenizer.json", "copy it into one of them: text needs it"
        )
    with load_tokenizer(folder.path, folder.source.config, folder.vocab_size) as tokenizer:
        written = _written(settings, pair, tokenizer, device, reporter)
        return tuning_rows(
            settings.sources, tokenizer, settings.tokens, settings.length, pair.start.vocab_size, pair.start.bos_id,
            settings.seed, written,
        )  # fmt: skip


def _written(
    settings: Settings, pair: Pair, tokenizer: ModelTokenizer, device: torch.device, reporter: Reporter
) -> list[Kind]:
    """What the source writes itself, if the text asks for it: as many tokens as are named, or as are tuned on."""
    counts = [s.given.partition(":")[2] for s in settings.sources if s.name == WRITTEN and not s.files]
    if not counts:
        return []
    tokens = sum(int(c) if c else settings.tokens for c in counts)
    work = settings.work or os.path.join(settings.output, WORK)
    root, kind = (work, "written") if settings.written is None else (settings.written, "quant/written")
    return self_written(
        pair.source, tokenizer, tokens, settings.length, settings.seed, device, open_store(root), kind, reporter
    )


def _identity(settings: Settings, pair: Pair, rows: TuningRows, device: torch.device) -> str:
    """Of all that the bytes of the result depend on."""
    kept = {k: v for k, v in asdict(settings).items() if k not in PLACES}
    kept = {**kept, "dtype": str(settings.compute_dtype(device)), "checkpoint_seconds": None}
    return hash_inputs(
        version=VERSION, settings=kept, start=pair.exl2.fingerprint(), source=pair.source.source.fingerprint(),
        rows=_digest(rows), device=device.type,
    )  # fmt: skip


def _digest(rows: TuningRows) -> str:
    digest = hashlib.sha256()
    for ids in (rows.ids, rows.held_ids):
        digest.update(f"{tuple(ids.shape)}".encode())
        digest.update(ids.contiguous().numpy().data)
    return digest.hexdigest()


def _load(pair: Pair, settings: Settings, device: torch.device, reporter: Reporter) -> Trainer:
    dtype = settings.compute_dtype(device)
    modules = [load_tuned(pair, module, device, dtype, settings.reach) for module in pair.start.spec.modules]
    integers, others = trainable(modules)
    trainer = Trainer(modules, load_source(pair, device), device, int(pair.start.bos_id is not None))
    attention = "fused" if trainer.fused else "plain"
    message = f"tuning {integers:,} integers, {others:,} values of norms and biases; {dtype}, {attention} attention"
    reporter.event("note", message=message.replace("torch.", ""))
    return trainer


def _train(
    trainer: Trainer, settings: Settings, rows: TuningRows, identity: str, store: Store, reporter: Reporter
) -> state.Progress:
    size = min(len(rows.ids), max(1, settings.step_tokens // settings.length))
    steps = max(1, settings.tokens // (size * settings.length))
    order = batches(len(rows.ids), size, steps, settings.seed)
    source = trainer.source_states(rows.held_ids)
    progress = state.restore(store, identity, trainer.modules) or state.Progress(identity)
    every = max(1, -(-steps // EVALUATIONS))
    start, saved = time.monotonic(), time.monotonic()
    reporter.event("stage", stage=STAGE, items=steps, done=progress.step)

    def judged() -> None:
        _judged(progress, trainer, trainer.evaluate(rows.held_ids, source), rows.held_kinds, reporter, steps)

    if not progress.scores:
        judged()
    while progress.step < steps and not progress.stopped:
        begun = time.monotonic()
        factor = schedule(progress.step, steps, min(settings.warmup, max(1, steps // 5)))
        loss = trainer.step(rows.ids[order[progress.step]], Rates(settings.rate, settings.gain_rate, factor))
        progress.step += 1
        if progress.step % max(1, steps // 50) == 0 or progress.step == steps:
            detail = f"KL {_finite(float(loss), progress.step):.4f}"
            reporter.event(
                "item", stage=STAGE, key=f"step {progress.step}", done=progress.step, items=steps,
                seconds=time.monotonic() - begun, detail=detail,
            )  # fmt: skip
        if progress.step % every == 0 or progress.step == steps:
            judged()
        if time.monotonic() - saved > settings.checkpoint_seconds:
            state.save(store, progress, trainer.modules)
            saved = time.monotonic()
    if trainer.recording.problem:
        message = f"steps could not be recorded for replay, and were launched one by one: {trainer.recording.problem}"
        reporter.event("note", message=message)
    reporter.event("end", stage=STAGE, seconds=time.monotonic() - start)
    return progress


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise NumericError(f"step {step} of tuning: the divergence is {loss}", "a lower --rate may help; please report it")
    return loss


def _judged(
    progress: state.Progress, trainer: Trainer, found: Tensor, kinds: tuple[str, ...], reporter: Reporter, steps: int
) -> None:
    """Takes note of a score; of the best state a snapshot is kept, and training that only makes it worse ends."""
    progress.start = progress.start or found.tolist()
    start = torch.tensor(progress.start, dtype=torch.float64)
    best = progress.scores[progress.best][1:] if progress.best >= 0 else (True, math.inf)
    standing = judge.standing(start, found, kinds)
    progress.scores.append((progress.step, *standing))
    if standing < best:
        progress.best = len(progress.scores) - 1
        progress.snapshots = {m.key: m.snapshot() for m in trainer.modules}
    since = len(progress.scores) - 1 - progress.best
    progress.stopped = since >= PATIENCE or standing[1] > best[1] + HOPELESS
    ratio = math.exp(standing[1] - progress.scores[0][2])
    lost = judge.worse(start, found, kinds)
    message = f"step {progress.step} of {steps}: held-out KL {math.exp(standing[1]):.4f}, {ratio:.3f} times that of the start"
    message += f"; worse on {', '.join(lost)}" if lost else ""
    reporter.event("note", message=message + ("; stopped here" if progress.stopped and progress.step < steps else ""))


def _finish(
    trainer: Trainer, pair: Pair, settings: Settings, rows: TuningRows, progress: state.Progress, owner: Owner, clock: _Clock
) -> tuple[Tuned, list[Shard]]:
    device, kinds, snapshots = trainer.device, rows.held_kinds, progress.snapshots
    blocks = load_finished(pair, device)
    source = trainer.source_states(rows.held_ids)
    before = trainer.evaluate(rows.held_ids, source, blocks)

    def evaluated(parts: frozenset[str]) -> Tensor:
        for module, block in zip(trainer.modules, blocks, strict=True):
            module.install_in(block, snapshots[module.key], parts)
        return trainer.evaluate(rows.held_ids, source, blocks)

    there = set().union(*(m.parts for m in trainer.modules))
    verdict = judge.decide(before, [p for p in judge.PARTS if p in there], evaluated, kinds)
    clock.lap("decide")
    changes = (m.changed_share(snapshots[m.key], verdict.kept) for m in trainer.modules)
    changed, total = (sum(n) for n in zip(*changes, strict=True))
    steps, tokens = progress.scores[progress.best][0], len(rows.ids) * rows.ids.shape[1]
    facts = {
        "kept": verdict.words, "steps": steps, "tokens": tokens, "kl_before": float(before.mean()),
        "kl_after": float(verdict.rows.mean()),
    }  # fmt: skip
    shards = write_tuned(pair.exl2, Path(settings.output), owner, _tensors(trainer, progress, verdict.kept), facts)
    clock.lap("write")
    result = Tuned(
        settings.output, verdict.words, verdict.ratio, steps, tokens, _figures(before, kinds), _figures(verdict.rows, kinds),
        changed / max(1, total), verdict.worse, sum(s.size for s in shards),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, clock.laps,
    )  # fmt: skip
    return result, shards


def _tensors(trainer: Trainer, progress: state.Progress, parts: tuple[str, ...]) -> dict[str, Produce]:
    """Name in the file -> what makes the tuned tensor."""
    out: dict[str, Produce] = {}
    for module in trainer.modules:
        found = progress.snapshots[module.key]
        for key, x in module.linears.items():
            if module.part_of(key) in parts:
                out[f"{key}.q_weight"] = lambda x=x, c=found.codes[key]: x.grid.packed(x.before, c).q_weight  # type: ignore[misc]
        for name, gain in module.gains.items():
            if NORMS in parts:
                before = next((x.before.bias for key, x in module.linears.items() if key == gain.role), None)
                value = gain.value(found.deltas[name].to(gain.scale.device)).cpu()
                out[name] = lambda v=value, b=before: v if b is None else torch.cat([v, b[len(v) :]])  # type: ignore[misc]
    return out


def _figures(rows: Tensor, kinds: tuple[str, ...]) -> dict[str, float]:
    return {**judge.by_kind(rows, kinds), "mean": float(rows.mean())}


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
