"""The recipe of a conversion: what the user asked for, checked, frozen, and split by what depends on it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from exl2ray.errors import UsageError
from exl2ray.field_checks import check_fields
from exl2ray.quality import ALLOCATIONS, Allocated, Numerics, Quality, ScaleSearch, resolve
from exl2ray.units import parse_size

HEAD_BITS = (2, 3, 4, 5, 6, 8)
USUAL_HEAD_BITS = 6
MIN_BITS, MAX_BITS = 2.0, 9.0  # outside of this no option table reaches; the exact range depends on the model
LENGTH_STEP = 128
CHOICES = {"--device": "device", "--executor": "executor", "--propagate": "propagate", "--objective": "objective",
           "--allocation": "allocation",
           "--evaluate": "evaluate", "--quality": "quality", "--scale-search": "scale_search"}  # fmt: skip
MAX_SWEEPS = 20
MIN_SHARD, MAX_SHARD = 0.001, 2.0**30  # MiB; more than the one and less than the other has no file


@dataclass(frozen=True)
class Recipe:
    """Settings of `exl2ray convert`; the docstring of each field is the help text of its flag."""

    in_dir: str
    """-i: directory of the source model (Hugging Face layout, safetensors), or hf://owner/name, s3:// or gs:// of one."""
    out_dir: str
    """-o: work directory: measurement, quantised tensors, everything needed to resume. May be s3:// or gs://."""
    bits: tuple[float, ...] = (4.125,)
    """-b: target bits per weight of the decoder layers; may be given several times."""
    head_bits: int | None = None
    """-hb: bits of the output head: 2, 3, 4, 5, 6 or 8; if absent 6, or what --allocation linear finds best."""
    compile_full: str | None = None
    """-cf: directory for the complete model: tensors, config, tokenizer. {bpw} stands for the bitrate."""
    cal_dataset: str | tuple[str, ...] | None = None  # a tuple if there are several
    """-c: calibration text: Parquet, .jsonl, .json or .txt file, folder, hf://datasets/...; FILE:COLUMN; repeatable."""
    dataset_rows: int = 100
    """-r: calibration rows of the quantisation pass, with -c."""
    measurement_rows: int = 16
    """-mr: calibration rows of the measurement pass, with -c."""
    length: int = 2048
    """-l: tokens per row of the quantisation pass."""
    measurement_length: int = 2048
    """-ml: tokens per row of the measurement pass."""
    measurement: str | None = None
    """-m: reuse this measurement.json."""
    output_measurement: str | None = None
    """-om: write measurement.json here (a file or a directory) and stop after measuring."""
    shard_size: float = 8192
    """-ss: largest output file in MiB; 0 for a single file."""
    rope_scale: float | None = None
    """-rs: linear RoPE scaling factor, overriding the model's."""
    rope_alpha: float | None = None
    """-ra: NTK-alpha RoPE scaling factor."""
    rotate: bool = False
    """--rotate: rotate the residual stream: other weights of the same function and architecture; for models with RMSNorm."""
    no_resume: bool = False
    """-nr: start over: delete what exl2ray created in the work directory."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """--device: where to compute."""
    gpus: int | None = None
    """--gpus: number of GPUs to use; all that Ray offers if absent."""
    ray_address: str | None = None
    """--ray-address: attach to this Ray cluster; else $RAY_ADDRESS, else a private local one."""
    executor: Literal["auto", "ray", "inline"] = "auto"
    """--executor: ray, inline (in this process, one device), or auto: ray for a cluster or several GPUs, else inline."""
    overrides: tuple[str, ...] = ()
    """--set: PATTERN=BITS or PATTERN=OPTION for linears whose names match; may be given several times."""
    propagate: Literal["quantized", "reference"] = "quantized"
    """--propagate: calibrate each module on what the quantised modules before it produce, or on reference states."""
    seed: int = 0
    """--seed: of random and shuffled calibration rows."""
    allocation: Allocated | None = None
    """--allocation: options per module by its own error, or per linear by its effect on the model; else as --quality says."""
    objective: Literal["squared", "norm", "product"] = "squared"
    """--objective: what the allocation per module minimises over the modules' relative errors."""
    objective_power: float = 2.0
    """--objective-power: exponent for --objective norm."""
    quality: Quality = "balanced"
    """--quality: reference: the plain algorithm; balanced, best: better weights at the same size, for more time."""
    target_correction: float | None = None
    """--target-correction: how far weights are fitted to the source model's states, 0 to 1; as --quality says if absent."""
    scale_search: ScaleSearch | None = None
    """--scale-search: choose scales by rounding error, or also by the loss after error feedback; else as --quality says."""
    sweeps: int | None = None
    """--sweeps: passes of coordinate descent over the rounded weights; as --quality says if absent."""
    damping: float = 0.12
    """--damping: added to the Hessian's diagonal, as a share of its mean."""
    moe_all_experts: bool = False
    """--moe-all-experts: collect the Hessians of every expert from all tokens; the forward pass stays as routed."""
    chat_rows: bool = True
    """--chat-rows/--no-chat-rows: render part of the built-in rows with the model's chat template."""
    reuse: bool = False
    """--reuse: accept changed -b, -hb or output settings in an existing work directory and keep the measurement."""
    evaluate: Literal["auto", "always", "never"] = "auto"
    """--evaluate: perplexity and KL divergence of finished models on held-out text: with several -b, always, or never."""
    eval_text: str | None = None
    """--eval-text: text, Parquet, .jsonl file, or .npy array of token ids, to evaluate on; a built-in text if absent."""
    source_cache: str = "20GB"
    """--source-cache: the most that is kept on this disk of weights that -i has elsewhere; 0 keeps none."""
    checkpoint_seconds: float = 120.0
    """--checkpoint-seconds: least time between saved hidden states."""

    def __post_init__(self) -> None:
        if isinstance(self.cal_dataset, tuple):  # one is as if it were the only one there can be, none is none
            files = self.cal_dataset
            object.__setattr__(self, "cal_dataset", files if len(files) > 1 else files[0] if files else None)
        check_fields(self, get_type_hints(Recipe))
        parse_size(self.source_cache, "--source-cache")
        if not self.bits:
            raise UsageError("-b: no bitrate given")
        for b in self.bits:
            if not math.isfinite(b) or not MIN_BITS <= b <= MAX_BITS:
                raise UsageError(f"-b {b:g}: bits per weight lie between {MIN_BITS:g} and {MAX_BITS:g}")
        if len(set(self.bits)) != len(self.bits):
            raise UsageError(f"-b: a bitrate is given twice: {', '.join(f'{b:g}' for b in self.bits)}")
        if self.head_bits is not None and self.head_bits not in HEAD_BITS:
            raise UsageError(f"-hb {self.head_bits}: the head can have {', '.join(map(str, HEAD_BITS))} bits")
        for flag, value in (("-r", self.dataset_rows), ("-mr", self.measurement_rows)):
            if value < 1:
                raise UsageError(f"{flag} {value}: at least one calibration row is needed")
        for flag, value in (("-l", self.length), ("-ml", self.measurement_length)):
            if value < 1:
                raise UsageError(f"{flag} {value}: a row needs at least one token")
            if self.cal_dataset is None and value % LENGTH_STEP:
                raise UsageError(
                    f"{flag} {value}: the built-in calibration set needs a multiple of {LENGTH_STEP}",
                    f"use {flag} {max(LENGTH_STEP, value // LENGTH_STEP * LENGTH_STEP)}, or your own data with -c",
                )
        for flag, scale in (("-rs", self.rope_scale), ("-ra", self.rope_alpha)):
            if scale is not None and not (math.isfinite(scale) and scale > 0):
                raise UsageError(f"{flag} {scale:g}: must be a positive number")
        if self.output_measurement is not None and self.compile_full is not None:
            raise UsageError("-om stops after measuring, so -cf would have nothing to write", "drop one of them")
        if self.output_measurement is not None and self.measurement is not None:
            raise UsageError("-m reuses a measurement and -om asks for a new one", "drop one of them")
        if len(self.bits) > 1 and self.compile_full is not None and "{bpw}" not in self.compile_full:
            raise UsageError(
                f"-cf {self.compile_full}: {len(self.bits)} bitrates would write into one directory",
                "put {bpw} into the path, as in -cf out/{bpw}",
            )
        for flag, name in CHOICES.items():
            known = choices(get_type_hints(Recipe)[name])
            if getattr(self, name) not in (*known, getattr(Recipe, name)):
                raise UsageError(f"{flag} {getattr(self, name)}: one of {', '.join(known)} is needed")
        if not (math.isfinite(self.objective_power) and self.objective_power > 0):
            raise UsageError(f"--objective-power {self.objective_power:g}: must be a positive number")
        if not (math.isfinite(self.checkpoint_seconds) and self.checkpoint_seconds >= 0):
            raise UsageError(f"--checkpoint-seconds {self.checkpoint_seconds:g}: must be 0 or a positive number")
        if not 0 < self.damping < 10:
            raise UsageError(f"--damping {self.damping:g}: must lie between 0 and 10")
        if self.target_correction is not None and not 0 <= self.target_correction <= 1:
            raise UsageError(f"--target-correction {self.target_correction:g}: must lie between 0 and 1")
        if self.target_correction and self.propagate == "reference":
            raise UsageError(
                f"--target-correction {self.target_correction:g} needs the states of the quantised model",
                "leave out --propagate reference, or --target-correction",
            )
        if self.sweeps is not None and not 0 <= self.sweeps <= MAX_SWEEPS:
            raise UsageError(f"--sweeps {self.sweeps}: must lie between 0 and {MAX_SWEEPS}")
        if self.gpus is not None and self.gpus < 1:
            raise UsageError(f"--gpus {self.gpus}: at least one GPU is needed", "use --device cpu to run without GPUs")
        if not (self.shard_size == 0 or (math.isfinite(self.shard_size) and MIN_SHARD <= self.shard_size <= MAX_SHARD)):
            raise UsageError(f"-ss {self.shard_size:g}: 0 for a single file, else the size in MiB, {MIN_SHARD:g} or more")
        if self.shard_size == int(self.shard_size):  # 8192.0 is no change of 8192
            object.__setattr__(self, "shard_size", int(self.shard_size))

    @property
    def shard_bytes(self) -> int:
        """Largest size of an output file; 0 for a single one."""
        return int(self.shard_size * 2**20)

    @property
    def calibration_data(self) -> tuple[str, ...]:
        """Every -c; empty for the built-in set."""
        given = self.cal_dataset
        return given if isinstance(given, tuple) else () if given is None else (given,)

    @property
    def most_tokens(self) -> int:
        """Of the rows of either pass, with -c."""
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
    def head_is_free(self) -> bool:
        """Whether the allocation chooses the bits of the head."""
        return self.allocates == "linear" and self.head_bits is None

    @property
    def usual_head_bits(self) -> int:
        """Bits of the head, or those whose space the allocation may share out between the head and the decoder."""
        return USUAL_HEAD_BITS if self.head_bits is None else self.head_bits

    def output_dir(self, bits: float) -> str | None:
        """Directory of the complete model at one bitrate."""
        return None if self.compile_full is None else self.compile_full.replace("{bpw}", bpw_name(bits))

    def job(
        self, identity: dict[str, Any], calibration: str | None, quantising: str | None = None
    ) -> dict[str, dict[str, Any]]:
        """The sections of job.json. ``identity``: fingerprint of the source; ``calibration``: hash of the data of -c.

        quantising: of the data that the quantisation pass takes, if another part of it has a hash of its own.
        """
        data = {
            "seed": self.seed,
            "chat_rows": self.chat_rows,
            "moe_all_experts": self.moe_all_experts,
        }
        return {
            "identity": {
                **identity,
                "rope_scale": self.rope_scale,
                "rope_alpha": self.rope_alpha,
                **({"rotate": True} if self.rotate else {}),
            },
            "measure": {
                "cal_dataset": calibration,
                **data,
                "rows": self.measurement_rows if self.cal_dataset else None,
                "length": self.measurement_length,
                "damping": self.damping,
                "measurement": None,
            },
            "quantize": {
                "cal_dataset": quantising or calibration,
                **data,
                "rows": self.dataset_rows if self.cal_dataset else None,
                "length": self.length,
                "bits": list(self.bits),
                "head_bits": None if self.head_is_free else self.usual_head_bits,
                "allocation": self.allocation,
                "allocates": self.allocates,
                "propagate": self.propagate,
                "objective": self.objective,
                "objective_power": self.objective_power,
                "quality": self.quality,
                "target_correction": self.target_correction,
                "scale_search": self.scale_search,
                "sweeps": self.sweeps,
                "numerics": asdict(self.numerics),
                **({"overrides": list(self.overrides)} if self.overrides else {}),
            },
            "output": {
                "shard_size": self.shard_size,
                "compile_full": self.compile_full,
                "measure_only": self.output_measurement is not None,
            },
        }


JOB_FLAGS = {
    "identity.fingerprint": "-i",
    "identity.architecture": "-i",
    "identity.in_dir": "-i",
    "identity.rope_scale": "-rs",
    "identity.rope_alpha": "-ra",
    "identity.rotate": "--rotate",
    "measure.cal_dataset": "-c",
    "measure.rows": "-mr",
    "measure.length": "-ml",
    "measure.seed": "--seed",
    "measure.chat_rows": "--chat-rows",
    "measure.moe_all_experts": "--moe-all-experts",
    "measure.damping": "--damping",
    "measure.measurement": "-m",
    "quantize.cal_dataset": "-c",
    "quantize.rows": "-r",
    "quantize.length": "-l",
    "quantize.seed": "--seed",
    "quantize.chat_rows": "--chat-rows",
    "quantize.moe_all_experts": "--moe-all-experts",
    "quantize.bits": "-b",
    "quantize.head_bits": "-hb",
    "quantize.allocation": "--allocation",
    "quantize.allocates": "--quality",
    "quantize.propagate": "--propagate",
    "quantize.objective": "--objective",
    "quantize.objective_power": "--objective-power",
    "quantize.quality": "--quality",
    "quantize.target_correction": "--target-correction",
    "quantize.scale_search": "--scale-search",
    "quantize.sweeps": "--sweeps",
    "quantize.numerics": "--quality",
    "quantize.overrides": "--set",
    "output.shard_size": "-ss",
    "output.compile_full": "-cf",
    "output.measure_only": "-om",
    "identity.cal_dataset": "-c",
}


def choices(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, or of a Literal or None; empty for other types."""
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


def place_name(place: str) -> str:
    """A -c without the folders above it."""
    return place if "://" in place else place.rstrip("/").rpartition("/")[2] or place


def bpw_name(bits: float) -> str:
    """Name of a bitrate in paths: ``4.0``, ``4.125``."""
    return str(float(bits))
