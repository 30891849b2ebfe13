"""Tuning as the last step of a conversion: where it writes, what it says, that it goes on and is done only once."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import exl2ray
from tiny_models import write_model

from exl2ray.convert import convert, patch
from exl2ray.errors import Exl2RayError, StoreError, UsageError
from exl2ray.events import OutputSummary, Silent
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.verify import verify_directory
from exl2ray.recipe import Recipe
from exl2ray.report.facts import read_facts
from exl2ray.store.file_names import is_ours, is_place_of_ours
from exl2ray.store.status import read_status
from exl2ray.tune import state

BITS = (4.0, 5.0)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tuned") / "model", "Llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("\n".join("".join(map(chr, torch.randint(65, 122, (80,), generator=g).tolist())) for _ in range(700)))
    return path


def recipe(model: Path, root: Path, text: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "in_dir": str(model), "out_dir": str(root / "work"), "compile_full": str(root / "out-{bpw}"), "bits": BITS,
        "length": 128, "measurement_length": 128, "measurement_rows": 4, "dataset_rows": 6, "executor": "inline",
        "device": "cpu", "evaluate": "never", "quality": "reference", "cal_dataset": str(text), "tune": "16k",
    }  # fmt: skip
    return Recipe(**{**settings, **changes})


def contents(root: Path) -> dict[str, str]:
    files = [p for bits in BITS for p in sorted((root / f"out-{bits}").iterdir()) if not p.name.startswith(".")]
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(
    model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[OutputSummary, ...], Silent]:
    root, reporter = tmp_path_factory.mktemp("whole"), Silent()
    return root, convert(recipe(model, root, text), reporter).outputs, reporter


def test_every_bitrate_is_tuned_into_its_directory(whole: tuple[Path, tuple[OutputSummary, ...], Silent]) -> None:
    root, outputs, reporter = whole
    done = next(fields for name, fields in reporter.events if name == "done")
    assert [o["tuned"]["kept"] for o in done["outputs"]] == [o.tuned["kept"] for o in outputs if o.tuned is not None]
    for output in outputs:
        target, solved = root / f"out-{output.bits}", root / "work" / "quant" / f"{output.bits}" / "solved"
        assert output.directory == str(target)
        assert [Path(f).parent for f in output.files] == [target]
        assert verify_directory(target) == verify_directory(solved) == []
        assert output.tuned is not None
        tuned = json.loads((target / "config.json").read_text())["quantization_config"]["tuned"]
        assert tuned["kept"] == output.tuned["kept"]
        assert "tuned" not in json.loads((solved / "config.json").read_text())["quantization_config"]
        same = (target / "output.safetensors").read_bytes() == (solved / "output.safetensors").read_bytes()
        assert same == (tuned["kept"] == "nothing")
        card = (target / "README.md").read_text()
        assert f"| mean | {output.tuned['before']['mean']:.4f} | {output.tuned['after']['mean']:.4f} |" in card
        assert "--tune 16k" in card
    assert any(o.tuned is not None and o.tuned["kept"] != "nothing" for o in outputs)


def test_the_report_is_of_the_tuned_models(whole: tuple[Path, tuple[OutputSummary, ...], Silent]) -> None:
    root, outputs, _ = whole
    found = {b.bits: b for b in read_facts(str(root / "work")).bitrates}
    for output in outputs:
        tuning, tuned = found[output.bits].tuning, output.tuned
        assert tuning is not None
        assert tuned is not None
        assert (found[output.bits].directory, found[output.bits].file_bytes) == (output.directory, output.file_bytes)
        assert (tuning.before, tuning.after) == (tuned["before"]["mean"], tuned["after"]["mean"])
        record = json.loads((root / "work" / "quant" / f"{output.bits}" / "tune.json").read_text())
        assert record["start"] == Exl2Model(root / "work" / "quant" / f"{output.bits}" / "solved").fingerprint()


def test_the_work_directory_stays_locked_while_it_tunes(
    whole: tuple[Path, tuple[OutputSummary, ...], Silent], model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second driver could begin, and `status` said that nobody was at it."""
    work, told = str(whole[0] / "work"), []

    def looking(*_: Any) -> Any:
        found = read_status(work)
        told.append((found.state, [(p.name, p.state) for p in found.passes if p.name.startswith("tune")]))
        with pytest.raises(StoreError, match="in use"):
            convert(recipe(model, whole[0], text), Silent())
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr("exl2ray.tune.run.tune", looking)
        with pytest.raises(Stopped):
            convert(recipe(model, whole[0], text), Silent())
    assert told == [("running", [("tune 4.0", "running"), ("tune 5.0", "finished")])]
    assert read_status(work).state == "stopped"
    convert(recipe(model, whole[0], text), Silent())
    assert read_status(work).state == "finished"
    assert [(p.state, p.done) for p in read_status(work).passes if p.name.startswith("tune")] == [("finished", 1)] * 2


def test_again_it_computes_and_writes_nothing(
    whole: tuple[Path, tuple[OutputSummary, ...], Silent], model: Path, text: Path
) -> None:
    root, outputs, _ = whole
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")}
    again = Silent()
    assert convert(recipe(model, root, text), again).outputs == outputs
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")} == before
    assert [name for name, _ in again.events if name in ("stage", "item")] == []
    assert sum("has the tuned model already" in fields.get("message", "") for _, fields in again.events) == len(BITS)


def test_stopped_in_the_middle_it_goes_on_to_the_same_bytes(
    whole: tuple[Path, tuple[OutputSummary, ...], Silent], model: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write, calls = sys.modules["exl2ray.tune.run"].write_tuned, []  # type: ignore[attr-defined]

    def stopping(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped
        return write(*given)

    monkeypatch.setattr("exl2ray.tune.run.write_tuned", stopping)
    with pytest.raises(Stopped):
        convert(recipe(model, tmp_path, text), Silent())
    assert not (tmp_path / "out-5.0" / "config.json").exists()
    convert(recipe(model, tmp_path, text), Silent())
    assert contents(tmp_path) == contents(whole[0])
    assert len(calls) == 3  # the finished bitrate was not tuned again
    assert not list(tmp_path.rglob(state.FILE))


def test_what_was_damaged_is_tuned_again(
    whole: tuple[Path, tuple[OutputSummary, ...], Silent], model: Path, text: Path
) -> None:
    root, _, _ = whole
    before = contents(root)
    with open(root / "out-4.0" / "output.safetensors", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\xff\x00"[:1])
        f.truncate(f.tell() - 1)
    convert(recipe(model, root, text), Silent())
    assert contents(root) == before


def test_plan_says_what_it_takes(model: Path, tmp_path: Path) -> None:
    def planned(*more: str) -> tuple[str, int]:
        flags = ("-i", model, "-o", tmp_path / "w", "-cf", tmp_path / "out", "--device", "cpu", "--json", *more)
        run = exl2ray("plan", *flags, seconds=20)
        found = json.loads(run.out)
        need = next(d for d in found["disks"] if d["what"] == "work directory")
        return " ".join(found["warnings"]), need["least_bytes"]

    (plain, less), (tuned, more) = planned(), planned("--tune", "4M")
    assert "--tune" not in plain
    assert "the time leaves out --tune 4M" in tuned
    assert re.search(r"[0-9] [MG]B of GPU memory", tuned)
    assert more > less


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": "many"}, "--tune many: not a number of tokens"),
        ({"compile_full": None}, "--tune needs -cf"),
        ({"out_dir": "s3://bucket/work"}, "work directory on this machine"),
        ({"tune": None, "tune_text": "a.txt"}, "--tune-text: nothing is tuned"),
        ({"rope_scale": 2.0}, "without -rs and -ra"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        recipe(tmp_path, tmp_path, tmp_path / "text", **changes)


def test_a_changed_setting_is_refused(
    whole: tuple[Path, tuple[OutputSummary, ...], Silent], model: Path, text: Path
) -> None:
    with pytest.raises(Exl2RayError, match="--tune"):
        convert(recipe(model, whole[0], text, tune="32k"), Silent())


def test_a_patch_does_not_take_the_place_of_a_tuned_model(
    model: Path, text: Path, whole: tuple[Path, tuple[OutputSummary, ...], Silent], tmp_path: Path
) -> None:
    root, _, _ = whole
    before = contents(root)
    (tmp_path / "link").symlink_to(root / "out-4.0")
    for place in (None, str(root / "out-{bpw}"), str(tmp_path / "link"), f"{root}/x/../out-5.0"):
        with pytest.raises(UsageError, match=r"was tuned \(--tune 16k\); a patch would put a model there that is not"):
            patch(recipe(model, root, text), ("*.v_proj=8",), Silent(), compile_full=place)
    assert contents(root) == before


KEPT = ["states/4-1-0-0.safetensors", "nonce/ab.json", "homes/0/x", "written/records/piece-0.json", "state.json"]


@pytest.mark.parametrize("name", KEPT)
def test_what_a_tuning_keeps_in_a_work_directory_is_ours(name: str) -> None:
    assert is_ours(f"quant/4.0/tune/{name}")
    assert is_place_of_ours(f"quant/4.0/tune/{name}".rpartition("/")[0])
    assert not is_ours(f"quant/4.0/other/{name}")
