"""Models on the Hub and in object stores: the same bytes as from a folder, and little of them on this disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bounded import Run, exl2ray
from model_hub import SIGNATURE, TOKEN, ModelHub
from remote_helpers import QUICK, SECRET, blocks_of, hub_env, made, measure, no_secret_below, plan, without_card

from exl2ray.remote import block_cache


def test_hub(hub: ModelHub, online: Callable[..., Run], text: Path, wanted: dict[str, str], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_object_stores(kind: str, request: pytest.FixtureRequest, text: Path, wanted: dict[str, str], tmp_path: Path) -> None:
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


def test_a_folder_of_a_repository(hub: ModelHub, online: Callable[..., Run], text: Path) -> None:
    hub.add("me/folders", {f"in/ner/{n}": d for n, d in hub.repos["me/model"]["main"].files.items()})
    online(*plan("hf://me/folders@main/in/ner", text)).ends_with(0, "Llama")


def test_other_commands_take_addresses(online: Callable[..., Run], model: Path, text: Path, tmp_path: Path) -> None:
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


def test_blocks_are_fetched_once_while_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, fetched = os.urandom(50_000), []
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(block_cache, "SMALL_BYTES", 100)

    def fetch(buffer: memoryview, offset: int) -> None:
        fetched.append((offset, len(buffer)))
        buffer[:] = content[offset : offset + len(buffer)]

    limit = 3 * (8192 + 4) + 10
    some = block_cache.Blocks(tmp_path / "b", limit)
    for _ in range(2):
        for begin, end in ((0, 50_000), (5_000, 21_000), (49_990, 50_000), (16_384, 16_385)):
            out = bytearray(end - begin)
            some.read(memoryview(out), begin, len(content), "key", fetch)
            assert bytes(out) == content[begin:end]
    kept = sorted(p.name for p in (tmp_path / "b").iterdir() if not p.name.startswith("."))
    assert len(kept) == 3  # which of the first read's: threads race, and the last of the file is a short one
    assert sum((tmp_path / "b" / n).stat().st_size for n in kept) == int((tmp_path / "b" / ".used").read_text()) <= limit
    stored = {int(n.rpartition("-")[2]) * 8192 for n in kept}
    assert all([offset for offset, _ in fetched].count(start) == 1 for start in stored)
