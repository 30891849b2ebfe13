"""Work directories with records and packed files that are not what they say: a typed error, or the model that a sound one
gives; never another model without a word. Who spoils a record here sets its checksum right afterwards, as a program that
writes to the directory could, or a person who repairs it by hand.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from workdir_cases import Conversion, contents

from exl2ray.convert import patch
from exl2ray.errors import Exl2RayError
from exl2ray.events import Silent
from exl2ray.report.facts import read_facts
from exl2ray.store.records import hash_inputs

Spoil = Callable[[Path], None]
TEXTS = {"value": "x", "extra": {}}
ATTENTION, NEXT, MLP = "model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.0.mlp"


def record(work: Path, key: str, kind: str = "quant/4.0") -> Path:
    (found,) = (work / kind / "records").glob(f"{key}.*.json")
    return found


def packed(work: Path, key: str, kind: str = "quant/4.0") -> Path:
    found = list((work / kind / "tensors").glob(f"{key}.*.safetensors"))
    return found[0] if found else pytest.skip("no second file system: packed tensors are in shards")


def body(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["record"])


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps({"record": record, "sha256": hash_inputs(record=record)}))


def changed(key: str, change: Callable[[dict[str, Any]], None], kind: str = "quant/4.0") -> Spoil:
    def spoil(work: Path) -> None:
        path = record(work, key, kind)
        found = body(path)
        change(found)
        write(path, found)

    return spoil


def swap(first: Path, second: Path) -> None:
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


def another_text(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"seconds":', b'"seconds" :', 1).replace(b'"payload":{', b'"payload":{"x":1,', 1))


def truncated(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x10
    path.write_bytes(data)


def take_contents_of(work: Path, key: str, source: str, kind: str = "quant/4.0", keep_names: bool = True) -> None:
    """The record of ``key`` says what that of ``source`` does, under its own name."""
    own, other = body(record(work, key)), body(record(work, source, kind))
    write(record(work, key), {**other, "key": own["key"], "kind": own["kind"], "inputs_hash": own["inputs_hash"]})


def take_measured(work: Path, key: str, source: str) -> None:
    own, other = (body(record(work, k, "measure")) for k in (key, source))
    write(record(work, key, "measure"), {**own, "payload": other["payload"]})


SPOILED: dict[str, Spoil] = {
    "record with another text": lambda w: another_text(record(w, ATTENTION)),
    "record cut off": lambda w: truncated(record(w, ATTENTION), 0.5),
    "record deep": lambda w: (record(w, ATTENTION).write_text("[" * 100_000), None)[1],
    "wrong hash of the packed file": changed(ATTENTION, lambda r: r["files"][0].update(sha256="0" * 64)),
    "wrong size of the packed file": changed(ATTENTION, lambda r: r["files"][0].update(size=17)),
    "packed file cut off": lambda w: truncated(packed(w, ATTENTION), 0.7),
    "packed file altered": lambda w: flipped(packed(w, ATTENTION)),
    "packed file missing": lambda w: packed(w, ATTENTION).unlink(),
    "records of two modules swapped": lambda w: swap(record(w, ATTENTION), record(w, NEXT)),
    "packed files of two modules swapped": lambda w: swap(packed(w, ATTENTION), packed(w, NEXT)),
    "record with the file of another module": lambda w: take_contents_of(w, ATTENTION, NEXT),
    "record with the file of another kind of module": lambda w: take_contents_of(w, ATTENTION, MLP),
    "record with the file of another bitrate": lambda w: take_contents_of(w, MLP, MLP, "quant/5.0"),
    "record of another bitrate": lambda w: (shutil.copy(record(w, MLP, "quant/5.0"), record(w, MLP)), None)[1],
    "packed file of another bitrate": lambda w: (shutil.copy(packed(w, MLP, "quant/5.0"), packed(w, MLP)), None)[1],
    "record without files": changed(ATTENTION, lambda r: r.update(files=[])),
    "record without a payload": changed(ATTENTION, lambda r: r.update(payload={})),
    "record with a file outside": changed(ATTENTION, lambda r: r["files"][0].update(rel="../../etc/passwd")),
    "record with an unknown field": changed(ATTENTION, lambda r: r.update(unknown=1)),
    "record with fields of other types": changed(ATTENTION, lambda r: r.update(payload=[1], created={})),
    "head's record without a perplexity": changed("lm_head.linear", lambda r: r.update(payload={})),
    "head's record with a text for a perplexity": changed("lm_head.linear", lambda r: r["payload"].update(perplexity="12")),
    "output's record with shards of another form": changed("output", lambda r: r.update(payload={"shards": [[1]]})),
    "source's record with files of another form": changed("source", lambda r: r["payload"].update(files=[{}]), "measure"),
    "measured with another text": lambda w: another_text(record(w, MLP, "measure")),
    "measured without a payload": changed(MLP, lambda r: r.update(payload={}), "measure"),
    "measured with a profile of texts": changed(MLP, lambda r: r["payload"].update(profile=TEXTS), "measure"),
    "measured as another module": lambda w: take_measured(w, MLP, ATTENTION),
    "measurements of two modules swapped": lambda w: swap(record(w, MLP, "measure"), record(w, ATTENTION, "measure")),
}


PATCHED = ("record cut off", "packed file altered", "packed files of two modules swapped",
           "record with the file of another bitrate", "record of another bitrate", "record without files",
           "head's record without a perplexity", "measured as another module")  # fmt: skip
ALTERED = {  # a file is not what its record says: the module is computed again
    "wrong hash of the packed file", "wrong size of the packed file", "packed file cut off", "packed file altered",
    "packed file missing", "records of two modules swapped", "packed files of two modules swapped",
    "record of another bitrate", "packed file of another bitrate",
}
UNHARMED = {"record without a payload", "output's record with shards of another form", "measurements of two modules swapped"}
SEEN = {  # by whoever reads records and sizes only
    "record with another text", "record cut off", "record deep", "wrong size of the packed file", "packed file cut off",
    "packed file missing", "packed file of another bitrate", "record with a file outside", "record with an unknown field",
    "record with fields of other types",
}


@pytest.mark.parametrize("case", SPOILED)
def test_going_on(case: str, made: Conversion, tmp_path: Path) -> None:
    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "target"
    SPOILED[case](work)
    refused = refusal(lambda: made.convert(work, target))
    assert (refused is None) == (case in ALTERED | UNHARMED), refused
    if refused is None:
        assert contents(target) == contents(made.target)
    else:
        assert not (target / "config.json").exists()


def refusal(run: Callable[[], object]) -> Exl2RayError | None:
    """The typed error that a run ends with, if any; other exceptions are the test's failure."""
    try:
        run()
    except Exl2RayError as e:
        return e if e.exit_code > 1 and "defect" not in str(e) else pytest.fail(str(e))
    return None


@pytest.fixture(scope="module")
def patched(made: Conversion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `patch` makes of a sound work directory."""
    root = tmp_path_factory.mktemp("patched")
    return patch_to(made, made.copy_of_work(root / "work"), root / "out")


def patch_to(made: Conversion, work: Path, target: Path) -> Path:
    patch(made.recipe(work, None), ["*.1.*.v_proj=8"], Silent(), (4.0,), str(target))
    return target


@pytest.mark.parametrize("case", PATCHED)
def test_patching(case: str, made: Conversion, patched: Path, tmp_path: Path) -> None:
    work = made.copy_of_work(tmp_path / "work")
    SPOILED[case](work)
    if refusal(lambda: patch_to(made, work, tmp_path / "out")) is None:
        assert contents(tmp_path / "out") == contents(patched)
    else:
        assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("case", SPOILED)
def test_what_status_and_report_read(case: str, made: Conversion, tmp_path: Path) -> None:
    """Both leave out what is damaged, and name it; neither ends with an error."""
    work = made.copy_of_work(tmp_path / "work")
    SPOILED[case](work)
    facts = read_facts(str(work))
    assert [b.chain.bits for b in facts.bitrates] == [4.0, 5.0]
    assert bool(facts.problems) == (case in SEEN)


def test_status_of_a_spoiled_directory(made: Conversion, tmp_path: Path) -> None:
    work = made.copy_of_work(tmp_path / "work")
    for case in ("packed file cut off", "measured with a profile of texts"):
        SPOILED[case](work)
    exl2ray("status", work).ends_with(0)
