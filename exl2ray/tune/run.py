"""The story of a tuning.

    open      the EXL2 model and its source                                  exl2ray.tune.opening
    rows      text to tune on, a part held out                               exl2ray.tune.rows
    train     steps of Adam on KL(source || model), by one worker or several exl2ray.tune.worker -> exl2ray.tune.training
    decide    norms, attention, MLPs, head: what gains on held-out text      exl2ray.tune.judge
    write     the same tensors, the tuned ones in their place                exl2ray.tune.output
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl2ray.calibration.data.sources import BUILTIN, WRITTEN
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.calibration.tokenizer_files import has_tokenizer
from exl2ray.errors import JobMismatchError, SourceError, UsageError
from exl2ray.evaluate.result import model_size
from exl2ray.events import Reporter
from exl2ray.formats.claim import TUNING, read_claim
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.shards import LEFTOVER_NAME, Shard
from exl2ray.formats.target import Owner, check_target, locked, release_target
from exl2ray.model.spec import LinearSpec
from exl2ray.quant.group import Solo
from exl2ray.store.apart import refuse_within
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.store.records import hash_inputs
from exl2ray.tune import judge, state
from exl2ray.tune.documents import Kind
from exl2ray.tune.driving import trained
from exl2ray.tune.grid import Grid
from exl2ray.tune.inputs import Inputs
from exl2ray.tune.memory import check_memory
from exl2ray.tune.module import NORMS, part_of
from exl2ray.tune.opening import Pair
from exl2ray.tune.output import SIDE_BY_SIDE, Produce, finished, is_of_another, refuse_another, write_record, write_tuned
from exl2ray.tune.rows import TuningRows, check_text, naming, tuning_rows
from exl2ray.tune.settings import PLACES, Settings, Where
from exl2ray.tune.written import self_written
from exl2ray.wording import some

VERSION = 8  # of what equal settings come to
WORK = TUNING  # in the output directory, until it is complete


@dataclass(frozen=True)
class Tuned:
    """kept: what of the training is in the output, in words (`exl2ray.tune.judge`). before, after: KL by kind of held-out
    text, also of kinds that are only watched; with "mean" over the others. changed: share of the integers. worse: kinds of
    text for the sake of which nothing was kept. peak_bytes: of the GPU's memory; 0 without one. seconds: by part."""

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


def tune(
    settings: Settings, device: torch.device, reporter: Reporter, owner: Owner | None = None, where: Where | None = None
) -> Tuned:
    """Writes the tuned model. Raises Exl2RayError; what is done survives a kill, and the same call goes on; a finished one
    computes and writes nothing. owner: who writes into the output (`exl2ray.formats.target`); None: this tuning. where: None:
    in this process. The bytes do not depend on the number of workers."""
    clock = _Clock()
    inputs = Inputs(settings.directory, settings.reference)
    pair = inputs.pair
    for message in pair.source.as_reference():
        reporter.event("warning", message=message)
    bits = model_size(pair.start).linears_bpw
    written_length = settings.row_length  # the same for all bitrates: what the source writes serves several
    settings = settings.for_model(pair.start.spec.weights, bits)
    check_memory(pair.start.spec, device)
    target = Path(settings.output)
    work = Path(settings.work or target / WORK)
    _refuse_inputs(pair, target, "-cf" if owner is not None else "-o")
    record, asked = work.with_name(f"{work.name}.json"), _asked(settings, pair, device)

    def owned(identity: str) -> Owner:
        return owner or Owner(pair.exl2.fingerprint(), str(pair.start.path), identity, os.path.abspath(work), flag="-o")

    # Text that the source writes takes minutes: what can be refused without it is refused before.
    claim = read_claim(target)
    with locked(target, owned(claim.job if claim is not None else "")):
        if settings.work is None:
            refuse_another(record, "asked", asked, target)
        _sweep(work, record)
        reporter.event("note", message=f"reading the text to tune on: {_places(settings)}")
        with naming(settings.text_flag):
            rows = _rows(settings, written_length, pair, device, reporter)
        settings = settings.for_rows(len(rows.ids), bits, pair.start.spec.weights)
        for note in rows.notes:
            reporter.event("note", message=note)
        clock.lap("text")
        identity = _identity(settings, pair, rows, device)
        check_target(target, owned(identity))
        done = _as_told(finished(record, identity, pair.start.path, target), settings.output)
        if done is not None:
            release_target(target)  # a run that was killed at its very end left the claim, and what it had worked with
            if work.is_dir():
                _clear(work)
            reporter.event("note", message=f"{target} has the tuned model already")
            return done
        if settings.work is None:
            refuse_another(record, "identity", identity, target)
            _refuse_unfinished(work, identity, target)
        elif is_of_another(record, identity):
            message = f"{target} was tuned with other settings, or by an earlier version: it is tuned again"
            reporter.event("note", message=message)
        store = open_store(os.path.abspath(work))
        with _watched(inputs, store, identity, reporter) as check:
            decision = trained(settings, rows, identity, store, device, where or Where(), reporter, inputs)
            clock.lap("train")
            clock.laps["decide"] = decision.seconds
            clock.laps["train"] -= decision.seconds
            check()
            saved = state.restore(store, Solo(), identity)
            result, shards = _finish(pair, settings, rows, decision.payload, saved, owned(identity), clock, check)
        names = {"identity": identity, "asked": asked, "start": pair.exl2.fingerprint()}
        write_record(record, names, target, asdict(result), shards)
        _clear(work)
    return result


def _refuse_inputs(pair: Pair, target: Path, flag: str) -> None:
    """UsageError if the output is one of the models that it is made from, or lies where a work directory keeps its own."""
    for model, what in ((pair.start, "the model to be tuned"), (pair.source, "the reference")):
        if os.path.realpath(target) == os.path.realpath(model.path):
            hint = "give another folder: what is tuned is written beside it, and the model stays as it is"
            raise UsageError(f"{flag} {target}: is {what} itself", hint)
    if flag == "-o":  # -cf was looked at with the conversion
        refuse_within(flag, target)


def _refuse_unfinished(work: Path, identity: str, target: Path) -> None:
    """JobMismatchError if steps of another tuning are kept there: they may have taken hours, and would be overwritten."""
    steps = state.steps_of_another(work / state.FILE, identity)
    if steps:
        raise JobMismatchError(
            f"{target}: holds a tuning that is not finished ({steps} steps), with other settings or other text, of another "
            "start or by an earlier version",
            f"its own command goes on with it; else give another -o, or remove {shlex.quote(str(work))} to begin anew",
        )


@contextmanager
def _watched(inputs: Inputs, store: Store, identity: str, reporter: Reporter) -> Iterator[Callable[[], None]]:
    """Yields what raises JobMismatchError if a model is another one by now. What cannot be decided is told once."""
    told: set[str] = set()

    def tell(notes: list[str]) -> None:
        for note in dict.fromkeys(n for n in notes if n not in told):
            told.add(note)
            reporter.event("warning", message=note)

    try:
        tell(inputs.begin(store, identity))
        yield lambda: tell(inputs.check())
    finally:
        inputs.close()


def _sweep(work: Path, record: Path) -> None:
    """Removes the temporary files of runs that were killed."""
    store = open_store(os.path.abspath(work))
    store.sweep(store.entries())
    with suppress(OSError):
        for path in record.parent.glob(f".{record.name}.*"):
            if LEFTOVER_NAME.fullmatch(path.name):
                path.unlink()


def _as_told(found: Mapping[str, Any] | None, directory: str) -> Tuned | None:
    """What a record says of a finished tuning; None if it is none."""
    try:
        if found is None:
            return None
        out = Tuned(**{**found, "directory": directory, "worse": tuple(map(str, found["worse"]))})
        means = (out.before[judge.MEAN], out.after[judge.MEAN])
        numbers = (*means, *out.before.values(), *out.after.values(), *out.seconds.values(), out.changed)
        sizes = (out.tokens, out.file_bytes, out.peak_bytes)
        sound = all(isinstance(v, (int, float)) for v in numbers) and all(isinstance(v, int) for v in sizes)
    except (TypeError, KeyError, AttributeError):
        return None
    return out if sound else None


def _clear(work: Path) -> None:
    """Leaves what the source has written, for the same call again."""
    kept = work / "written"
    for path in work.iterdir() if kept.is_dir() else [work]:
        if path.is_dir() and path != kept:
            shutil.rmtree(path, ignore_errors=True)
        elif path != kept:
            path.unlink(missing_ok=True)


def _places(settings: Settings) -> str:
    return some([s.given for s in settings.sources], 4) if settings.sources else BUILTIN


def _rows(
    settings: Settings, written_length: int, pair: Pair, device: torch.device, reporter: Reporter
) -> TuningRows:
    folder = next((m for m in (pair.start, pair.source) if has_tokenizer(m.path)), None)
    if folder is None:
        raise SourceError(
            f"{pair.start.path} and {pair.source.path} have no tokenizer.json", "copy it into one of them: text needs it"
        )
    with load_tokenizer(folder.path, folder.source.config, folder.vocab_size) as tokenizer:
        if _tokens_to_write(settings):  # minutes would go by before other text is refused
            start = pair.start
            check_text(settings.sources, tokenizer, settings.row_length, start.vocab_size, start.bos_id, settings.text_flag)
        written = _written(settings, written_length, pair, tokenizer, device, reporter)
        return tuning_rows(
            settings.sources, tokenizer, settings.tokens, settings.row_length, pair.start.vocab_size, pair.start.bos_id,
            settings.seed, written, settings.text_flag,
        )  # fmt: skip


def _written(
    settings: Settings, length: int, pair: Pair, tokenizer: ModelTokenizer, device: torch.device, reporter: Reporter
) -> list[Kind]:
    """What the source writes itself, if the text asks for it: as many tokens as are named, and no more than are tuned on."""
    tokens = _tokens_to_write(settings)
    if not tokens:
        return []
    asked = sum(_counts(settings))
    if asked > tokens:
        reporter.event("note", message=f"the source writes {tokens} tokens: as many as are tuned on, and not {asked}")
    work = settings.work or os.path.join(settings.output, WORK)
    root, kind = (work, "written") if settings.written is None else (settings.written, "quant/written")
    return self_written(
        pair.source, tokenizer, tokens, length, settings.seed, device, open_store(root), kind, reporter
    )


def _counts(settings: Settings) -> list[int]:
    """Tokens that the source is asked to write, by place of text."""
    counts = [s.given.partition(":")[2] for s in settings.sources if s.name == WRITTEN and not s.files]
    return [int(c) if c else settings.tokens for c in counts]


def _tokens_to_write(settings: Settings) -> int:
    return min(sum(_counts(settings)), settings.tokens)


def _asked(settings: Settings, pair: Pair, device: torch.device) -> str:
    """Of what two tunings with other values of cannot be the same, whatever their text; known before there is any."""
    by_text = ("passes", "rate", "gain_rate")  # it may decide on them
    kept = {k: v for k, v in _kept(settings, device).items() if k not in by_text}
    return hash_inputs(
        version=VERSION, settings=kept, start=pair.exl2.fingerprint(), source=pair.source.source.fingerprint(),
        written=_tokens_to_write(settings), device=device.type,
    )  # fmt: skip


def _kept(settings: Settings, device: torch.device) -> dict[str, Any]:
    kept = {k: v for k, v in asdict(settings).items() if k not in PLACES}
    return {**kept, "dtype": str(settings.compute_dtype(device)), "checkpoint_seconds": None}


def _identity(settings: Settings, pair: Pair, rows: TuningRows, device: torch.device) -> str:
    """Of all that the bytes of the result depend on."""
    kept = _kept(settings, device)
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


def _finish(
    pair: Pair, settings: Settings, rows: TuningRows, decision: Mapping[str, Any], saved: state.Saved | None, owner: Owner,
    clock: _Clock, check: Callable[[], None],
) -> tuple[Tuned, list[Shard]]:  # fmt: skip
    assert saved is not None
    kinds, steps, tokens = rows.held_kinds, int(decision["steps"]), len(rows.ids) * rows.ids.shape[1]
    before, after = (torch.tensor(decision[name], dtype=torch.float64) for name in ("before", "after"))
    at_start, at_end = (judge.figures(rows, kinds) for rows in (before, after))
    facts = {"kept": decision["words"], "steps": steps, "tokens": tokens, "passes": settings.passes}
    facts |= {"kl_before": at_start[judge.MEAN], "kl_after": at_end[judge.MEAN]}
    tensors, changed, total = _tensors(pair, saved, decision["kept"])
    shards = write_tuned(pair.exl2, Path(settings.output), owner, tensors, facts, check)
    clock.lap("write")
    result = Tuned(
        settings.output, decision["words"], decision["ratio"], steps, tokens, at_start, at_end,
        changed / max(1, total), tuple(decision["worse"]), sum(s.size for s in shards), decision["peak_bytes"], clock.laps,
    )  # fmt: skip
    return result, shards


def _tensors(pair: Pair, saved: state.Saved, parts: list[str]) -> tuple[dict[str, Produce], int, int]:
    """Name in the file -> what makes the tuned tensor; integers that changed, and all that there are."""
    out: dict[str, Produce] = {}
    given: list[tuple[LinearSpec, Tensor, bool]] = []
    values: dict[str, Tensor] = {}
    for module in pair.start.spec.modules:
        found = saved.best(module.profile_key)
        values.update(found.values)
        tuned = {x.key: part_of(module, x) in parts for x in module.linears}
        given += [(x, found.codes[x.key], tuned[x.key]) for x in module.linears if x.key in found.codes]
    changed = total = 0
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        compared = pool.map(partial(_compared, pair), given)
        for (linear, codes, is_tuned), (packed, grid, count) in zip(given, compared, strict=True):
            total += codes.numel()
            changed += count
            if is_tuned:
                out[f"{linear.key}.q_weight"] = lambda g=grid, p=packed, c=codes: g.packed(p, c).q_weight  # type: ignore[misc]
            if packed.bias is not None and NORMS in parts:
                value = values[f"{linear.key}.bias"]
                out[f"{linear.key}.bias"] = lambda v=value, b=packed.bias: torch.cat([v, b[len(v) :]])  # type: ignore[misc]
    if NORMS in parts:
        out.update({n: lambda v=v: v for n, v in values.items() if n not in out})  # type: ignore[misc]
    return out, changed, total


def _compared(pair: Pair, given: tuple[LinearSpec, Tensor, bool]) -> tuple[PackedLinear, Grid, int]:
    """A linear as it was packed, its grid, and how many integers are others now if it ``is_tuned``."""
    linear, codes, is_tuned = given
    packed = pair.exl2.linear(linear.key)
    grid = Grid.of(packed, linear.out_features, torch.device("cpu"))
    return packed, grid, int((codes != grid.codes(grid.integers(packed))).sum()) if is_tuned else 0


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
