"""Forward pass of a model directory, fp16 or EXL2, with the weights of one module in memory at a time.

Every module is loaded once, advances all rows in batches, and is dropped; a model much larger than the GPU runs this
way. EXL2 linears are dequantised to the loader's own float16 weights. Multipliers such as
``logit_scale`` are applied in the forward pass, so stored weights are used as they are (prescale 1).

The result keeps the states in front of the head, not logits: for 64 rows of 2048 tokens and 128k words those alone
would be 67 GB. ``logit_batches`` makes them a slice at a time, for the model and its reference side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.errors import CalibrationError, FormatError, SourceError, UsageError
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.hf import SourceModel, weight_files
from exl2ray.formats.hfconfig import read_config
from exl2ray.formats.readahead import ReadAhead, TensorReader
from exl2ray.formats.source.kinds import refusal
from exl2ray.formats.source.quantised import quantised_by
from exl2ray.formats.tensorfile import TensorFile
from exl2ray.model.arch import is_exl2, load_spec
from exl2ray.model.blocks import Block, LinearReader, check_states, load_block
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.model.weights import read_ahead, read_linear, whole_tensors
from exl2ray.quant.pack import dequantize

BATCH_TOKENS = 8192  # tokens that pass through a module at once; at least one row
LOGITS_AT_ONCE = 1 << 26  # of one model: 256 MiB in float32
CUT = ("layers, config.json says", "biases are stored")  # in warnings of what config.json leaves out of the weights
GPU_STATES_SHARE = 0.25  # of the free GPU memory that states may take; more stay in main memory

Progress = Callable[[Path, int, int], None]  # (model directory, modules done, modules of the model)


@dataclass(frozen=True)
class RunOptions:
    """How to run a model. ``dtype`` of linears and activations; None: float32 on the CPU, float16 elsewhere.

    In float32 the residual stream is float32 too, otherwise it has the family's own dtype. rope_scale, rope_alpha: as
    given to the loader; None: what config.json says.
    """

    dtype: torch.dtype | None = None
    batch_tokens: int = BATCH_TOKENS
    rope_scale: float | None = None
    rope_alpha: float | None = None

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        return self.dtype or (torch.float32 if device.type == "cpu" else torch.float16)


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model directory whose headers and config have been read. ``bos_id``: prepended to every row, or None. ``notes``: what
    is to be told with its figures.

    Only families that are incoherent without BOS have it: Gemma 1-3, GemMoE, Cohere 1-2.
    """

    path: Path
    source: SourceModel
    spec: ModelSpec
    bos_id: int | None
    notes: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        return self.spec.hyper.vocab_size

    @property
    def quantized(self) -> bool:
        return isinstance(self.source, Exl2Model)

    def as_reference(self) -> tuple[str, ...]:
        """What is to be told where others are compared with it: a model that is quantised itself has errors of its own."""
        if not self.quantized:
            return ()
        return (
            f"--reference {self.path} is an EXL2 model itself: KL divergence and agreement are with it, errors included, not "
            "with the model that it was made from",
        )


def open_model(path: str | Path, options: RunOptions | None = None) -> OpenModel:
    """Open an fp16 (Hugging Face) or EXL2 directory; reads no weights.

    Raises SourceError or FormatError as ``SourceModel``, ``Exl2Model`` and ``load_spec`` do, and SourceError if the
    family needs BOS and neither config.json nor the tokenizer names it.
    """
    options = options or RunOptions()
    root = Path(path)
    refused = refusal(root)
    if refused is not None:
        raise refused
    source = _opened(root)
    spec = load_spec(source, options.rope_scale, options.rope_alpha)
    bos_id = _bos_id(root, source, spec)
    # Figures of a model that config.json cuts are those of another one, and nothing in them shows it.
    notes = [f"{root}: {text}" for text in spec.warnings if any(words in text for words in CUT)]
    return OpenModel(root, source, spec, bos_id, (*notes, *(source.notes if isinstance(source, Exl2Model) else ())))


def _opened(root: Path) -> SourceModel:
    config = read_config(root / "config.json", strict=False)
    if is_exl2(config):
        return Exl2Model(root)
    try:
        return SourceModel(root)
    except SourceError as e:
        files = weight_files(root, SourceError)
        if quantised_by(info for file in files for info in TensorFile(file, SourceError).tensors.values()) != "exl2":
            raise
        found = config.get("quantization_config")
        if found is None:
            return Exl2Model(root)
        said = f"says {str(found.get('quant_method'))[:40]!r}" if isinstance(found, dict) else "is not an object"
        raise FormatError(
            f"{root}: the weights are those of an EXL2 model; quantization_config in its config.json {said}",
            "put back the config.json that came with these weights",
        ) from e


def _bos_id(root: Path, source: SourceModel, spec: ModelSpec) -> int | None:
    def of_tokenizer() -> int | None:
        with load_tokenizer(root, source.config, spec.hyper.vocab_size) as tokenizer:
            return tokenizer.bos_id

    bos = spec.needed_bos(of_tokenizer)
    if spec.arch.needs_bos and (bos is None or not 0 <= bos < spec.hyper.vocab_size):
        raise SourceError(
            f"{root}: {spec.arch.name} needs BOS in front of every row, but bos_token_id is {bos}",
            "set bos_token_id in config.json",
        )
    return bos


def linear_reader(device: torch.device) -> LinearReader:
    """Reader for ``load_block``: weight (K, N32) float16, dequantised on ``device``, and bias (N32,) or None.

    Linears that an EXL2 directory keeps in float16 (a head may be) are read as those of any other model.
    """

    def read(spec: ModelSpec, linear: LinearSpec, source: TensorReader) -> tuple[Tensor, Tensor | None]:
        if isinstance(source, Exl2Model) and f"{linear.key}.q_weight" in source:
            packed = source.linear(linear.key)
            found, needed = (packed.in_features, packed.out_features), (linear.in_features, linear.padded_out)
            if found != needed:
                raise FormatError(
                    f"{source.path}: {linear.key} has {found} rows and columns, by config.json it has {needed}",
                    "config.json is of another model: put back the one that came with these weights",
                )
            return dequantize(packed, device), packed.bias
        return read_linear(spec, linear, source)

    return read


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """A finished forward pass up to the head. states (R, T, hidden), after the final norm, without BOS's position."""

    model: OpenModel
    states: Tensor
    head: Block
    device: torch.device

    def logits(self, rows: slice, positions: slice) -> Tensor:
        """Float32 logits (rows, positions, vocab) on the device, cut to the real vocabulary."""
        return self.head.forward(self.states[rows, positions].to(self.device))


def run_model(
    model: OpenModel | str | Path,
    ids: Tensor,  # (R, T) any integer dtype
    device: torch.device | str,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> ModelOutput:
    """Run all rows through all modules, one module in memory at a time.

    Memory beside the module: the states, R * T * hidden * 2 bytes (4 in float32), on the device while they take at
    most a quarter of its free memory. Raises NumericError at the first module whose output holds NaN or too many
    infinities, CalibrationError for ids that the model does not have, UsageError for a device that is not there, and
    whatever reading the weights raises.
    """
    options = options or RunOptions()
    device = checked_device(device)
    opened = model if isinstance(model, OpenModel) else open_model(model, options)
    states = checked_ids(ids, opened)
    if opened.bos_id is not None:
        states = torch.cat([torch.full((len(states), 1), opened.bos_id), states], dim=1)
    count = len(opened.spec.modules)
    ahead = Ahead(opened, device)
    for module in opened.spec.modules[:-1]:
        block = load_module(opened, module, device, options, ahead.at(module.index))
        states = _advance(opened, block, states, device, options)
        del block  # before the next one takes memory
        if progress is not None:
            progress(opened.path, module.index + 1, count)
    head = load_module(opened, opened.spec.modules[-1], device, options, ahead.at(count - 1))
    if progress is not None:
        progress(opened.path, count, count)
    if opened.bos_id is not None:
        states = states[:, 1:]
    return ModelOutput(opened, states, head, device)


def checked_device(device: torch.device | str) -> torch.device:
    """``device`` as a torch device; "auto" is a GPU if there is one. Raises UsageError if this machine does not have it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise UsageError(f"--device {device}: {str(e).splitlines()[0]}") from e
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this machine has no usable CUDA GPU", "use --device cpu")
    return found


def checked_ids(ids: Tensor, model: OpenModel) -> Tensor:
    """``ids`` as int64 on the CPU; CalibrationError unless it is (R, T >= 2) with all ids in the vocabulary."""
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise CalibrationError(f"tokens have shape {tuple(ids.shape)}; rows of two or more tokens are needed")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"tokens are {ids.dtype}; integers are needed")
    checked = ids.to("cpu", torch.int64)
    bad = (checked < 0) | (checked >= model.vocab_size)
    if bool(bad.any()):
        row, position = (int(i) for i in bad.nonzero()[0])
        raise CalibrationError(
            f"{int(bad.sum())} token ids are outside the {model.vocab_size} words of {model.path}, "
            f"the first is {int(checked[row, position])} in row {row} at position {position}",
            "the tokens were made with another model's tokenizer",
        )
    return checked


def load_module(
    model: OpenModel, module: ModuleSpec, device: torch.device, options: RunOptions, ahead: ReadAhead | None = None
) -> Block:
    """The weights of one module on ``device``; EXL2 linears dequantised. ahead: where the model's tensors come from, if some
    are read in advance."""
    dtype = options.compute_dtype(device)
    state_dtype = torch.float32 if dtype == torch.float32 else None
    return load_block(model.spec, module, ahead or model.source, device, dtype, state_dtype, linear_reader(device))


class Ahead:
    """Tensors of a model, read into pinned memory by several threads while a GPU takes up those before: it would wait for
    one. Nothing is, for a CPU, and of an EXL2 model. ``again``: whether the first module comes after the last one."""

    def __init__(self, model: OpenModel, device: torch.device, again: bool = False) -> None:
        self._modules = [*model.spec.modules, *(model.spec.modules[:2] if again else ())]
        plain = device.type == "cuda" and not model.quantized
        self._reading = read_ahead(model.source, pin=True) if plain else None

    def at(self, index: int) -> ReadAhead | None:
        """For the module of this index; those of the next two are begun."""
        if self._reading is not None:
            coming = self._modules[index : index + 3]
            self._reading.fetch([name for m in coming for name in whole_tensors(m)])
        return self._reading

    def end(self) -> None:
        """Lets go of what was read and not asked for."""
        if self._reading is not None:
            self._reading.fetch([])


@torch.inference_mode()
def _advance(model: OpenModel, block: Block, states: Tensor, device: torch.device, options: RunOptions) -> Tensor:
    """states (R, T) ids or (R, T, hidden) in front of a module -> states behind it; reuses the memory if it can."""
    module = block.module
    count, length = states.shape[:2]
    step = max(1, options.batch_tokens // length)

    def run(first: int) -> Tensor:
        y = block.forward(states[first : first + step].to(device))
        check_states(y, f"{model.path}: {module.profile_key}, rows {first} to {min(first + step, count) - 1}")
        return y

    y = run(0)
    shape = (count, *y.shape[1:])
    reusable = states.dtype == y.dtype and states.shape == shape
    out = states if reusable else torch.empty(shape, dtype=y.dtype, device=_home(shape, y))
    out[:step] = y
    for first in range(step, count, step):
        out[first : first + step] = run(first)
    return out


def _home(shape: tuple[int, ...], like: Tensor) -> torch.device:
    """Where states of this shape are kept between modules."""
    if like.device.type != "cuda":
        return like.device
    free_bytes, _ = torch.cuda.mem_get_info(like.device)
    nbytes = torch.Size(shape).numel() * like.element_size()
    return like.device if nbytes <= GPU_STATES_SHARE * free_bytes else torch.device("cpu")


@dataclass(frozen=True, eq=False)
class LogitBatch:
    """Logits (r, p, vocab) float32 of a block of rows and positions; ``reference`` the same of the other model."""

    rows: slice
    positions: slice
    logits: Tensor
    reference: Tensor | None


def logit_batches(
    model: ModelOutput, reference: ModelOutput | None = None, logits_at_once: int = LOGITS_AT_ONCE
) -> Iterator[LogitBatch]:
    """Logits of every position but each row's last, which predicts nothing that is known.

    A batch has whole rows as long as they fit into ``logits_at_once`` values per model, else pieces of one row.
    """
    count, length = model.states.shape[:2]
    fitting = max(1, logits_at_once // model.model.vocab_size)  # positions
    row_step, step = max(1, fitting // (length - 1)), min(fitting, length - 1)
    for first in range(0, count, row_step):
        rows = slice(first, min(first + row_step, count))
        for start in range(0, length - 1, step):
            positions = slice(start, min(start + step, length - 1))
            with torch.inference_mode():
                other = reference.logits(rows, positions) if reference is not None else None
                batch = LogitBatch(rows, positions, model.logits(rows, positions), other)
            yield batch
