#!/usr/bin/env python3
"""Other quantisers as columns of `quality.py`: installed programs, run in processes of their own.

A variant ``ExLlamaV2:peer:exllamav2 -hb 6`` converts with ExLlamaV2's own converter and its own calibration set; the result
is EXL2 and judged like ours. ``EXL3:peer:exllamav3 -hb 6`` converts with exllamav3, whose format only it can run: its logits
are compared with the source's in that process (`judge`, below). A peer that is not installed, or needs a GPU that is not
there, or a model that it cannot take, is skipped, and why is said; one that is here and fails, or takes longer than
--peer-seconds, is a failure of its column alone. One draw: peers choose their own text.

Without flash-attn ExLlamaV2's attention is not causal unless SDPA is switched off, which is done here. Whether exllamav3's is
causal is tested on the model itself, by changing a last token, before its figures are believed.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
    if not _files(out):
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
    def run(source: str) -> str:
        told = _run(["-m", CONVERTERS["exllamav3"], "-i", source, *command], seconds)
        return told if _files(out) else _run(["-c", CALLED, "-i", source, *command], seconds)

    return _with_its_names(run, model.path, out.parent)


def _with_its_names(run: Callable[[str], str], directory: Path, place: Path) -> str:
    """``run(directory)``; or a copy of it, below ``place``, in which names of tensors begin with a dot, if that is what is
    missing: exllamav3 1.6.5 looks for such names in a text-only Gemma 3."""
    try:
        return run(str(directory))
    except Failed as e:
        if "Required tensor ." not in str(e):
            raise
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for path in directory.iterdir():
            if path.suffix == ".safetensors":
                named = {"." + n.removeprefix("."): t for n, t in load_file(path).items()}
                save_file(named, Path(folder) / path.name, {"format": "pt"})
            elif path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, Path(folder) / path.name)
        return run(folder)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


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

        def run(made: str) -> str:
            return _run([str(Path(__file__)), "judge", str(model.path), made, str(ids), str(found), *settings], seconds)

        _with_its_names(run, directory, directory.parent)
        with np.load(found) as scores:
            tokens = {name: torch.from_numpy(scores[name]) for name in scores.files}
    size = sum(p.stat().st_size for p in _files(directory))
    figures = figures_of(tokens, model.kinds)
    return {**figures, "file_bytes": size, "evaluate_seconds": round(time.perf_counter() - start, 3)}


# ---- in the process of exllamav3 ----------------------------------------------------------------------------------------


def judge(source: str, directory: str, ids: torch.Tensor, dtype: torch.dtype, device: str) -> dict[str, np.ndarray]:
    """Figures (R, T - 1) of an EXL3 model against the source's logits, which exl2ray computes."""
    from exl2ray.evaluate.forward import RunOptions, run_model

    expected = run_model(source, ids, device, RunOptions(dtype=dtype))
    forward = _exl3_forward(directory, ids[:1])
    found: dict[str, list[torch.Tensor]] = {"nll": [], "source_nll": [], "kl": [], "top1": []}
    for r in range(len(ids)):
        theirs = expected.logits(slice(r, r + 1), slice(0, ids.shape[1] - 1))[0].float().log_softmax(-1)
        ours = forward(ids[r : r + 1])[0, :-1, : theirs.shape[-1]].to(theirs.device).float().log_softmax(-1)
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
            moved = float((forward(row)[0, :-1] - forward(other)[0, :-1]).abs().max())
        except Exception as e:
            problems.append(f"{params}: {type(e).__name__}: {e}")
            continue
        if moved < 1e-2:
            return forward
        problems.append(f"{params}: not causal, a last token moves earlier logits by {moved:.3g}")
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
