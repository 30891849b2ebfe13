"""The recipe of a conversion: what the user asked for, checked, frozen, and split by what depends on it.

Whatever is known of a setting stands in its field, and nowhere else: type and default, and beside them (`setting`) the flag
as the reference spells it, help text, what its values must be, and which entries of job.json hold it. The flags of the
command line (`exl2ray.terminal.flags`), docs/cli.md, the messages about a job with other settings and the command on a model
card follow from there. Help texts are listed by section, in the order of the fields.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from exl2ray.calibration.data.sources import from_anywhere
from exl2ray.errors import UsageError
from exl2ray.formats.layout import WIDTHS as HEAD_BITS
from exl2ray.given_paths import refuse_address, refuse_unfit, refuse_unknown_fields
from exl2ray.quality import ALLOCATIONS, Allocated, Numerics, Quality, ScaleSearch, resolve
from exl2ray.recipe_fields import Rule, Setting, setting, settings_of
from exl2ray.units import parse_count, parse_size

USUAL_HEAD_BITS = 6
BEST_TUNE = "1M"  # tokens of --tune that --quality best asks for
MIN_BITS, MAX_BITS = 2.0, 9.0  # outside of this no option table reaches; the exact range depends on the model
LENGTH_STEP = 128
RUN = "run"  # entry of "output" in job.json with what is kept of a run, compared with nothing (`exl2ray.store.job_file`)
MIN_SHARD, MAX_SHARD = 0.001, 2.0**30  # MiB; more than the one and less than the other has no file

FILES, QUANTISE, CALIBRATE, AFTER, PLACE = SECTIONS = (  # of the help text
    "Model and files", "Quantisation", "Calibration", "Afterwards", "Where it runs",
)  # fmt: skip


def _up_to(most: float) -> Rule:
    return lambda v: 0 <= v <= most, f"must lie between 0 and {most:g}"


_POWER: Rule = (lambda v: 0.05 <= v <= 50, "must be from 0.05 to 50")  # beyond, powers of errors leave the numbers' range
_POSITIVE: Rule = (lambda v: math.isfinite(v) and v > 0, "must be a positive number")
_ROWS: Rule = (lambda v: v >= 1, "at least one calibration row is needed")
_TOKENS: Rule = (lambda v: v >= 1, "a row needs at least one token")
_BITS: Rule = (lambda v: MIN_BITS <= v <= MAX_BITS, f"bits per weight lie between {MIN_BITS:g} and {MAX_BITS:g}")
_HEAD: Rule = (lambda v: v in HEAD_BITS, f"the head can have {', '.join(map(str, HEAD_BITS))} bits")
_SHARD: Rule = (
    lambda v: -math.inf < v <= 0 or MIN_SHARD <= v <= MAX_SHARD,
    f"0 or less for a single file, else the size in MiB, from {MIN_SHARD:g} to {MAX_SHARD:.0f}",
)  # fmt: skip
_GPUS: Rule = (lambda v: v >= 1, "at least one GPU is needed; use --device cpu to run without GPUs")
_SECONDS: Rule = (lambda v: math.isfinite(v) and v >= 0, "must be 0 or a positive number")
_DAMPING: Rule = (lambda v: 0 < v < 10, "must be more than 0 and less than 10")


@dataclass(frozen=True)
class Recipe:
    """Settings of a conversion. Raises UsageError, naming the flag, for values and combinations that cannot be."""

    in_dir: str = field(metadata=setting(
        "-i", "directory of the source model (Hugging Face layout, safetensors), or hf://owner/name, s3:// or gs:// of one.",
        FILES, "MODEL", job="identity.in_dir", decides="identity.fingerprint identity.architecture"))
    out_dir: str = field(metadata=setting(
        "-o", "work directory: measurement, quantised tensors, everything needed to resume. May be s3:// or gs://.",
        FILES, "DIR"))
    bits: tuple[float, ...] = field(default=(4.125,), metadata=setting(
        "-b", "target bits per weight of the decoder layers; may be given several times.",
        QUANTISE, rule=_BITS, job="quantize.bits", measured=False))
    nearest: bool = field(default=False, metadata=setting(
        "--nearest", "where this model cannot have a bitrate, take the nearest that it can.", QUANTISE, measured=False,
        kept=True))
    head_bits: int | None = field(default=None, metadata=setting(
        "-hb", "bits of the output head: 2, 3, 4, 5, 6 or 8; if absent 6, or what --allocation linear finds best.",
        QUANTISE, rule=_HEAD, job="quantize.head_bits", measured=False))
    compile_full: str | None = field(default=None, metadata=setting(
        "-cf", "directory for the complete model: tensors, config, tokenizer. {bpw} stands for the bitrate, {head} for -hb.",
        FILES, "DIR", job="output.compile_full", measured=False))
    # a tuple if there are several
    cal_dataset: str | tuple[str, ...] | None = field(default=None, metadata=setting(
        "-c", "text: Parquet, Arrow, .jsonl, .json, .csv or .txt file, folder, hf://datasets/...; FILE:COLUMN; repeatable.",
        CALIBRATE, "PLACE", decides="identity.cal_dataset measure.cal_dataset quantize.cal_dataset"))
    dataset_rows: int = field(default=100, metadata=setting(
        "-r", "calibration rows of the quantisation pass, with -c.", CALIBRATE, rule=_ROWS, job="quantize.rows"))
    measurement_rows: int = field(default=16, metadata=setting(
        "-mr", "calibration rows of the measurement pass, with -c.", CALIBRATE, rule=_ROWS, job="measure.rows"))
    length: int = field(default=2048, metadata=setting(
        "-l", "tokens per row of the quantisation pass.", CALIBRATE, rule=_TOKENS, job="quantize.length"))
    measurement_length: int = field(default=2048, metadata=setting(
        "-ml", "tokens per row of the measurement pass.", CALIBRATE, rule=_TOKENS, job="measure.length"))
    measurement: str | None = field(default=None, metadata=setting(
        "-m", "reuse this measurement.json.", FILES, "FILE", job="measure.measurement", measured=False))
    output_measurement: str | None = field(default=None, metadata=setting(
        "-om", "write measurement.json here (a file or a directory) and stop after measuring.",
        FILES, "PATH", decides="output.measure_only", kept=True))
    shard_size: float = field(default=8192, metadata=setting(
        "-ss", "largest output file in MiB; 0 for a single file.",
        FILES, rule=_SHARD, job="output.shard_size", measured=False))
    no_resume: bool = field(default=False, metadata=setting(
        "-nr", "start over: delete what exl2ray created in the work directory.", FILES))
    reuse: bool = field(default=False, metadata=setting(
        "--reuse", "accept changed -b, -hb or output settings in an existing work directory and keep the measurement.",
        FILES, measured=False))
    rope_scale: float | None = field(default=None, metadata=setting(
        "-rs", "linear RoPE scaling factor, overriding the model's.", FILES, rule=_POSITIVE, job="identity.rope_scale"))
    rope_alpha: float | None = field(default=None, metadata=setting(
        "-ra", "NTK-alpha RoPE scaling factor.", FILES, rule=_POSITIVE, job="identity.rope_alpha"))
    source_cache: str = field(default="20GB", metadata=setting(
        "--source-cache", "the most that is kept on this disk of weights that -i has elsewhere; 0 keeps none.",
        FILES, "SIZE", kept=True))
    device: Literal["auto", "cuda", "cpu"] = field(default="auto", metadata=setting(
        "--device", "where to compute.", PLACE, kept=True))
    gpus: int | None = field(default=None, metadata=setting(
        "--gpus", "number of GPUs to use; all that Ray offers if absent.", PLACE, rule=_GPUS, kept=True))
    ray_address: str | None = field(default=None, metadata=setting(
        "--ray-address", "attach to this Ray cluster; else $RAY_ADDRESS, else a private local one.", PLACE, "ADDRESS",
        kept=True))
    executor: Literal["auto", "ray", "inline"] = field(default="auto", metadata=setting(
        "--executor", "ray, inline (in this process, one device), or auto: ray for a cluster or several GPUs, else inline.",
        PLACE, kept=True))
    quality: Quality = field(default="balanced", metadata=setting(
        "--quality", "reference: the plain algorithm; balanced: better weights, same size; best: balanced and --tune 1M.",
        QUANTISE, job="quantize.quality", decides="quantize.allocates quantize.numerics", measured=False))
    overrides: tuple[str, ...] = field(default=(), metadata=setting(
        "--set", "PATTERN=BITS or PATTERN=OPTION for linears whose names match; may be given several times.",
        QUANTISE, "PATTERN=BITS", job="quantize.overrides"))
    propagate: Literal["quantized", "reference"] = field(default="quantized", metadata=setting(
        "--propagate",
        "calibrate each module on what the quantised modules before it produce, or on reference states.",
        QUANTISE, job="quantize.propagate", measured=False))
    allocation: Allocated | None = field(default=None, metadata=setting(
        "--allocation",
        "options per module by its own error, or per linear by its effect on the model; else as --quality says.",
        QUANTISE, job="quantize.allocation"))
    objective: Literal["squared", "norm", "product"] = field(default="squared", metadata=setting(
        "--objective", "what the allocation per module minimises over the modules' relative errors.",
        QUANTISE, job="quantize.objective", measured=False))
    objective_power: float = field(default=2.0, metadata=setting(
        "--objective-power", "exponent for --objective norm.",
        QUANTISE, rule=_POWER, job="quantize.objective_power", measured=False))
    target_correction: float | None = field(default=None, metadata=setting(
        "--target-correction",
        "how far weights are fitted to the source model's states, 0 to 1; as --quality says if absent.",
        QUANTISE, rule=_up_to(1), job="quantize.target_correction", measured=False))
    scale_search: ScaleSearch | None = field(default=None, metadata=setting(
        "--scale-search",
        "choose scales by rounding error, or also by the loss after error feedback; else as --quality says.",
        QUANTISE, job="quantize.scale_search", measured=False))
    sweeps: int | None = field(default=None, metadata=setting(
        "--sweeps", "passes of coordinate descent over the rounded weights; as --quality says if absent.",
        QUANTISE, rule=_up_to(20), job="quantize.sweeps", measured=False))
    damping: float = field(default=0.12, metadata=setting(
        "--damping", "added to the Hessian's diagonal, as a share of its mean.",
        QUANTISE, rule=_DAMPING, job="measure.damping"))
    rotate: bool = field(default=False, metadata=setting(
        "--rotate",
        "rotate the residual stream: other weights of the same function and architecture; for models with RMSNorm.",
        QUANTISE, job="identity.rotate"))
    seed: int = field(default=0, metadata=setting(
        "--seed", "of random and shuffled calibration rows.", CALIBRATE, job="measure.seed quantize.seed"))
    chat_rows: bool = field(default=True, metadata=setting(
        "--chat-rows/--no-chat-rows", "render part of the built-in rows with the model's chat template.",
        CALIBRATE, job="measure.chat_rows quantize.chat_rows"))
    builtin_text: Literal["usual", "all"] = field(default="usual", metadata=setting(
        "--builtin-text", "the usual documents, or all of them, with which large vocabularies need no generated text.",
        CALIBRATE, job="measure.builtin_text quantize.builtin_text"))
    moe_all_experts: bool = field(default=False, metadata=setting(
        "--moe-all-experts",
        "collect the Hessians of every expert from all tokens; the forward pass stays as routed.",
        CALIBRATE, job="measure.moe_all_experts quantize.moe_all_experts"))
    score_rows: int | None = field(default=None, metadata=setting(
        "--score-rows",
        "measurement rows for the scores of option tables; if absent 4, but all for -om and --allocation module.",
        CALIBRATE, rule=_ROWS, decides="measure.score_rows", kept=True))
    evaluate: Literal["auto", "always", "never"] = field(default="auto", metadata=setting(
        "--evaluate",
        "perplexity and KL divergence of finished models on held-out text: with several -b, always, or never.",
        AFTER, kept=True))
    eval_text: str | None = field(default=None, metadata=setting(
        "--eval-text", "text, Parquet, .jsonl file, or .npy array of token ids, to evaluate on; a built-in text if absent.",
        AFTER, "FILE", kept=True))
    tune: str | None = field(default=None, metadata=setting(
        "--tune",
        "tokens, as in 4M, to tune each finished model on against the source's own predictions; else as --quality says.",
        AFTER, "TOKENS", job="output.tune", measured=False))
    tune_text: str | tuple[str, ...] | None = field(default=None, metadata=setting(
        "--tune-text",
        "text to tune on: as -c; builtin; self:COUNT, tokens that the source writes; repeatable. If absent -c, else builtin.",
        AFTER, "PLACE", job="output.tune_text", measured=False))
    checkpoint_seconds: float = field(default=120.0, metadata=setting(
        "--checkpoint-seconds", "least time between saved hidden states.", PLACE, rule=_SECONDS, kept=True))

    def __post_init__(self) -> None:
        if isinstance(self.cal_dataset, tuple):  # one is as if it were the only one there can be, none is none
            files = self.cal_dataset
            object.__setattr__(self, "cal_dataset", files if len(files) > 1 else files[0] if files else None)
        if isinstance(self.tune_text, tuple):
            object.__setattr__(self, "tune_text", self.tune_text or None)
        for name, about in SETTINGS.items():
            about.check(getattr(self, name))
        folders = (("-i", self.in_dir), ("-o", self.out_dir), ("-cf", self.compile_full))
        for flag, path in (*folders, ("-m", self.measurement), ("-om", self.output_measurement)):
            refuse_unfit(flag, path or "")
        for flag, path in (("-cf", self.compile_full), ("-om", self.output_measurement)):
            refuse_address(flag, path or "")
        refuse_unknown_fields("-cf", self.compile_full or "")
        parse_size(self.source_cache, "--source-cache")
        if not self.bits:
            raise UsageError("-b: no bitrate given")
        if len(set(self.bits)) != len(self.bits):
            raise UsageError(f"-b: a bitrate is given twice: {', '.join(f'{b:g}' for b in self.bits)}")
        for flag, value in (("-l", self.length), ("-ml", self.measurement_length)):
            if self.cal_dataset is None and value % LENGTH_STEP:
                raise UsageError(
                    f"{flag} {value}: the built-in calibration set needs a multiple of {LENGTH_STEP}",
                    f"use {flag} {max(LENGTH_STEP, value // LENGTH_STEP * LENGTH_STEP)}, or your own data with -c",
                )
        if self.output_measurement is not None and self.compile_full is not None:
            raise UsageError("-om stops after measuring, so -cf would have nothing to write", "drop one of them")
        if self.output_measurement is not None and self.measurement is not None:
            raise UsageError("-m reuses a measurement and -om asks for a new one", "drop one of them")
        if len(self.bits) > 1 and self.compile_full is not None and "{bpw}" not in self.compile_full:
            raise UsageError(
                f"-cf {self.compile_full}: {len(self.bits)} bitrates would write into one directory",
                "put {bpw} into the path, as in -cf out/{bpw}",
            )
        if "{head}" in (self.compile_full or "") and self.head_is_free:
            raise UsageError(
                f"-cf {self.compile_full}: the bits of the head are found with those of the rest, so no name can have them",
                "say what {head} is to be with -hb, or leave it out",
            )
        if self.target_correction and self.propagate == "reference":
            raise UsageError(
                f"--target-correction {self.target_correction:g} needs the states of the quantised model",
                "leave out --propagate reference, or --target-correction",
            )
        if self.score_rows is not None and self.allocates == "module":
            raise UsageError(
                f"--score-rows {self.score_rows}: options are chosen per module by these scores, which need all rows",
                "leave out --score-rows, or choose options with --allocation linear",
            )
        implied = self.quality == "best" and self.tune is None
        if implied:
            object.__setattr__(self, "tune", BEST_TUNE)
        self._check_tuning(f"--quality best (--tune {BEST_TUNE})" if implied else "--tune")
        if (size := max(0, self.shard_size)) == int(size):  # neither is 8192.0 a change of 8192, nor -1 one of 0
            object.__setattr__(self, "shard_size", int(size))

    def _check_tuning(self, flag: str) -> None:
        """flag: that asks for tuning, for messages."""
        if self.tune is None:
            if self.tune_text is not None:
                raise UsageError("--tune-text: nothing is tuned without --tune", "say on how many tokens, as in --tune 4M")
            return
        parse_count(self.tune, "--tune")
        if self.compile_full is None and self.output_measurement is None:
            raise UsageError(f"{flag} needs -cf: the tuned models go there", "name a directory with -cf")
        if "://" in self.out_dir:
            raise UsageError(f"{flag} needs a work directory on this machine", "name a local one with -o")
        if self.rope_scale is not None or self.rope_alpha is not None:
            why = "runs the models as their config.json says, without -rs and -ra"
            raise UsageError(f"{flag} {why}", "leave out one of them")

    @property
    def tuning_text(self) -> tuple[str, ...]:
        """Every place of text to tune on; empty for the built-in text."""
        given = self.tune_text
        return given if isinstance(given, tuple) else self.calibration_data if given is None else (given,)

    @property
    def cluster(self) -> str | None:
        """Address of the Ray to attach to, as --ray-address or the environment says; None: nobody names one."""
        return self.ray_address or os.environ.get("RAY_ADDRESS") or None

    @property
    def shard_bytes(self) -> int:
        """Largest size of an output file in bytes; 0 for a single one."""
        return int(self.shard_size * 2**20)

    @property
    def calibration_data(self) -> tuple[str, ...]:
        """Every -c, in order; empty for the built-in set."""
        given = self.cal_dataset
        return given if isinstance(given, tuple) else () if given is None else (given,)

    @property
    def most_tokens(self) -> int:
        """The number of tokens of the larger of the two passes, with -c."""
        return max(self.measurement_rows * self.measurement_length, self.dataset_rows * self.length)

    @property
    def calibration_name(self) -> str | None:
        """The names of the data without their folders, for cards; None for the built-in set."""
        return ", ".join(map(place_name, self.calibration_data)) or None

    @property
    def numerics(self) -> Numerics:
        """What --quality and the flags beside it come to."""
        return resolve(self.quality, self.propagate, self.target_correction, self.scale_search, self.sweeps)

    @property
    def allocates(self) -> Allocated:
        """What --allocation, or --quality without it, comes to."""
        return self.allocation or ALLOCATIONS[self.quality]

    @property
    def evaluates(self) -> bool:
        """Whether finished models are evaluated: asked for, or a ladder of several complete models."""
        several = self.evaluate == "auto" and len(self.bits) > 1
        return self.compile_full is not None and (self.evaluate == "always" or several)

    @property
    def head_is_free(self) -> bool:
        """Whether the allocation chooses the bits of the head."""
        return self.allocates == "linear" and self.head_bits is None

    @property
    def usual_head_bits(self) -> int:
        """Bits of the head, or those whose space the allocation may share out between the head and the decoder."""
        return USUAL_HEAD_BITS if self.head_bits is None else self.head_bits

    def output_dir(self, bits: float) -> str | None:
        """Directory of the complete model at one bitrate; None without -cf."""
        path = self.compile_full
        return None if path is None else path.replace("{bpw}", bpw_name(bits)).replace("{head}", str(self.usual_head_bits))

    def job(
        self, identity: dict[str, Any], calibration: str | None, quantising: str | None = None
    ) -> dict[str, dict[str, Any]]:
        """The sections of job.json, on whose hashes resuming depends.

        ``identity`` has what the source adds (its fingerprint, ...), ``calibration`` is the hash of the data of -c, and
        ``quantising`` that of what the quantisation pass takes of it, if that is another one.
        """
        job: dict[str, dict[str, Any]] = {
            "identity": {},
            "measure": {"cal_dataset": calibration},
            "quantize": {
                "cal_dataset": quantising or calibration,
                "allocates": self.allocates,
                "numerics": asdict(self.numerics),
            },
            "output": {"measure_only": self.output_measurement is not None},
        }
        for name, about in SETTINGS.items():
            value = self._stored(name)
            if (name in ("rotate", "overrides", "tune", "tune_text") and not value) or value == "usual":
                continue  # jobs that were begun before there were these have no such entry
            for entry in about.job:
                section, _, key = entry.partition(".")
                job[section][key] = value
        kept = {name: self._stored(name) for name, about in SETTINGS.items() if about.kept}
        kept = {name: value for name, value in kept.items() if value != SETTINGS[name].default}
        job["output"].update({RUN: kept} if kept else {})
        job["identity"].update(identity)
        return job

    def _stored(self, name: str) -> Any:
        """The value of a field as job.json has it."""
        if name == "head_bits":
            return None if self.head_is_free else self.usual_head_bits
        if name in ("dataset_rows", "measurement_rows") and not self.cal_dataset:
            return None
        if name == "measurement" and self.measurement is not None:
            return str(Path(self.measurement).resolve())
        if name == "output_measurement" and self.output_measurement is not None:
            path = os.path.abspath(self.output_measurement)  # where `measure` writes it if nobody says so is no wish
            return None if path == os.path.join(os.path.abspath(self.out_dir), "measurement.json") else path
        if name == "eval_text" and self.eval_text is not None and "://" not in self.eval_text:
            return os.path.abspath(self.eval_text)
        if name == "compile_full" and self.compile_full is not None:
            return os.path.abspath(self.compile_full)  # a resume may be begun in another folder
        if name == "tune_text" and self.tune_text is not None:
            return [from_anywhere(place) for place in self.tuning_text]
        value = getattr(self, name)
        return list(value) if isinstance(value, tuple) else value


SETTINGS: dict[str, Setting] = settings_of(Recipe)  # every field by name, in the order of ``Recipe``
JOB_FLAGS = {entry: about.flag for about in SETTINGS.values() for entry in (*about.job, *about.decides)}


def place_name(place: str) -> str:
    """The name of a -c without the folders above it; addresses stay whole."""
    return place if "://" in place else place.rstrip("/").rpartition("/")[2] or place


def bpw_name(bits: float) -> str:
    """Name of a bitrate in paths: ``4.0``, ``4.125``."""
    return str(float(bits))
