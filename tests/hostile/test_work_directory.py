"""Work directories that somebody else has prepared: nothing outside of them is read, written or deleted through them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from special_files import make_pipe, make_socket
from workdir_cases import PLACES, Conversion, Victim, contents, snapshot

from exl2ray.beneath import IrregularFileError
from exl2ray.convert import convert
from exl2ray.errors import StoreError
from exl2ray.events import Silent
from exl2ray.report.facts import read_facts
from exl2ray.store.job_file import decode_job, encode_job
from exl2ray.store.local import LocalStore
from exl2ray.store.status import read_status
from exl2ray.store.trust import refuse_others

FOLDER_PLACES = ["logs", "nonce", "measure", "measure/records", "quant", "quant/4.0", "quant/4.0/tensors",
                 "quant/4.0/records"]  # fmt: skip
FILE_PLACES = ["job.json", "events.jsonl", "measurement.json", "calibration.safetensors", "driver.lock", "report.html"]


def plant(place: Path, to: Path) -> None:
    """A link in the place of whatever is there."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(to)


# ---- links ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", FOLDER_PLACES)
def test_a_folder_that_is_a_link(place: str, made: Conversion, work: Path, target: Path, victim: Victim) -> None:
    plant(work / place, victim.root)
    before = contents(target)
    with pytest.raises(StoreError, match=f"{place}.*link"):
        made.convert(work, target)
    victim.unharmed()
    assert not (work / "driver.lock").exists()
    made.convert(work, target, no_resume=True)
    victim.unharmed()
    assert not (work / place).is_symlink()
    assert contents(target) == before


@pytest.mark.parametrize("place", FILE_PLACES)
def test_a_file_that_is_a_link(place: str, made: Conversion, work: Path, target: Path, victim: Victim) -> None:
    """The last three are replaced as a whole by whoever writes them; the others are refused when they are read."""
    if (work / place).exists():
        victim.file.write_bytes((work / place).read_bytes())  # content that would do
        victim.before = snapshot(victim.root)
    plant(work / place, victim.file)
    with pytest.raises(StoreError, match="link"):
        made.convert(work, target)
    victim.unharmed()


def test_links_of_links_and_links_inside(made: Conversion, work: Path, target: Path, victim: Victim) -> None:
    """Also where a link ends inside of the work directory: nobody of ours makes one."""
    (work / "hop").symlink_to(victim.root)
    plant(work / "logs", Path("hop"))
    with pytest.raises(StoreError, match="logs"):
        made.convert(work, target)
    plant(work / "logs", Path("measure"))
    with pytest.raises(StoreError, match="logs"):
        made.convert(work, target)
    victim.unharmed()


def test_other_links_are_left_alone(made: Conversion, work: Path, target: Path, victim: Victim) -> None:
    (work / "notes").symlink_to(victim.root)
    (work / "measure" / "see-also").symlink_to(victim.root)
    made.convert(work, target)
    made.convert(work, target, no_resume=True)
    assert (work / "notes").is_symlink()
    assert (work / "measure" / "see-also").is_symlink()
    victim.unharmed()


@pytest.mark.parametrize("place", ["measure/records", "measure/states", "quant/4.0/tensors"])
def test_temporary_files_behind_links_are_not_swept(place: str, work: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    left = outside / ".tmp-exl2ray-1-0123456789ab"
    left.write_text("of another job")
    plant(work / place, outside)
    store = LocalStore(str(work))
    assert store.sweep(["measure", "quant"]) == []
    store.prune(["measure", "quant"])
    assert left.exists()


def test_every_way_into_the_store_refuses_links(tmp_path: Path, victim: Victim) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "folder").symlink_to(victim.root)
    (root / "file").symlink_to(victim.file)
    store = LocalStore(str(root))
    ways: list[Callable[[str], object]] = [
        store.get, store.reader, store.size, store.mtime, store.sha256, store.read_lines, store.descriptor,
        lambda name: store.append_line(name, "x"),
    ]  # fmt: skip
    for way in ways:
        for name in ("file", "folder/data.txt"):
            with pytest.raises(IrregularFileError, match="symbolic link"):
                way(name)
    with pytest.raises(IrregularFileError):
        store.put("folder/new", b"x")
    with pytest.raises(IrregularFileError):
        store.descriptor("folder/new", os.O_RDWR | os.O_CREAT)
    with pytest.raises(IrregularFileError):
        store.delete("folder/data.txt")
    with pytest.raises(IrregularFileError):
        store.list("folder")
    assert store.list() == []
    assert not store.exists("file")
    store.put("file", b"ours")  # replaces the link itself
    assert not (root / "file").is_symlink()
    victim.unharmed()


def test_a_folder_that_becomes_a_link_while_files_are_written(tmp_path: Path, victim: Victim) -> None:
    """Swapped as fast as possible: what is written lands in the folder or nowhere."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        pytest.skip("this system cannot exchange two names")
    root = tmp_path / "store"
    (root / "place").mkdir(parents=True)
    (root / "link").symlink_to(victim.root)
    names = [os.fsencode(root / n) for n in ("place", "link")]
    store, stop, swaps = LocalStore(str(root)), threading.Event(), 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            swaps += exchange(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE

    thread = threading.Thread(target=swap)
    thread.start()
    done = []
    try:
        for i in range(400):
            for way in (lambda n: store.put(f"place/{n}", b"x"), lambda n: store.append_line(f"place/log{n}", "line"),
                        lambda n: store.delete("place/data.txt"), lambda n: store.list("place"),
                        lambda n: store.sweep(["place"])):  # fmt: skip
                with contextlib.suppress(StoreError):
                    way(i)
                    done.append(i)
    finally:
        stop.set()
        thread.join()
    victim.unharmed()
    if not swaps:
        pytest.skip("this file system cannot exchange two names")
    assert done


# ---- pipes, devices, hard links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_pipe, make_socket])
@pytest.mark.parametrize("place", ["job.json", "events.jsonl", "driver.lock", "measurement.json"])
def test_nobody_waits_for_a_pipe(
    place: str, make: Callable[[Path], None], made: Conversion, work: Path, target: Path
) -> None:
    (work / place).unlink(missing_ok=True)
    make(work / place)
    exl2ray(*made.arguments(work, target), seconds=20).ends_with(7, "pipe" if make is make_pipe else "socket")


@pytest.mark.parametrize(
    ("command", "place"),
    [("status", "events.jsonl"), ("status", "measurement.json"), ("status", "driver.lock"), ("report", "events.jsonl")],
)
def test_looking_at_a_directory_with_pipes_and_links(command: str, place: str, work: Path, victim: Victim) -> None:
    for make in (make_pipe, lambda p: p.symlink_to(victim.file)):
        (work / place).unlink(missing_ok=True)
        make(work / place)
        run = exl2ray(command, work)
        assert run.status in (0, 7), str(run)
        assert not run.stopped
        assert "years of work" not in run.text
    victim.unharmed()


def test_a_report_is_not_written_through_a_link(work: Path, victim: Victim) -> None:
    plant(work / "report.html", victim.file)
    exl2ray("report", work).ends_with(0, "report.html")
    victim.unharmed()
    assert not (work / "report.html").is_symlink()


def test_a_log_that_has_another_name_elsewhere(made: Conversion, work: Path, target: Path, victim: Victim) -> None:
    (work / "events.jsonl").unlink()
    os.link(victim.file, work / "events.jsonl")
    with pytest.raises(StoreError, match="hard link"):
        made.convert(work, target)
    victim.unharmed()


def test_results_that_have_other_names_elsewhere_are_replaced(made: Conversion, work: Path, target: Path) -> None:
    """`cp -al` of a work directory is no reason to refuse it, and its other copy stays as it is."""
    copy = work.with_name("copy")
    shutil.copytree(work, copy, copy_function=os.link)
    (work / "events.jsonl").unlink()
    before = snapshot(copy)
    made.convert(work, target, no_resume=True)
    assert snapshot(copy) == before


# ---- the work directory itself ----------------------------------------------------------------------------------------


def test_a_link_of_ones_own_to_a_large_disk(made: Conversion, work: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(work)
    summary, _ = made.convert(tmp_path / "link", target)
    assert len(summary.outputs) == 1
    assert read_status(str(tmp_path / "link")).state == "finished"


def test_a_link_to_a_disk_that_is_not_mounted(made: Conversion, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "mnt" / "disk")
    exl2ray(*made.arguments(tmp_path / "link", tmp_path / "new")).ends_with(7, "does not exist", "mounted")
    assert not (tmp_path / "mnt").exists()


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_link_where_everybody_may_write(mode: int, made: Conversion, work: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "link").symlink_to(work)
    (tmp_path / "scratch").chmod(mode)
    before = snapshot(work)
    exl2ray(*made.arguments(tmp_path / "scratch" / "link", target)).ends_with(7, "everybody may write", str(work))
    assert snapshot(work) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_link_that_somebody_else_made(made: Conversion, work: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(work)
    os.lchown(tmp_path / "link", 12345, 12345)
    exl2ray(*made.arguments(tmp_path / "link", target)).ends_with(7, "a link that user 12345 made", str(work))


def test_the_report_reads_no_tensors_through_a_link(work: Path, victim: Victim) -> None:
    tensors = work / "quant" / "4.0" / "tensors"
    one = sorted(tensors.iterdir())[0]
    plant(one, victim.file)
    assert any("symbolic link" in p or "is missing" in p or "link" in p for p in read_facts(str(work), []).problems)


def test_an_error_that_nobody_foresaw_is_not_logged_through_a_link(work: Path, victim: Victim) -> None:
    from exl2ray.terminal.program import Invocation, _explain

    plant(work / "logs", victim.root)
    lines, hint, code = _explain(RuntimeError("unforeseen"), Invocation(command="convert", out_dir=str(work)))
    assert (code, "unforeseen" in lines[0], "--debug" in hint) == (1, True, True)
    victim.unharmed()
    (work / "logs").unlink()
    _, hint, _ = _explain(RuntimeError("unforeseen"), Invocation(command="convert", out_dir=str(work)))
    assert str(work / "logs") in hint




# ---- jobs of somebody else ------------------------------------------------------------------------------------------------

TARGET = "home"


def rewrite_job(work: Path, victim: Victim, model: Path) -> None:
    """The job of a directory that came from elsewhere: it reads another model, and writes where the attacker wants it."""
    stored = decode_job((work / "job.json").read_bytes(), "job.json")
    stored.job["identity"]["in_dir"] = str(model)
    stored.job["output"]["compile_full"] = str(victim.root / TARGET)
    (work / "job.json").write_bytes(encode_job(stored))


def give_away(path: Path) -> None:
    os.chown(path, 12345, 12345)


def open_to_everybody(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def open_to_a_group(path: Path) -> None:
    os.chown(path, -1, 12345)
    path.chmod(path.stat().st_mode | 0o020)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@needs_root
@pytest.mark.parametrize(
    ("place", "change", "words"),
    [("", give_away, "belongs to user 12345"), ("job.json", give_away, "belongs to user 12345"),
     ("", open_to_everybody, "can be written by everybody"), ("quant", open_to_everybody, "can be written by everybody"),
     ("job.json", open_to_a_group, "can be written by the group 12345"),
     ("measure", open_to_a_group, "can be written by the group 12345")],
)  # fmt: skip
def test_a_job_that_others_can_have_written(
    place: str, change: Callable[[Path], None], words: str, made: Conversion, work: Path, victim: Victim
) -> None:
    rewrite_job(work, victim, made.model)
    change(work / place)
    before = snapshot(work)
    patch = ["patch", "-o", str(work), "--set", "*.v_proj=8"]
    for command in (["convert", "-o", str(work), *PLACES], ["convert", "-o", str(work), "--dry-run"], patch):
        exl2ray(*command).ends_with(7, words, "--trust-work-dir")
    victim.unharmed()
    assert snapshot(work) == before
    run = exl2ray("convert", "-o", work, "--trust-work-dir", *PLACES)
    run.ends_with(0, f"source {made.model} -> target {victim.root / TARGET}")


@needs_root
def test_with_i_a_job_of_others_is_only_warned_of(made: Conversion, work: Path, target: Path) -> None:
    give_away(work / "job.json")
    exl2ray(*made.arguments(work, target)).ends_with(0, "belongs to user 12345: what is found finished there is used")


def test_ones_own_job_is_resumed(made: Conversion, work: Path, victim: Victim) -> None:
    """Also where a umask of 002 lets the group write, which is this user's alone; and it says first where it writes."""
    rewrite_job(work, victim, made.model)
    for path in (work, work / "job.json", work / "quant"):
        os.chown(path, -1, os.getegid())
        path.chmod(path.stat().st_mode | 0o020)
    run = exl2ray("convert", "-o", work, *PLACES)
    if "can be written by the group" in run.text:
        pytest.skip("the group of this user has other members")
    run.ends_with(0)
    lines = run.out.splitlines()
    first = min(i for i, line in enumerate(lines) if line.startswith("source "))
    assert first < min(i for i, line in enumerate(lines) if line.startswith("["))


def test_source_and_target_are_said_before_anything_is_written(made: Conversion, tmp_path: Path) -> None:
    class Looking(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "start":
                assert not (tmp_path / "work").exists()
                assert not (tmp_path / "out").exists()

    reporter = Looking()
    convert(made.recipe(tmp_path / "work", tmp_path / "out"), reporter)
    (start,) = [fields for name, fields in reporter.events if name == "start"]
    assert (start["source"], start["targets"]) == (str(made.model), [str(tmp_path / "out")])
    exl2ray(*made.arguments(tmp_path / "new", tmp_path / "b"), "--dry-run").ends_with(0, f"target {tmp_path / 'b'}")


@needs_root
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "refused"),
    [(0, 0, 0o755, False), (0, 0, 0o775, False), (4242, 4242, 0o755, False), (4242, 4242, 0o775, False),
     (4242, 100, 0o775, True), (4242, 4242, 0o777, True), (4243, 4242, 0o755, True), (0, 0, 0o777, True)],
)  # fmt: skip
def test_whose_directories_a_plain_user_trusts(uid: int, gid: int, mode: int, refused: bool, work: Path) -> None:
    """A user without a name, whose group is as nameless, as in a container; 100 is the group of all users."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        os.chmod(folder, 0o755)
        place = Path(shutil.copytree(work, Path(folder, "work")))
        for path in (place, place / "job.json", place / "measure", place / "quant"):
            os.chown(path, uid, gid)
            path.chmod(mode & (0o666 if path.is_file() else 0o777))
        os.setegid(4242)
        os.seteuid(4242)
        try:
            with pytest.raises(StoreError) if refused else contextlib.nullcontext():
                refuse_others(str(place))
        finally:
            os.seteuid(0)
            os.setegid(0)


@pytest.mark.parametrize(("error", "words"), [
    (RuntimeError("can't start new thread"), ("threads", "ulimit -u")),
    (MemoryError(), ("memory", "ulimit -v")),
    (RuntimeError("std::bad_alloc"), ("memory", "ulimit -v")),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), ("memory", "ulimit -v")),
    (OSError(12, "Cannot allocate memory"), ("memory", "ulimit -v")),
    (OSError(24, "Too many open files"), ("open files", "ulimit -n")),
])  # fmt: skip
def test_limits_of_the_system_are_named(error: Exception, words: tuple[str, str]) -> None:
    from exl2ray.terminal.program import Invocation, _explain

    lines, hint, code = _explain(error, Invocation(command="convert"))
    assert (words[0] in lines[0], words[1] in hint, "foresaw" in hint, code) == (True, True, False, 1)
