"""Data sets of the Hub to calibrate on: which of their files are read, and what the Hub does not have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounded import exl2ray
from fake_hub import TOKEN, Branch, FakeHub, serving

TEXTS = [f"document {i} says: a quiet harbour, {'boats and gulls, ' * (i % 5)}evening." for i in range(60)]
CHATS = [[{"role": role, "content": f"{role} says {i}."} for role in ("user", "assistant")] for i in range(60)]
FEW = ("-r", "4", "-mr", "2", "-l", "128", "-ml", "128")


def shard_bytes(texts: Sequence[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(texts), "n": list(range(len(texts)))}), sink)
    return bytes(sink.getvalue())


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    files = {f"data/train-{i:05d}-of-00003.parquet": shard_bytes(TEXTS[i * 20 : i * 20 + 20]) for i in range(3)}
    repo = hub.add_repo("some/texts", **{**files, "README.md": b"# a set", "more/story.txt": "\n".join(TEXTS).encode()})
    repo.branches["old"] = Branch("0" * 40, {"a.jsonl": "".join(json.dumps(chat) + "\n" for chat in CHATS).encode()})
    scripts = hub.add_repo("some/script", **{"load.py": b"print()"})
    made = {"default/train/0000.parquet": shard_bytes(TEXTS)}
    scripts.branches["refs/convert/parquet"] = Branch("1" * 40, made)
    with serving(hub):
        yield hub


def hub_env(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("some/texts", ["train-00000-of-00003.parquet (Parquet): column text", "256 tokens"]),
        ("some/texts:text", ["column text"]),
        ("some/texts@main/data", ["train-00000-of-00003.parquet"]),
        ("some/texts/data/train-00001-*.parquet", ["train-00001-of-00003.parquet"]),
        ("some/texts/more/story.txt", ["story.txt (text)"]),
        ("some/texts@old", ["a.jsonl (JSON lines)"]),
        ("some/script", ["default/train/0000.parquet (Parquet)"]),
    ],
)
def test_data_sets_of_the_hub(place: str, words: list[str], hub: FakeHub, base: Path, tmp_path: Path) -> None:
    run = exl2ray("calibration", "-i", base, "-c", f"hf://datasets/{place}", *FEW, env=hub_env(hub, tmp_path))
    run.ends_with(0, *words)
    assert TOKEN not in run.out + run.err


def test_only_the_first_files_are_fetched(hub: FakeHub, base: Path, tmp_path: Path) -> None:
    hub.requests.clear()
    few = ("-r", "1", "-mr", "1", "-l", "128", "-ml", "128")
    exl2ray("calibration", "-i", base, "-c", "hf://datasets/some/texts", *few, env=hub_env(hub, tmp_path)).ends_with(0)
    assert {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path} == {"train-00000-of-00003.parquet"}


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("some/nothing", 4, "not found"),
        ("some/texts@absent", 4, "no revision absent"),
        ("some/texts/none", 4, "some/texts has no none"),
        ("some", 2, "not the address of a data set"),
        ("some/texts/../../x", 2, "leads out of the data set"),
        ("some/texts:none", 2, "has no column 'none'"),
    ],
)
def test_what_the_hub_does_not_have(place: str, status: int, words: str, hub: FakeHub, base: Path, tmp_path: Path) -> None:
    run = exl2ray("calibration", "-i", base, "-c", f"hf://datasets/{place}", *FEW, env=hub_env(hub, tmp_path))
    run.ends_with(status, words)
    assert TOKEN not in run.out + run.err


def test_a_hub_that_fails(hub: FakeHub, base: Path, tmp_path: Path) -> None:
    env = {**hub_env(hub, tmp_path), "HF_ENDPOINT": "http://me:hunter2@127.0.0.1:9"}
    run = exl2ray("calibration", "-i", base, "-c", "hf://datasets/some/texts", *FEW, env=env)
    run.ends_with(10, "@127.0.0.1:9 cannot be reached")
    assert TOKEN not in run.out + run.err
    assert "hunter2" not in run.out + run.err
