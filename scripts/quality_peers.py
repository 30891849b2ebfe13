#!/usr/bin/env python3
"""Other quantisers as columns of `quality.py`: installed programs, run in processes of their own.

A variant ``ExLlamaV2:peer:exllamav2 -hb 6`` converts with ExLlamaV2's own converter and its own calibration set; the result
is EXL2 and judged like ours. ``EXL3:peer:exllamav3 -hb 6`` converts with exllamav3, whose format only it can run: its logits
are compared with the source's in that process (`judge`, below). A peer that is not installed, or needs a GPU that is not
there, or a model that it cannot take, is skipped, and why is said; one that is here and fails, or takes longer than
--peer-seconds, is a failure of its column alone. One draw: peers choose their own text.

Without flash-attn ExLlamaV2's attention is not causal unless SDPA is switched off, which is done here. Whether exllamav3's is
causal is tested on the model itself, by changing a last token, before its figures are believed.

exllamav3 1.6.5 gives the modules of a text-only Gemma 3 names that begin with a dot. Its converter keeps a file of that name
for each, does not find these later, as they are hidden, and writes a model without tensors. So it gets a copy laid out like a
Gemma 3 with an image tower, without that tower's tensors (`_as_it_reads`); the text model is of the same class in both.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from quality_models import Figures, Model, figures_of  # noqa: E402

from exl2ray.errors import Exl2RayError  # noqa: E402

PREFIX = "peer:"
CONVERTERS = {  # of each package, the module that converts
    "exllamav2": "exllamav2.conversion.convert_exl2",
    "exllamav3": "exllamav3.conversion.convert_model",
}
CALLED = (  # where running the module does nothing: what the convert.py of its repository, which no wheel has, calls
    "import sys; from exllamav3.conversion.convert_model import main, parser, prepare; "
    "args, state, ok, problem = prepare(parser.parse_args()); main(args, state) if ok else sys.exit(str(problem))"
)
DEVICES = ("cuda",)  # that they run on
EXL3_MULTIPLE = 128  # widths that exllamav3 takes
TAIL = 1500  # characters of a failed program's output that are shown
ATTENTION = ({"attn_mode": "flash_attn_nc"}, {"attn_mode": "sdpa_nc"}, {})  # ways to run a forward pass without a cache
LEAK = 0.1  # of what a last token moves its own logits by: earlier ones move by less where attention is causal
GEMMA3_TEXT = "Gemma3ForCausalLM"
GEMMA3_SEES = {  # what the configuration of a Gemma 3 with an image tower has beside text_config
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 1,
                      "image_size": 896, "patch_size": 14, "num_channels": 3},
}  # fmt: skip
GEMMA3_IMAGES = {  # its preprocessor_config.json
    "image_processor_type": "Gemma3ImageProcessor", "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 896, "width": 896},
}  # fmt: skip


class Skipped(Exception):
    """Why a peer has no column: it is not here, or cannot take the model."""


class Failed(Exl2RayError):
    """A peer that is here, and did not do it."""


def peer_of(options: str) -> str | None:
    """The package that a variant's options name; None for a variant of ours."""
    return options.removeprefix(PREFIX).split()[0] if options.startswith(PREFIX) else None


def convert(model: Model, options: str, bits: float, work: Path, out: Path, seconds: float) -> Figures:
    """Converts with the peer and judges what comes of it; the result of a variant without its settings.

    work: for the peer's own use, empty afterwards. out: the model. seconds: that each of its processes may take. Raises
    Skipped and Failed."""
    package, *flags = options.removeprefix(PREFIX).split()
    version = _check(package, model)
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    start = time.perf_counter()
    command = ["-b", repr(bits), *flags]
    if package == "exllamav2":
        told = _exllamav2(model, [*command, "-o", str(work), "-cf", str(out)], work, seconds)
    else:
        told = _exllamav3(model, [*command, "-w", str(work), "-o", str(out)], out, seconds)
    if not any(_names(path) for path in _files(out)):
        raise Failed(f"{package}: ended without an error, but wrote no model: {told[-TAIL:]}")
    took = time.perf_counter() - start
    shutil.rmtree(work)
    figures = model.judge(out) if package == "exllamav2" else _judged_there(model, out, seconds)
    return {**figures, "quantize_seconds": round(took, 3), "version": version}


def _exllamav2(model: Model, command: list[str], work: Path, seconds: float) -> str:
    """Measures a model once: later bitrates begin with what the first one found, of this model with these flags."""
    flags = [f for i, f in enumerate(command) if not {"-b", "-o", "-cf", "-hb"} & set(command[max(0, i - 1) : i + 1])]
    of = hashlib.sha256(json.dumps([model.fingerprint, flags]).encode()).hexdigest()[:12]
    kept = work.with_name(f"{work.name}-{of}-measurement.json")
    known = ["-m", str(kept)] if kept.is_file() else []
    told = _run(["-m", CONVERTERS["exllamav2"], "-i", str(model.path), *command, *known], seconds)
    if not known and (work / "measurement.json").is_file():
        shutil.copyfile(work / "measurement.json", kept)
    return told


def _exllamav3(model: Model, command: list[str], out: Path, seconds: float) -> str:
    with _as_it_reads(model.path, out.parent) as source:
        told = _run(["-m", CONVERTERS["exllamav3"], "-i", str(source), *command], seconds)
        return told if _files(out) else _run(["-c", CALLED, "-i", str(source), *command], seconds)


@contextmanager
def _as_it_reads(directory: Path, place: Path) -> Iterator[Path]:
    """The directory; for a text-only Gemma 3 a copy below ``place``, laid out like one with an image tower. What is made of
    the copy is laid out like that too, and loads."""
    config = json.loads((directory / "config.json").read_text())
    if config.get("architectures") != [GEMMA3_TEXT]:
        yield directory
        return
    rope = (config.get("rope_parameters") or {}).get("full_attention")
    if rope:  # newer configurations have them for each kind of layer, where it does not look
        config = {**config, "rope_theta": rope["rope_theta"], "rope_scaling": rope}
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for path in directory.iterdir():
            if path.suffix == ".safetensors":
                named = {f"language_model.{n}": t for n, t in load_file(path).items()}
                save_file(named, Path(folder) / path.name, {"format": "pt"})
            elif path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, Path(folder) / path.name)
        (Path(folder) / "config.json").write_text(json.dumps({**config, "text_config": config, **GEMMA3_SEES}))
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(GEMMA3_IMAGES))
        yield Path(folder)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _check(package: str, model: Model) -> str:
    """Its version."""
    if package not in CONVERTERS:
        raise Skipped(f"{package}: known are {', '.join(CONVERTERS)}")
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Skipped(f"the {package} package is not installed") from None
    if model.device not in DEVICES:
        raise Skipped(f"{package} needs a CUDA GPU")
    config = json.loads((model.path / "config.json").read_text())
    widths = [config.get(k) for k in ("hidden_size", "intermediate_size")]
    if package == "exllamav3" and any(w is None or w % EXL3_MULTIPLE for w in widths):
        raise Skipped(f"exllamav3 takes widths that are multiples of {EXL3_MULTIPLE}, this model has {widths}")
    return version


def _run(arguments: Sequence[str], seconds: float) -> str:
    """Runs Python with these arguments; what it said. Its children end with it."""
    env = {**os.environ, "EXLLAMA_NO_SDPA": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    what = " ".join(arguments[:2]) if arguments[0] == "-m" else arguments[0]
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # no pipe: a child that lives on would hold it open
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=output, env=env, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        told = output.read()
    if code != 0:
        why = f"took more than {seconds:g} s" if code is None else f"ended with {code}"
        raise Failed(f"{what} {why}: {told[-TAIL:]}")
    return told


def _judged_there(model: Model, directory: Path, seconds: float) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        ids, found = Path(folder) / "ids.npy", Path(folder) / "scores.npz"
        np.save(ids, model.ids.numpy())
        dtype = str(model.options.dtype).removeprefix("torch.")
        start = time.perf_counter()
        settings = ["--dtype", dtype, "--device", model.device]
        _run([str(Path(__file__)), "judge", str(model.path), str(directory), str(ids), str(found), *settings], seconds)
        with np.load(found) as scores:
            tokens = {name: torch.from_numpy(scores[name]) for name in scores.files}
    size = sum(p.stat().st_size for p in _files(directory))
    figures = figures_of(tokens, model.kinds)
    return {**figures, "file_bytes": size, "evaluate_seconds": round(time.perf_counter() - start, 3)}


# ---- in the process of exllamav3 ----------------------------------------------------------------------------------------


def judge(source: str, directory: str, ids: torch.Tensor, dtype: torch.dtype, device: str) -> dict[str, np.ndarray]:
    """Figures (R, T - 1) of an EXL3 model against the source's logits, which exl2ray computes. If that puts BOS in front of
    rows, so does this."""
    from exl2ray.evaluate.forward import RunOptions, run_model

    expected = run_model(source, ids, device, RunOptions(dtype=dtype))
    bos = [] if expected.model.bos_id is None else [expected.model.bos_id]
    given = torch.cat([torch.tensor([bos] * len(ids), dtype=ids.dtype).reshape(len(ids), -1), ids], dim=1)
    forward = _exl3_forward(directory, given[:1])
    found: dict[str, list[torch.Tensor]] = {"nll": [], "source_nll": [], "kl": [], "top1": []}
    for r in range(len(ids)):
        theirs = expected.logits(slice(r, r + 1), slice(0, ids.shape[1] - 1))[0].float().log_softmax(-1)
        logits = forward(given[r : r + 1])[0, len(bos) : -1, : theirs.shape[-1]]
        ours = logits.to(theirs.device).float().log_softmax(-1)
        target = ids[r, 1:].to(theirs.device)[:, None]
        found["nll"].append(-ours.gather(1, target)[:, 0])
        found["source_nll"].append(-theirs.gather(1, target)[:, 0])
        found["kl"].append((theirs.exp() * (theirs - ours)).sum(-1))
        found["top1"].append((theirs.argmax(-1) == ours.argmax(-1)).float())
    return {name: torch.stack(rows).double().cpu().numpy() for name, rows in found.items()}


def _exl3_forward(directory: str, row: torch.Tensor) -> Any:
    """ids (1, T) -> logits (1, T, vocabulary), by the first way that runs and is causal."""
    from exllamav3 import Config, Model as Exl3  # noqa: I001

    model = Exl3.from_config(Config.from_directory(directory))
    model.load()
    problems = []
    for params in ATTENTION:

        def forward(ids: torch.Tensor, params: dict[str, str] = params) -> torch.Tensor:
            with torch.inference_mode():
                return model.forward(ids, dict(params)).float()

        other = row.clone()
        other[0, -1] = (other[0, -1] + 1) % 256
        try:
            moved = (forward(row)[0] - forward(other)[0]).abs()
            before, last = float(moved[:-1].max()), float(moved[-1].max())
        except Exception as e:
            problems.append(f"{params}: {type(e).__name__}: {e}")
            continue
        if before <= LEAK * last:
            return forward
        problems.append(f"{params}: not causal, a last token moves its logits by {last:.3g} and earlier ones by {before:.3g}")
    raise SystemExit("no usable forward pass of exllamav3: " + "; ".join(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description="What quality.py runs in a peer's process.")
    parser.add_argument("what", choices=["judge"])
    parser.add_argument("source")
    parser.add_argument("directory")
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    found = judge(args.source, args.directory, torch.from_numpy(np.load(args.ids)), getattr(torch, args.dtype), args.device)
    np.savez(args.output, **found)


if __name__ == "__main__":
    main()
