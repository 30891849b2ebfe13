"""A model in three shards: in a folder, on a Hub, in object stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import Run, exl2ray
from gcs_server import GcsServer
from model_hub import SIGNATURE, TOKEN, ModelHub, serving
from remote_helpers import QUICK, SECRET, hub_env, made
from safetensors.torch import load_file, save_file
from tiny_models import write_model, write_text

torch.set_num_threads(1)

SHARDS = 3


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in three shards with an index, and what people keep beside them."""
    sharded = write_model(tmp_path_factory.mktemp("model") / "sharded", rms_norm_eps=1e-5)
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


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def wanted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what the folder on this disk becomes."""
    root = tmp_path_factory.mktemp("local")
    exl2ray("convert", "-i", model, "-o", root / "work", "-cf", root / "out", "-c", text, *QUICK, seconds=60).ends_with(0)
    return made(root)


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


@pytest.fixture(scope="module")
def s3(model: Path) -> Iterator[tuple[str, dict[str, str], Any]]:
    """(address of the model, environment, client) on a local server."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    env = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
           "AWS_EC2_METADATA_DISABLED": "true", "EXL2RAY_SOURCE_ATTEMPTS": "1"}  # fmt: skip
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket="models")
    for path in model.iterdir():
        client.put_object(Bucket="models", Key=f"a/b/{path.name}", Body=path.read_bytes())
    yield "s3://models/a/b", env, client
    server.stop()


@pytest.fixture(scope="module")
def gs(model: Path) -> Iterator[tuple[str, dict[str, str]]]:
    server = GcsServer()
    for path in model.iterdir():
        server.store("models", f"a/{path.name}", path.read_bytes())
    yield "gs://models/a", {"STORAGE_EMULATOR_HOST": server.address, "EXL2RAY_SOURCE_ATTEMPTS": "1"}
    server.close()
