"""Models on the Hub and in object stores: the same bytes as from a folder, little on this disk, and every way to fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounded import Run, exl2ray
from gcs_server import GcsServer
from model_hub import SIGNATURE, TOKEN, ModelHub, serving
from safetensors.torch import load_file, save_file
from tiny_models import write_text

from exl2ray.remote import blocks
from exl2ray.remote.address import Address
from exl2ray.remote.blocks import Blocks
from exl2ray.remote.hub import Repository

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
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


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


# ---- object stores ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_object_stores(
    kind: str, request: pytest.FixtureRequest, text: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    address, env = request.getfixturevalue(kind)[:2]
    places = ("-o", tmp_path / "work", "-cf", tmp_path / "out")
    done = exl2ray("convert", "-i", address, *places, "-c", text, *QUICK, seconds=60, env=env)
    done.ends_with(0)
    assert made(tmp_path) == wanted
    assert SECRET not in done.out + done.err
    no_secret_below(tmp_path, SECRET)
    assert json.loads((tmp_path / "work" / "job.json").read_text())["job"]["identity"]["in_dir"] == address
    again = exl2ray("convert", "-o", tmp_path / "work", seconds=60, env=env)
    again.ends_with(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hub", "s3"])
def test_ray_workers_read_the_source_themselves(
    kind: str, request: pytest.FixtureRequest, text: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    place = request.getfixturevalue(kind)
    address, env = ("hf://me/model", hub_env(place, tmp_path)) if kind == "hub" else place[:2]
    workers = [x for x in QUICK if x not in ("--executor", "inline")] + ["--executor", "ray", "--gpus", "2"]
    places = ("-o", tmp_path / "work", "-cf", tmp_path / "out")
    done = exl2ray("convert", "-i", address, *places, "-c", text, *workers, seconds=240, memory=8 << 30, env=env)
    done.ends_with(0)
    assert without_card(made(tmp_path)) == without_card(wanted)
    for secret in (TOKEN, SIGNATURE, SECRET):
        assert secret not in done.out + done.err
    no_secret_below(tmp_path / "work", TOKEN, SIGNATURE, SECRET)


def test_an_object_that_changed_ends_a_resume(s3: Any, text: Path, tmp_path: Path) -> None:
    _, env, client = s3
    other = "s3://models/changing"
    for name in (o["Key"].rpartition("/")[2] for o in client.list_objects_v2(Bucket="models", Prefix="a/b/")["Contents"]):
        client.copy_object(Bucket="models", Key=f"changing/{name}", CopySource=f"models/a/b/{name}")
    command = ("measure", "-i", other, "-o", tmp_path / "work", "-c", text, *QUICK, "--allocation", "module")
    exl2ray(*command, seconds=60, env=env).ends_with(0)
    shard = client.get_object(Bucket="models", Key="changing/model-00002-of-00003.safetensors")["Body"].read()
    flipped = shard[:-3] + bytes([shard[-3] ^ 1]) + shard[-2:]
    client.put_object(Bucket="models", Key="changing/model-00002-of-00003.safetensors", Body=flipped)
    done = exl2ray(*command, seconds=60, env=env)
    done.ends_with(7, "s3://models/changing: model-00002-of-00003.safetensors was changed since this work directory")


@pytest.mark.parametrize(
    ("address", "changes", "words"),
    [
        ("s3://nowhere/model", {}, ["there is nothing", "are bucket and prefix right?"]),
        ("s3://models/nothing", {}, ["there is nothing"]),
        ("s3://models", {}, ["neither config.json nor a *.safetensors file"]),
        ("s3://models/a/b", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ["cannot be read"]),
    ],
)
def test_object_stores_that_give_nothing(
    s3: Any, address: str, changes: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    done = exl2ray("plan", "-i", address, "-b", "4", seconds=60, env={**s3[1], **changes})
    done.ends_with(3, *words)
    assert SECRET not in done.out + done.err


# ---- the Hub: what is kept, resumes ---------------------------------------------------------------------------------------


def measure(text: Path, work: Path, *more: str) -> tuple[str | Path, ...]:
    return ("measure", "-i", "hf://me/model", "-o", work, "-c", text, *QUICK, "--allocation", "module", *more)


def plan(address: str, text: Path) -> tuple[str | Path, ...]:
    return ("plan", "-i", address, "-c", text, "-b", "4", "-l", "128", "-ml", "128", "-r", "2", "-mr", "2")


def blocks_of(work: Path) -> int:
    return sum(p.stat().st_size for p in (work / "source" / "blocks").glob("*-*"))


def test_a_resume_has_the_commit_that_the_job_began_with(
    hub: ModelHub, online: Callable[..., Run], model: Path, text: Path, tmp_path: Path
) -> None:
    online(*measure(text, tmp_path / "work")).ends_with(0)
    before, seen = hub.repos["me/model"]["main"].sha, len(hub.asked)
    files = {**hub.repos["me/model"][before].files, "config.json": b"{}"}
    assert hub.add("me/model", files) != before
    online(*measure(text, tmp_path / "work")).ends_with(0)
    online("measure", "-o", tmp_path / "work").ends_with(0)
    assert not [line for line in hub.asked[seen:] if "/api/models" in line or "config.json" in line]
    online(*measure(text, tmp_path / "work", "-nr")).ends_with(3, "config.json")  # anew: the branch as it is


@pytest.mark.parametrize(("bound", "most"), [("100kB", 100_000), ("0", 0)])
def test_the_folder_of_blocks_is_bounded(
    bound: str, most: int, hub: ModelHub, online: Callable[..., Run], text: Path, tmp_path: Path
) -> None:
    total = sum(len(d) for n, d in hub.repos["me/model"]["main"].files.items() if n.endswith(".safetensors"))
    assert total > 150_000
    online(*measure(text, tmp_path / "work", "--source-cache", bound)).ends_with(0)
    assert blocks_of(tmp_path / "work") <= most
    assert most == 0 or blocks_of(tmp_path / "work") > 0
    hub_cache = [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and not p.is_symlink()]
    assert sum(p.stat().st_size for p in hub_cache) < 100_000  # no shard went there


def test_a_damaged_block_is_fetched_again(online: Callable[..., Run], text: Path, tmp_path: Path) -> None:
    online(*measure(text, tmp_path / "one")).ends_with(0)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert blocks_of(tmp_path / "two") > 100_000
    for path in (tmp_path / "two" / "source" / "blocks").glob("*-*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    shutil.rmtree(tmp_path / "two" / "measure")
    online(*measure(text, tmp_path / "two")).ends_with(0)
    assert (tmp_path / "two" / "measurement.json").read_bytes() == (tmp_path / "one" / "measurement.json").read_bytes()


def test_killed_and_resumed(hub: ModelHub, text: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    command = [*measure(text, tmp_path / "work")]
    env = {**os.environ, **hub_env(hub, tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, "-m", "exl2ray.cli", *map(str, command)], env=env, stderr=subprocess.DEVNULL)
    records = tmp_path / "work" / "measure" / "records"
    while process.poll() is None and not list(records.glob("model.layers*.json")):
        time.sleep(0.01)  # until the first module is committed
    process.kill()
    process.wait()
    done = exl2ray(*command, seconds=60, env=hub_env(hub, tmp_path))
    done.ends_with(0)
    assert hashlib.sha256((tmp_path / "work" / "measurement.json").read_bytes()).hexdigest() == wanted["measurement.json"]


def test_broken_downloads_go_on(
    hub: ModelHub, online: Callable[..., Run], text: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    hub.fail = {r"GET /storage/.*00001.*bytes=0-[0-9]{5}": (1, 2), "GET /api/": (503, 1), "GET /storage/.*00002": (500, 1),
                "GET /storage/.*00003": (0, 1)}  # fmt: skip
    online(*measure(text, tmp_path / "work")).ends_with(0)
    assert hashlib.sha256((tmp_path / "work" / "measurement.json").read_bytes()).hexdigest() == wanted["measurement.json"]
    assert all(times == 0 for pattern, (_, times) in hub.fail.items() if "bytes" not in pattern)


def test_a_signed_address_that_expired_is_asked_for_again(hub: ModelHub, online: Callable[..., Run], text: Path) -> None:
    online(*plan("hf://me/model", text)).ends_with(0)
    asked = len(hub.sent("GET /storage/"))
    assert len(hub.sent("GET /me/model/resolve/.*safetensors")) < asked  # once for many pieces
    hub.fail = {"GET /storage/.*bytes=[1-9]": (403, 1)}
    online(*plan("hf://me/model", text)).ends_with(0)


@pytest.mark.parametrize("expired", [False, True])
def test_an_address_that_another_thread_replaces_meanwhile(
    expired: bool, hub: ModelHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every answer of the Hub signs anew; an older address is as good, and asked for again where it is not."""
    for name, value in hub_env(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = Repository(Address("hf", "me/model"), Blocks(None, 0))
    entry = next(f for f in repository.listing().entries if f.name.endswith(".safetensors"))
    file, data = repository.open(entry), hub.repos["me/model"]["main"].files[entry.name]

    def read(first: int) -> None:
        part = bytearray(1000)
        file.read(memoryview(part), first, False)
        assert part == data[first : first + 1000]

    def another(line: str) -> None:
        hub.before = lambda line: None
        hub.fail = {"GET /storage/": (403, 1)}
        read(2000)  # in the thread of the server, while the first one waits for its answer
        hub.fail = {"GET /storage/": (403, 1)} if expired else {}

    read(0)
    hub.before = another
    read(1000)
    assert len(hub.sent("/resolve/")) == 2


def test_offline_with_a_model_in_the_cache(
    hub: ModelHub, online: Callable[..., Run], model: Path, text: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--me--model" / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    online(*plan("hf://me/model", text), HF_HUB_OFFLINE="1").ends_with(0, "hf://me/model@aaaa")
    next(snapshot.glob("*00002*")).unlink()
    online("plan", "-i", "hf://me/model", "-b", "4", HF_HUB_OFFLINE="1").ends_with(10, "the Hub's cache lacks model-00002")
    assert hub.asked == []


# ---- the Hub: refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "convert", "dry-run"])
@pytest.mark.parametrize(
    ("change", "address", "status", "words"),
    [
        ("", "hf://me/modle", 3, ["not found, or not shown to you", "is the name right?"]),
        ("", "hf://me/model@nowhere", 3, ["there is no revision nowhere"]),
        ("", "hf://me/model/folder", 3, ["has no folder folder"]),
        ("gated", "hf://me/model", 10, ["the model is gated (403)", "accept its licence", "hf auth login"]),
        ("busy", "hf://me/model", 10, ["the Hub answers 429", "too many requests"]),
        ("down", "hf://me/model", 10, ["the Hub answers 503"]),
        ("gone", "hf://me/model", 10, ["cannot be reached, or broke off"]),
        ("whole", "hf://me/model", 10, ["does not send parts of files"]),
        ("gguf", "hf://me/gguf", 3, ["holds GGUF files (model.gguf)"]),
        ("adapter", "hf://me/adapter", 3, ["holds only a LoRA adapter", "merge it first"]),
        ("pickles", "hf://me/pickles", 3, ["holds PyTorch pickles (pytorch_model.bin)"]),
        ("folders", "hf://me/folders", 3, ["its folder inner does", "hf://me/folders@"]),
        ("huge", "hf://me/huge", 3, ["config.json", "larger than"]),
    ],
)
def test_refusals(
    change: str, address: str, status: int, words: list[str], command: str,
    hub: ModelHub, online: Callable[..., Run], model: Path, tmp_path: Path,
) -> None:  # fmt: skip
    if command != "plan" and change in ("", "down", "gone", "huge", "pickles", "folders"):
        pytest.skip("one command tells enough")
    files = hub.repos["me/model"]["main"].files
    hub.gated |= {"me/model"} if change == "gated" else set()
    hub.ranges = change != "whole"
    fails = {"busy": (429, 99), "down": (503, 99), "gone": (0, 99)}
    hub.fail = {"/api/": fails[change]} if change in fails else {}
    hub.add("me/gguf", {"model.gguf": b"GGUF", "README.md": b"x"})
    hub.add("me/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 99})
    hub.add("me/pickles", {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    hub.add("me/folders", {f"inner/{n}": d for n, d in files.items()})
    hub.add("me/huge", {**files, "config.json": b" " * (33 << 20)} if change == "huge" else files)
    where = ["-o", str(tmp_path / "work"), "-cf", str(tmp_path / "out")] if command != "plan" else []
    more = ["--dry-run"] if command == "dry-run" else []
    name = "plan" if command == "plan" else "convert"
    done = online(name, "-i", address, "-b", "4", *where, *more, EXL2RAY_SOURCE_ATTEMPTS="1")
    done.ends_with(status, *words)
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_repository(hub: ModelHub, online: Callable[..., Run], text: Path) -> None:
    hub.add("me/folders", {f"in/ner/{n}": d for n, d in hub.repos["me/model"]["main"].files.items()})
    online(*plan("hf://me/folders@main/in/ner", text)).ends_with(0, "Llama")


def test_private_models_need_the_token(hub: ModelHub, online: Callable[..., Run], text: Path) -> None:
    hub.private.add("me/model")
    online(*plan("hf://me/model", text)).ends_with(0)
    online("plan", "-i", "hf://me/model", "-b", "4", HF_TOKEN="").ends_with(3, "if the model is private: hf auth login")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://huggingface.co/me/model/tree/v1", ["give -i hf://me/model@v1"]),
        ("hf://model", ["not of the form hf://OWNER/NAME"]),
        ("hf://datasets/me/model", ["one of the Hub's datasets"]),
        ("hf://me/model/../other", ["have no meaning in an address"]),
        ("s3://", ["not of the form"]),
        (f"s3://key:{SECRET}@bucket/model", ["keys and signatures do not belong in it"]),
        (f"s3://bucket/model?X-Amz-Signature={SECRET}", ["keys and signatures do not belong in it"]),
        (f"hf://me:{SECRET}@model/x", ["not of the form"]),
        ("ftp://host/model", ["models are not read from ftp://"]),
    ],
)
def test_what_is_no_address(address: str, words: list[str], tmp_path: Path) -> None:
    for command in (["plan", "-b", "4"], ["convert", "-o", tmp_path / "work", "-b", "4"]):
        done = exl2ray(*command, "-i", address)
        done.ends_with(2, *words)
        assert SECRET not in done.out + done.err


def test_other_commands_take_addresses(
    hub: ModelHub, online: Callable[..., Run], model: Path, text: Path, tmp_path: Path
) -> None:
    places = ("-o", tmp_path / "work", "-cf", tmp_path / "out")
    exl2ray("convert", "-i", model, *places, "-c", text, *QUICK, seconds=60).ends_with(0)
    online("solve", "-i", "hf://me/model", "-m", tmp_path / "work" / "measurement.json", "-b", "4").ends_with(0)
    online("verify", tmp_path / "out", "-i", "hf://me/model").ends_with(0, "sound")
    tokens = tmp_path / "t.npy"
    np.save(tokens, np.arange(128, dtype=np.int64).reshape(1, 128) % 200)
    done = online("eval", "--model", tmp_path / "out", "--reference", "hf://me/model", "--tokens", tokens, "--device", "cpu")
    done.ends_with(0, "reference hf://me/model@")
    done = online("chat", "hf://me/model", tmp_path / "out", "--prompt", "Hello", "--max-tokens", "2", "--device", "cpu")
    done.ends_with(0, "hf://me/model")
    online("calibration", "-i", "hf://me/model", "-c", text, "-l", "128", "-ml", "128", "-r", "2", "-mr", "2").ends_with(0)


# ---- blocks ---------------------------------------------------------------------------------------------------------------


def test_blocks_are_fetched_once_while_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, fetched = os.urandom(50_000), []
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(blocks, "SMALL_BYTES", 100)

    def fetch(buffer: memoryview, offset: int) -> None:
        fetched.append((offset, len(buffer)))
        buffer[:] = content[offset : offset + len(buffer)]

    some = blocks.Blocks(tmp_path / "b", 3 * (8192 + 4) + 10)
    for _ in range(2):
        for begin, end in ((0, 50_000), (5_000, 21_000), (49_990, 50_000), (16_384, 16_385)):
            out = bytearray(end - begin)
            some.read(memoryview(out), begin, len(content), "key", fetch)
            assert bytes(out) == content[begin:end]
    kept = sorted(p.name for p in (tmp_path / "b").iterdir() if not p.name.startswith("."))
    assert len(kept) == 3
    assert sum((tmp_path / "b" / n).stat().st_size for n in kept) == 3 * (8192 + 4)
    stored = {int(n.rpartition("-")[2]) * 8192 for n in kept}
    assert all([offset for offset, _ in fetched].count(start) == 1 for start in stored)
