"""Models on the Hub and in object stores: what fails on the way, what goes on all the same, what is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bounded import Run, exl2ray
from model_hub import ModelHub
from remote_helpers import QUICK, SECRET, blocks_of, hub_env, measure, plan

from exl2ray.remote.address import Address
from exl2ray.remote.block_cache import Blocks
from exl2ray.remote.hub import Repository


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
def test_object_stores_that_give_nothing(s3: Any, address: str, changes: dict[str, str], words: list[str]) -> None:
    done = exl2ray("plan", "-i", address, "-b", "4", seconds=60, env={**s3[1], **changes})
    done.ends_with(3, *words)
    assert SECRET not in done.out + done.err


def test_a_resume_has_the_commit_that_the_job_began_with(
    hub: ModelHub, online: Callable[..., Run], text: Path, tmp_path: Path
) -> None:
    online(*measure(text, tmp_path / "work")).ends_with(0)
    before, seen = hub.repos["me/model"]["main"].sha, len(hub.asked)
    files = {**hub.repos["me/model"][before].files, "config.json": b"{}"}
    assert hub.add("me/model", files) != before
    online(*measure(text, tmp_path / "work")).ends_with(0)
    online("measure", "-o", tmp_path / "work").ends_with(0)
    assert not [line for line in hub.asked[seen:] if "/api/models" in line or "config.json" in line]
    online(*measure(text, tmp_path / "work", "-nr")).ends_with(3, "config.json")  # anew: the branch as it is


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
    measured(process, tmp_path)
    process.kill()
    process.wait()
    done = exl2ray(*command, seconds=60, env=hub_env(hub, tmp_path))
    done.ends_with(0)
    assert hashlib.sha256((tmp_path / "work" / "measurement.json").read_bytes()).hexdigest() == wanted["measurement.json"]


@pytest.fixture
def started(hub: ModelHub, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a program of its own, whose temporary folder is ``tmp_path / "tmp"``."""
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, **hub_env(hub, tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
           "TMPDIR": str(tmp_path / "tmp")}  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str | Path) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "exl2ray.cli", *map(str, command)]
        running.append(subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def measured(process: subprocess.Popen[bytes], root: Path) -> None:
    """Waits until the first module is committed."""
    while process.poll() is None and not list((root / "work" / "measure" / "records").glob("model.layers*.json")):
        time.sleep(0.01)


def left(root: Path) -> list[Path]:
    return sorted((root / "tmp").glob("exl2ray-source-*"))


def test_nothing_stays_in_the_temporary_folder(
    started: Callable[..., subprocess.Popen[bytes]], hub: ModelHub, text: Path, tmp_path: Path
) -> None:
    assert started(*plan("hf://me/model", text)).wait() == 0
    assert left(tmp_path) == []
    files = hub.repos["me/model"]["main"].files
    hub.add("me/model", {**files, "config.json": b"{}"})
    assert started(*plan("hf://me/model", text)).wait() == 3
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nor_after_a_stop(
    number: int, started: Callable[..., subprocess.Popen[bytes]], text: Path, tmp_path: Path
) -> None:
    process = started(*measure(text, tmp_path / "work"))
    measured(process, tmp_path)
    assert len(left(tmp_path)) == 1
    process.send_signal(number)
    assert process.wait() == 130
    assert left(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_one(
    started: Callable[..., subprocess.Popen[bytes]], text: Path, tmp_path: Path
) -> None:
    process = started(*measure(text, tmp_path / "work"))
    measured(process, tmp_path)
    process.send_signal(signal.SIGSTOP)
    found = left(tmp_path)
    assert started(*plan("hf://me/model", text)).wait() == 0
    assert left(tmp_path) == found  # of a process that lives
    process.kill()
    process.wait()
    assert left(tmp_path) == found
    assert started(*plan("hf://me/model", text)).wait() == 0
    assert left(tmp_path) == []


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


# ---- refusals ----------------------------------------------------------------------------------------------------------


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
        ("training", "hf://me/training", 3, ["training with DeepSpeed (global_step9)", "zero_to_fp32 hf://me/training@"]),
        ("folders", "hf://me/folders", 3, ["its folder inner does", "hf://me/folders@"]),
        ("huge", "hf://me/huge", 3, ["config.json", "larger than"]),
    ],
)
def test_refusals(
    change: str, address: str, status: int, words: list[str], command: str,
    hub: ModelHub, online: Callable[..., Run], tmp_path: Path
) -> None:  # fmt: skip
    if command != "plan" and change in ("", "down", "gone", "huge", "pickles", "folders", "training"):
        pytest.skip("one command tells enough")
    files = hub.repos["me/model"]["main"].files
    hub.gated |= {"me/model"} if change == "gated" else set()
    hub.ranges = change != "whole"
    fails = {"busy": (429, 99), "down": (503, 99), "gone": (0, 99)}
    hub.fail = {"/api/": fails[change]} if change in fails else {}
    hub.add("me/gguf", {"model.gguf": b"GGUF", "README.md": b"x"})
    hub.add("me/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 99})
    hub.add("me/pickles", {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    hub.add("me/training", {"latest": b"x", "config.json": b"{}", "global_step9/mp_rank_00_model_states.pt": b"x"})
    hub.add("me/folders", {f"inner/{n}": d for n, d in files.items()})
    hub.add("me/huge", {**files, "config.json": b" " * (33 << 20)} if change == "huge" else files)
    where = ["-o", str(tmp_path / "work"), "-cf", str(tmp_path / "out")] if command != "plan" else []
    more = ["--dry-run"] if command == "dry-run" else []
    name = "plan" if command == "plan" else "convert"
    done = online(name, "-i", address, "-b", "4", *where, *more, EXL2RAY_SOURCE_ATTEMPTS="1")
    done.ends_with(status, *words)
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()


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
