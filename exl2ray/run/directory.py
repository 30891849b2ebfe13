"""What is looked at before a model is run: its folder, downloaded if it has to be, and whether it is sound."""

from __future__ import annotations

from pathlib import Path

from exl2ray.errors import FormatError
from exl2ray.formats.hf import weight_files
from exl2ray.formats.tensorfile import TensorFile, TensorInfo
from exl2ray.formats.verify import verify_directory
from exl2ray.wording import some_lines

SHOWN = 5  # broken rules in one message
NOT_NEEDED = "side-file"  # the rule about tokenizer files, which are no business of the model
DOWNLOADED = ["*.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"]


def local_directory(name: str, revision: str | None) -> Path:
    """A folder as it is; a name on the Hub downloaded as the host library does it: its login, its cache, its offline mode."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))


def sound_files(root: Path) -> list[Path]:
    """The weight files of an EXL2 model. Raises FormatError with what ``exl2ray verify`` finds wrong with it."""
    problems = [p for p in verify_directory(root) if p.rule != NOT_NEEDED]
    if problems:
        lines = [f"  {line}" for line in some_lines(list(map(str, problems)), SHOWN)]
        raise FormatError(f"{root}: not a sound EXL2 model:", f"see them all: exl2ray verify {root}", lines)
    return weight_files(root, FormatError)


def headers(files: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor of the files by its name."""
    return {name: info for file in files for name, info in TensorFile(file, FormatError).tensors.items()}
