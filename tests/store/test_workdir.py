"""Opening, resuming, refusing, reusing and clearing a work directory."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from store_helpers import FAST, JOB, VERSIONS, status_of

from exl2ray.errors import JobMismatchError, StoreError
from exl2ray.store.event_log import read_events
from exl2ray.store.file_names import CALIBRATION, MEASUREMENT, is_ours, quant_kind
from exl2ray.store.fs import Store, temp_name
from exl2ray.store.job_file import compare_jobs, is_marked
from exl2ray.store.local import LocalStore
from exl2ray.store.nonce import verify_nonce
from exl2ray.store.open import open_store
from exl2ray.store.records import Record, hash_inputs, item_file
from exl2ray.store.status import read_status
from exl2ray.store.workdir import WorkDir

Job = dict[str, dict[str, Any]]


def open_work(root: str | Path, job: Job, resume: bool = True, **options: Any) -> WorkDir:
    options = {"versions": VERSIONS, "timing": FAST, **options}
    return WorkDir.create_or_resume(str(root), job, resume=resume, **options)


def fill(store: Store) -> None:
    """One of everything that exl2ray writes."""
    for name in (CALIBRATION, MEASUREMENT, "output.safetensors", "output-00001-of-00002.safetensors"):
        store.put(name, b"x")
    for kind in ("measure", quant_kind(4)):
        store.put(item_file(kind, "states", "lm_head", "0" * 64), b"x")
        store.put(item_file(kind, "tensors", "lm_head", "0" * 64), b"x")
    store.put("logs/worker/a.log", b"x")
    store.put("report.html", b"x")


def changed(job: Job, section: str, **values: Any) -> Job:
    other = copy.deepcopy(job)
    other[section].update(values)
    return other


def test_a_moved_model_is_the_same_job(root: str, job: Job) -> None:
    """Its fingerprint is the same; the new place is kept, for a resume with the work directory alone."""
    here, there = (changed(job, "identity", in_dir=d, cal_dataset=f"{d}/data") for d in ("/old", "/new"))
    assert compare_jobs(here, there) == []
    open_work(root, here).close()
    created = WorkDir.read_job(root).created
    with open_work(root, there) as work:
        assert WorkDir.read_job(root).job == there
        assert not work.store.exists("job-1.json")
    stored = WorkDir.read_job(root)
    assert (stored.job, stored.created) == (there, created)
    with pytest.raises(JobMismatchError, match="fingerprint"):
        open_work(root, changed(there, "identity", fingerprint="other"))


def test_new_directory_then_resume(root: str, job: Job) -> None:
    assert WorkDir.read_job(root) is None
    with open_work(root, job) as work:
        assert WorkDir.read_job(root).job == job
        assert work.notes == []
        first = work.store.get("job.json")
        work.records.commit(Record("measure", "lm_head", hash_inputs(a=1), {"x": 1}))
    with open_work(root, job) as work:
        assert work.store.get("job.json") == first  # written once
        assert work.records.find("measure", "lm_head", hash_inputs(a=1)).payload == {"x": 1}
        work.store.flush()
        events, skipped = read_events(work.store)
        assert skipped == 0
        assert [e["fields"]["mode"] for e in events] == ["created", "resumed"]
    stored = WorkDir.read_job(root)
    assert stored.job == job
    assert stored.versions == VERSIONS
    assert "driver.lock" not in open_store(root).entries()


def test_tuples_and_key_order_are_the_same_settings(tmp_path: Path, job: Job) -> None:
    open_work(tmp_path, changed(job, "quantize", bits=(4.0, 5.0))).close()
    reordered = {s: dict(reversed(list(job[s].items()))) for s in reversed(list(job))}
    open_work(tmp_path, changed(reordered, "quantize", bits=[4.0, 5.0])).close()


def test_second_driver_is_refused(root: str, job: Job) -> None:
    with open_work(root, job):
        for resume in (True, False):
            with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
                open_work(root, job, resume=resume)


def refused(root: Path, job: Job) -> str:
    with pytest.raises(JobMismatchError) as caught:
        open_work(root, job)
    return caught.value.message


def test_what_only_follows_from_other_settings_is_not_listed_beside_them(tmp_path: Path, job: Job) -> None:
    open_work(tmp_path, job).close()
    follows = changed(job, "quantize", allocates="linear", numerics={"sweeps": 2})
    both = refused(tmp_path, changed(follows, "quantize", quality="best"))
    assert "quality" in both
    assert "numerics" not in both
    assert "numerics" in refused(tmp_path, follows)


def test_changed_settings_are_listed_with_their_flags(tmp_path: Path, job: Job) -> None:
    open_work(tmp_path, job).close()
    other = changed(changed(job, "quantize", bits=[3.5]), "output", shard_size_mb=4096)
    del other["quantize"]["head_bits"]
    with pytest.raises(JobMismatchError) as caught:
        open_work(tmp_path, other, flags={"quantize.bits": "-b/--bits"})
    message = caught.value.message
    assert "  -b/--bits: [4.0] -> [3.5]\n" in message
    assert "  quantize.head_bits: 6 -> (not set)\n" in message
    assert "  output.shard_size_mb: 8192 -> 4096\n" in message
    assert "the modules measured so far can still be used" in message
    assert "--reuse" in caught.value.hint
    assert "-m " not in caught.value.hint  # there is no measurement.json yet
    assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "job.json"]
    LocalStore(str(tmp_path)).put(MEASUREMENT, b"{}")
    with pytest.raises(JobMismatchError) as caught:
        open_work(tmp_path, other)
    assert f"-m {tmp_path}/measurement.json" in caught.value.hint


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("identity", {"fingerprint": "cd34"}, "nothing in it is of use"),
        ("measure", {"rows": 8}, "measurement and all that follows"),
        ("quantize", {"head_bits": 8}, "measured so far can still be used"),
        ("output", {"compile_full": "out"}, "quantised modules too"),
    ],
)
def test_what_stays_reusable(tmp_path: Path, job: Job, section: str, values: dict[str, Any], expected: str) -> None:
    open_work(tmp_path, job).close()
    with pytest.raises(JobMismatchError, match=expected) as caught:
        open_work(tmp_path, changed(job, section, **values))
    assert ("--reuse" in caught.value.hint) == (section in ("quantize", "output"))
    open_work(tmp_path, job).close()  # the refusal released the lock


def test_reuse_keeps_the_measurement(root: str, job: Job) -> None:
    with open_work(root, job) as work:
        work.store.put(MEASUREMENT, b"profiles")
        work.records.commit(Record("measure", "lm_head", "ab" * 32, {}))
        before = work.store.get("job.json")
    other = changed(job, "quantize", bits=[3.0])
    with open_work(root, other, allow_changed={"quantize", "output"}) as work:
        assert WorkDir.read_job(root).job == other
        assert work.store.get("job-1.json") == before
        assert work.store.get(MEASUREMENT) == b"profiles"
        assert work.records.find("measure", "lm_head", "ab" * 32) is not None
    third = changed(other, "output", shard_size_mb=1)
    with open_work(root, third, allow_changed={"output"}) as work:
        assert work.store.exists("job-2.json")
    with open_work(root, third, allow_changed={"output"}) as work:
        assert not work.store.exists("job-3.json")


def test_reuse_interrupted_before_the_new_job_was_written_archives_once(tmp_path: Path, job: Job) -> None:
    open_work(tmp_path, job).close()
    store = LocalStore(str(tmp_path))
    store.put("job-1.json", store.get("job.json"))
    open_work(tmp_path, changed(job, "output", shard_size_mb=1), allow_changed={"output"}).close()
    assert not store.exists("job-2.json")


def test_only_late_sections_may_be_allowed_to_change(tmp_path: Path, job: Job) -> None:
    open_work(tmp_path, job).close()
    with pytest.raises(JobMismatchError):
        open_work(tmp_path, changed(job, "quantize", bits=[3.0]), allow_changed={"output"})
    with pytest.raises(StoreError, match="measure cannot be allowed"):
        open_work(tmp_path, job, allow_changed={"measure"})


@pytest.mark.parametrize(
    "bad", [{}, {**JOB, "extra": {}}, {**JOB, "measure": [1]}, {**JOB, "output": {"x": Path("x")}}]
)
def test_malformed_jobs_are_refused_before_anything_is_written(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(StoreError):
        open_work(tmp_path / "work", bad)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("resume", [True, False])
def test_foreign_directory_is_refused_and_left_as_it_was(tmp_path: Path, job: Job, resume: bool) -> None:
    for names in (["thesis.tex"], ["measure"], ["job.json"], ["job.json", "thesis.tex"]):
        place = tmp_path / "-".join(names)
        place.mkdir()
        for name in names:
            (place / name).write_text("precious")
        with pytest.raises(StoreError, match=names[0]):
            open_work(place, job, resume=resume)
        assert sorted(os.listdir(place)) == sorted(names)
        assert all((place / name).read_text() == "precious" for name in names)


def test_no_resume_deletes_what_is_ours_and_nothing_else(root: str, job: Job) -> None:
    foreign = ["notes.txt", "measure/notes.txt", "mine/measure/records/a.json", "measurement.json.bak", "quant/readme"]
    with open_work(root, job) as work:
        fill(work.store)
        for name in foreign:
            work.store.put(name, b"precious")
        work.event("before")
    with open_work(root, changed(job, "measure", rows=1), resume=False) as work:
        work.store.flush()
        present = [n for n in work.store.list() if n != "driver.lock" and not n.startswith("events")]
        assert present == sorted([*foreign, "job.json"])
        assert [e["name"] for e in read_events(work.store)[0]] == ["opened"]
        assert WorkDir.read_job(root).job["measure"]["rows"] == 1
        if work.store.is_local:
            assert not Path(work.store.root, "quant", "4.0").exists()


def test_links_are_removed_not_followed(tmp_path: Path, job: Job) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.json").write_text("precious")
    work_root = tmp_path / "work"
    open_work(work_root, job).close()
    (work_root / "measure").mkdir()
    (work_root / "measure" / "records").symlink_to(outside)
    (work_root / "measurement.json").symlink_to(outside / "model.json")
    open_work(work_root, job, resume=False).close()
    assert (outside / "model.json").read_text() == "precious"
    assert not (work_root / "measurement.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[: len(d) // 2],
        lambda d: d.replace(b"2048", b"1024"),
        lambda d: d.replace(b'"exl2ray work directory": 1', b'"exl2ray work directory": 2'),
        lambda d: d.replace(b'"measure"', b'"measured"'),
        lambda d: d[:30] + b"\xff" * 100,
    ],
)
def test_damaged_job_file_is_an_error_and_can_be_cleared(tmp_path: Path, job: Job, damage: Any) -> None:
    open_work(tmp_path, job).close()
    path = tmp_path / "job.json"
    path.write_bytes(damage(path.read_bytes()))
    for attempt in (lambda: open_work(tmp_path, job), lambda: WorkDir.read_job(str(tmp_path))):
        with pytest.raises(StoreError, match=r"job\.json") as caught:
            attempt()
        assert "-nr" in caught.value.hint
    open_work(tmp_path, job, resume=False).close()
    open_work(tmp_path, job).close()


@pytest.mark.parametrize("text", [b"", b"{}", b'{"in_dir": "model", "out_dir": "x"}'])
def test_job_file_without_our_mark_is_never_cleared(tmp_path: Path, job: Job, text: bytes) -> None:
    (tmp_path / "job.json").write_bytes(text)
    assert not is_marked(text)
    for resume in (True, False):
        with pytest.raises(StoreError, match="not written by exl2ray"):
            open_work(tmp_path, job, resume=resume)
    assert (tmp_path / "job.json").read_bytes() == text


def test_leftovers_of_killed_writers_are_swept(tmp_path: Path, job: Job) -> None:
    store = LocalStore(str(tmp_path))
    store.put(temp_name(), b"torn")  # a driver killed before its first job.json
    open_work(tmp_path, job).close()
    store.put(f"measure/records/{temp_name()}", b"torn")
    store.put(f"quant/4.0/tensors/{temp_name()}", b"torn")
    open_work(tmp_path, job).close()
    left = [f for _, _, files in os.walk(tmp_path) for f in files]
    assert sorted(left) == ["events.jsonl", "job.json"]


def test_other_versions_are_noted(tmp_path: Path, job: Job) -> None:
    open_work(tmp_path, job).close()
    with open_work(tmp_path, job, versions={**VERSIONS, "torch": "2.14.0"}) as work:
        assert work.notes == ["the job was started with torch 2.13.0, now it is 2.14.0"]


def test_nonce(root: str, job: Job) -> None:
    with open_work(root, job) as work:
        rel, token = work.nonce_check()
        verify_nonce(work.store, rel, token, VERSIONS)
        verify_nonce(work.store, rel, token, {"exl2ray": "0.1.0", "driver": "only here"})
        with pytest.raises(StoreError, match=r"torch 2\.13\.0 on .*, 2\.11\.0 here"):
            verify_nonce(work.store, rel, token, {**VERSIONS, "torch": "2.11.0"})
        with pytest.raises(StoreError, match="another token"):
            verify_nonce(work.store, rel, "0" * 32)
        assert work.store.list("nonce") == [rel]
    assert open_store(root).list("nonce") == []


def test_nonce_on_another_file_system_or_a_read_only_mount(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_work(tmp_path / "driver", job) as work:
        rel, token = work.nonce_check()
        elsewhere = LocalStore(str(tmp_path / "worker"))
        with pytest.raises(StoreError, match="not visible on") as caught:
            verify_nonce(elsewhere, rel, token, timeout_seconds=0.1)
        assert "shared path" in caught.value.hint
        elsewhere.put(rel, b"{")
        with pytest.raises(StoreError, match="not what the driver wrote"):
            verify_nonce(elsewhere, rel, token)

        def read_only(*args: Any, **folder: Any) -> int:
            raise OSError(30, "Read-only file system")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", read_only)
            with pytest.raises(StoreError, match="Read-only"):
                verify_nonce(work.store, rel, token)


def test_status_of_a_running_a_stopped_and_a_crashed_job(root: str, job: Job) -> None:
    with open_work(root, job) as work:
        for bits in ("a", "b"):  # the same module under two settings counts once
            work.records.commit(Record("measure", "model.layers.0.mlp", hash_inputs(x=bits), {}))
        work.records.commit(Record("measure", "lm_head", hash_inputs(), {}))
        work.records.commit(Record(quant_kind(4.125), "lm_head", hash_inputs(), {}))
        work.store.put(MEASUREMENT, b"{}")
        work.event("module_measured", key="lm_head", loss=float("nan"), path=Path("x"), seconds=(1, 2.5))
        status = status_of(work)
        assert status.state == "running"
        assert status.records == {"measure": 2, "quant/4.125": 1}
        assert (status.has_calibration, status.has_measurement) == (False, True)
        assert status.job.job == job
        assert f"process {os.getpid()}" in status.holder
        assert status.last_events[-1]["name"] == "module_measured"
        fields = status.last_events[-1]["fields"]
        assert fields == {"key": "lm_head", "loss": "nan", "path": "x", "seconds": [1, 2.5]}
        assert status.problems == ()
        lock = work.store.get("driver.lock")
    assert read_status(root).state == "stopped"
    store = open_store(root)
    stale = json.loads(lock)
    stale["process"]["pid"] = 2**31 - 2
    store.put("driver.lock", json.dumps(stale).encode())
    store.put("job.json", b"{")
    status = read_status(root)
    assert status.state == "crashed"
    assert status.job is None
    assert "job.json" in status.problems[0]
    with pytest.raises(StoreError, match="not a work directory"):
        read_status(f"{root}-none")


def test_torn_lines_of_the_event_log_are_skipped_and_counted(tmp_path: Path, job: Job) -> None:
    with open_work(tmp_path, job) as work:
        with open(tmp_path / "events.jsonl", "ab") as f:
            f.write(b'{"time": "2025\n[1]\n"x"\n\xff\n')
            for fields in (b"null", b"[1]", b'"x"'):
                f.write(b'{"time": "2026", "host": "h", "pid": 1, "name": "n", "fields": ' + fields + b"}\n")
            f.write(b'{"time": 2026, "host": "h", "pid": 1, "name": "n", "fields": {}}\n')
        work.event("after")
        assert [e["name"] for e in read_events(work.store)[0]] == ["opened", "after"]
        assert status_of(work).problems == ("8 unreadable lines in the event log",)


def test_events_stop_when_the_lock_is_lost(tmp_path: Path, job: Job) -> None:
    work = open_work(tmp_path, job)
    work.store.delete("driver.lock")
    with pytest.raises(StoreError, match="removed"):
        work.event("module_measured")
    work.close()


def test_full_disk_at_the_start_leaves_no_lock(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full_for_jobs(fd: int, data: Any) -> int:
        if bytes(data).startswith(b'{\n "exl2ray'):
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full_for_jobs)
    with pytest.raises(StoreError, match="No space left"):
        open_work(tmp_path, job)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    open_work(tmp_path, job).close()


def test_names_that_are_ours() -> None:
    ours = """job.json job-12.json calibration.safetensors measurement.json plan.json events.jsonl report.html
        evaluation.json ladder.png
        output.safetensors output-00001-of-00003.safetensors events/1-h-2-3.jsonl nonce/ab.json logs/a.log logs/b/c.err
        measure/records/a.0.json measure/states/a.0.safetensors quant/4.0/tensors/a.0.safetensors
        quant/4.0/states/a.0.safetensors quant/4.0/records/a.0.json"""
    others = """model.safetensors config.json job.json.bak job-x.json my-output.safetensors output-1.safetensors
        logs/a.py measure/records/a.txt measure/a.json measure/records/sub/a.json quant/records/a.json quant/4.0/a.json
        quant/4.0/other/a.json sub/job.json sub/measure/records/a.json events/a.json driver.lock"""
    assert [n for n in ours.split() if not is_ours(n)] == []
    assert [n for n in others.split() if is_ours(n)] == []
