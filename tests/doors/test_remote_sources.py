"""Models on the Hub and in object stores: the same bytes as from a folder, little on this disk, and every way to fail."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from bounded import Run, exl2ray
from model_hub import SIGNATURE, TOKEN, ModelHub, serving
from safetensors.torch import load_file, save_file
from tiny_models import write_text

SHARDS = 3
SECRET = "SecretKeyOnLoopback0123456789"
QUICK = ("-mr", "2", "-r", "3", "-l", "128", "-ml", "128", "-b", "4", "--device", "cpu", "--executor", "inline",
         "--evaluate", "never", "--quality", "reference")  # fmt: skip


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in three shards with an index, and what people keep beside them."""
    sharded = Path(shutil.copytree(base, tmp_path_factory.mktemp("model") / "sharded"))
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    index = {}
    for i in range(SHARDS):
        part, file = dict(list(tensors.items())[i::SHARDS]), f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, sharded / file, {"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (sharded / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (sharded / "LICENSE").write_text("All of it.\n")
    return sharded


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.parquet")


@pytest.fixture(scope="module")
def wanted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what the folder on this disk becomes."""
    root = tmp_path_factory.mktemp("local")
    exl2ray("convert", "-i", model, "-o", root / "work", "-cf", root / "out", "-c", text, *QUICK, seconds=60).ends_with(0)
    return made(root)


def made(root: Path) -> dict[str, str]:
    files = {p.name: p for p in [*(root / "out").iterdir(), root / "work" / "measurement.json"]}
    hashes = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    card = files["README.md"].read_text().partition("base_model:")
    return {**hashes, "README.md": "" if card[1] else hashes["README.md"]}


@pytest.fixture
def hub(model: Path) -> Iterator[ModelHub]:
    hub = ModelHub()
    waste = {name: b"x" * 100 for name in ("pytorch_model.bin", "model.gguf", "original/params.json", "consolidated.00.pth")}
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    hub.add("me/model", {**files, **waste})
    with serving(hub):
        yield hub


@pytest.fixture
def online(hub: ModelHub, tmp_path: Path) -> Callable[..., Run]:
    """Runs the program with this Hub; no output may show the token or a signature."""

    def run(*arguments: str | Path, **env: str) -> Run:
        done = exl2ray(*arguments, seconds=60, env={**hub_env(hub, tmp_path), **env})
        assert TOKEN not in done.out + done.err
        assert SIGNATURE not in done.out + done.err
        return done

    return run


def hub_env(hub: ModelHub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "EXL2RAY_SOURCE_ATTEMPTS": "3"}  # fmt: skip


def no_secret_below(root: Path, *secrets: str) -> None:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            assert not any(s.encode() in data for s in secrets), path


def without_card(hashes: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in hashes.items() if k != "README.md"}


def test_hub(
    hub: ModelHub, online: Callable[..., Run], text: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    places = ("-o", tmp_path / "work", "-cf", tmp_path / "out")
    done = online("convert", "-i", "hf://me/model", *places, "-c", text, *QUICK, "--json")
    done.ends_with(0)
    assert without_card(made(tmp_path)) == without_card(wanted)
    assert "base_model: me/model" in (tmp_path / "out" / "README.md").read_text()
    commit = hub.repos["me/model"]["main"].sha
    job = json.loads((tmp_path / "work" / "job.json").read_text())
    assert f"hf://me/model@{commit}" in json.dumps(job)
    assert not hub.leaked  # the token goes to the Hub, not to where it sends us
    assert not hub.sent(r"\.bin|\.gguf|\.pth|original/")
    assert "/tmp/exl2ray-source" not in done.out + done.err
    no_secret_below(tmp_path / "work", TOKEN, SIGNATURE)
    no_secret_below(tmp_path / "out", TOKEN, SIGNATURE)
