"""What the doctor's examination finds wrong with GPU, driver, kernels, memory, disks and Ray, each with the fix."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from doctor_helpers import CARD, UNUSABLE, USABLE, only

from exl2ray import host
from exl2ray.doctor import examination as doctor
from exl2ray.doctor import gpu_checks as doctor_gpu
from exl2ray.doctor import probes, ray_start
from exl2ray.doctor.diagnosis import Finding

pytestmark = pytest.mark.usefixtures("plain_environment")

# ---- no GPU ----------------------------------------------------------------------------------------------------------


def machine(root: Path, cards: int = 0, driver: bool = False, devices: tuple[str, ...] = ()) -> Path:
    """The files by which a machine shows its GPUs."""
    for i in range(cards + 1):
        device = root / "sys/bus/pci/devices" / f"0000:0{i}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x10de\n" if i < cards else "0x8086\n")
        (device / "class").write_text("0x030200\n")
    if driver:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text("NVRM version: ...")
    (root / "dev").mkdir()
    for name in devices:
        (root / "dev" / name).write_text("")
    return root


@pytest.mark.parametrize(
    ("facts", "level", "says", "fix"),
    [
        ({}, "note", "none", "on the CPU, slowly"),
        ({"cards": 2}, "problem", "2 NVIDIA cards without a driver", "install NVIDIA's driver"),
        ({"cards": 2, "driver": True}, "problem", "this container was given no GPU", "--gpus all"),
        ({"driver": True}, "problem", "this container was given no GPU", "nvidia.com/gpu: 1"),
        ({"cards": 1, "driver": True, "devices": ("nvidia0", "nvidiactl")}, "problem", "no nvidia-smi", "PATH"),
        ({"devices": ("dxg",)}, "problem", "no nvidia-smi", "/usr/lib/wsl/lib"),
        ({"devices": ("nvidiactl",)}, "note", "none", "CPU"),
    ],
)
def test_why_there_is_no_gpu(facts: dict[str, Any], level: str, says: str, fix: str, tmp_path: Path) -> None:
    found = only(doctor_gpu.no_card(machine(tmp_path, **facts)))
    assert (found.level, says in found.value, fix in found.fix) == (level, True, True), found


def test_facts_of_this_machine_can_be_read() -> None:
    assert host.nvidia_cards() >= 0
    assert host.usable_memory_bytes() > 1 << 28
    shared = host.shared_memory_bytes()
    assert shared is None or 0 <= shared[0] <= shared[1]


# ---- wrong driver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "cuda", "says", "fix"),
    [
        ("470.82.01", "13.0", "470.82 is too old for a torch built for CUDA 13.0, which needs 580.65", "CUDA 11"),
        ("550.90.07", "13.0", "550.90 is too old", "CUDA 12"),
        ("418.67", "12.8", "418.67 is too old for a torch built for CUDA 12.8, which needs 525.60", "update"),
        ("580.95.05", "13.0", "too old", "the driver may be too old"),  # new enough: torch's own reason counts
    ],
)
def test_a_driver_older_than_torchs_cuda(driver: str, cuda: str, says: str, fix: str) -> None:
    found = only(doctor_gpu.gpus([CARD.format(driver=driver)], {**UNUSABLE, "cuda": cuda}))
    assert found.level == "problem"
    assert says in found.value
    assert fix in found.fix


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("nvidia-smi: Failed to initialize NVML: Driver/library version mismatch", "reboot"),
        ("nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "modprobe nvidia"),
        ("nvidia-smi: No devices were found", "lspci"),
        ("nvidia-smi: exit status 9", "repair or update"),
    ],
)
def test_complaints_of_nvidia_smi(error: str, fix: str) -> None:
    assert fix in doctor_gpu.driver_fix(error)


@pytest.mark.parametrize(
    ("change", "says", "fix"),
    [
        ({"cuda": None, "hip": "6.4"}, "ROCm build", "CUDA build"),
        ({"cuda": None}, "build without CUDA", "index with CUDA builds"),
        ({"error": "killed by signal 11"}, "does not work", "reinstall torch"),
    ],
)
def test_a_torch_that_cannot_use_the_card(change: dict[str, Any], says: str, fix: str) -> None:
    found = only(doctor_gpu.gpus([CARD.format(driver="580.95.05")], {**UNUSABLE, **change}))
    assert (found.level, says in found.value, fix in found.fix) == ("problem", True, True), found


def test_hidden_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hides the GPUs" in only(doctor_gpu.gpus([CARD.format(driver="580.95.05")], UNUSABLE)).value


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "not built for that kind of GPU"),
        ("CUDA-capable device(s) is/are busy or unavailable", "nvidia-smi -c DEFAULT"),
        ("CUDA out of memory. Tried to allocate 2 MiB", "another process fills it"),
        ("CUDA error: uncorrectable ECC error encountered", "dmesg"),
    ],
)
def test_a_gpu_that_does_not_compute(error: str, fix: str) -> None:
    found = only(doctor_gpu.gpus([CARD.format(driver="580.95.05")], {**USABLE, "broken": {"0": error}}))
    assert (found.topic, found.level) == ("GPU 0", "problem")
    assert error in found.value
    assert fix in found.fix


# ---- numba-cuda ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says", "fix"),
    [
        ("ModuleNotFoundError: No module named 'numba_cuda'", "numba-cuda is missing", 'pip install "exl2ray[cuda]"'),
        ("AttributeError: module 'numpy' has no attribute 'row_stack'", "row_stack", 'pip install "numpy<2.5"'),
        ("ImportError: cannot import name 'row_stack' from 'numpy'", "row_stack", 'pip install "numpy<2.5"'),
        ("numba_cuda.cudadrv.error.NvvmSupportError: libNVVM cannot be found.", "libraries are missing", "numba-cuda[cu13]"),
        ("CudaSupportError: [222] PTX was compiled with an unsupported toolchain", "do not fit the driver", "driver"),
    ],
)
def test_why_kernels_do_not_run(error: str, says: str, fix: str) -> None:
    found = only(doctor_gpu.kernels(True, USABLE, {"error": error}))
    assert (found.level, says in found.value, fix in found.fix) == ("problem", True, True), found


def test_without_a_card_kernels_do_not_matter() -> None:
    assert doctor_gpu.kernels(False, UNUSABLE, {"error": "no driver"}) == []


# ---- packages and environment ----------------------------------------------------------------------------------------


def test_a_threading_layer_that_is_not_installed(quick_probes, monkeypatch):
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "tbb")
    quick_probes[probes.LAYER] = {}
    assert doctor.environment() == []
    quick_probes[probes.LAYER] = {"error": "No threading layer could be loaded."}
    assert only(doctor.environment()).value == "NUMBA_THREADING_LAYER=tbb: No threading layer could be loaded."


def test_doctor_finds_wrong_and_missing_packages(monkeypatch):
    installed = {"numpy": "2.5.1", "torch": "2.13.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise doctor.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "_requirements", lambda: {"numpy": "<2.5,>=1.26", "torch": "<3,>=2.7"})
    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {f.topic: f for f in doctor.versions()}
    assert found["torch"].level == "ok"
    assert found["numpy"].level == "problem"
    assert found["numpy"].fix == 'pip install "numpy<2.5,>=1.26"'
    assert found["ray"].value == "missing"
    assert "numba-cuda" not in found


# ---- shared memory and disks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "gpus", "level"),
    [(None, 1, "warning"), (None, 4, "problem"), (64 << 20, 1, "warning"), (64 << 20, 2, "warning"), (64 << 20, 4, "problem"),
     (1 << 30, 8, "ok")],
)  # fmt: skip
def test_shared_memory(free: int | None, gpus: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "shared_memory_bytes", lambda: None if free is None else (free, free))
    (found,) = doctor.shared_memory(gpus)
    assert found.level == level
    assert ("--shm-size" in found.fix) == (level != "ok")


def test_doctor_of_addresses(tmp_path):
    (bucket, _), (local, _) = doctor.disks("s3://bucket/work"), doctor.disks(f"file://{tmp_path}/work")
    assert "not examined" in bucket.value
    assert str(tmp_path) in local.value


def test_doctor_full_disk(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(total=300 << 20, free=200 << 20))
    work, _ = doctor.disks(str(tmp_path))
    assert work.level == "warning"


def test_doctor_where_no_temporary_folder_can_be_written(monkeypatch, tmp_path):
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    monkeypatch.setenv("TMPDIR", "/full")
    work, temporary = doctor.disks(str(tmp_path))
    assert work.level != "problem"
    assert (temporary.level, temporary.fix) == ("warning", "set TMPDIR to another directory")
    (found,) = ray_start.ray_start({"error": "No usable temporary directory found in ['/tmp']"}, 1)
    assert "Ray must write into /full" in found.fix


# ---- Ray -------------------------------------------------------------------------------------------------------------

# What a private Ray 2.60 really said when it could not start.
LONG = "ClusterError: OSError: validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /tmp/xxx"
READ_ONLY = "ClusterError: cannot start or reach Ray at 'local': OSError: [Errno 30] Read-only file system: '/tmp/ray'"
SLOW = "Exception: The current node timed out during startup. This could happen because some of the raylet failed to startup"
DEAF = "ClusterError: cannot start or reach Ray at 'local': SystemExit: 15"


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (LONG, "export RAY_TMPDIR=/tmp"), (READ_ONLY, "export RAY_TMPDIR to a directory of your own"),
        (SLOW, "ulimit -n"), (DEAF, "getent hosts"), ("no answer within 90 s", "loopback"),
        ("OSError: [Errno 28] No space left on device", "make room"), ("ModuleNotFoundError: No module named 'ray'", "pip"),
        ("RuntimeError: something new", "logs"),
    ],
)  # fmt: skip
def test_why_ray_does_not_start(error: str, fix: str) -> None:
    several = only(ray_start.ray_start({"error": error}, gpus=2))
    assert (several.level, error in several.value, fix in several.fix) == ("problem", True, True), several
    single = only(ray_start.ray_start({"error": error}, gpus=1))
    assert single.level == "warning", "one device needs no Ray"
    assert "one device needs no Ray" in single.fix


def test_a_ray_that_starts() -> None:
    (found,) = ray_start.ray_start({"version": "2.60.0", "seconds": 7.5}, 1)
    assert (found.level, found.value) == ("ok", "2.60.0, started and ran a task in 7.5 s")


def test_a_cluster_that_is_named_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(doctor, "run_probe", lambda program: asked.append(program) or {"error": "not run"})
    monkeypatch.setattr(doctor, "ray_cluster", lambda address: [Finding("Ray cluster", f"{address} answers")])
    found = doctor.examine(".")
    assert found[-1].value == "10.0.0.1:6379 answers"
    assert probes.RAY not in asked


# ---- the small programs that try things out --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("raise RuntimeError('no device')", "RuntimeError: no device"),
        ("print('hello')", "unexpected answer"),
        ("print([1])", "unexpected answer"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_probes_never_raise(program, says):
    assert says in probes.run_probe(program)["error"]


def test_a_probe_that_hangs_is_ended():
    assert "no answer within 1 s" in probes.run_probe("import time; time.sleep(3600)", seconds=1)["error"]


@pytest.mark.parametrize(
    ("script", "cards", "error"),
    [
        ("echo 'NVIDIA H100, 10 MiB, 81559 MiB, 550.54'", ["NVIDIA H100, 10 MiB used of 81559 MiB, driver 550.54"], ""),
        ("echo 'Driver/library version mismatch'; exit 18", [], "nvidia-smi: Driver/library version mismatch"),
        ("exit 9", [], "nvidia-smi: exit status 9"),
    ],
)
def test_what_the_driver_says(monkeypatch, tmp_path, script, cards, error):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probes.nvidia_smi() == (cards, error)


def test_the_torch_probe_describes_torch():
    found = probes.run_probe(probes.TORCH)
    assert set(found) == {"version", "cuda", "hip", "gpus", "broken", "reason"}, found


def test_the_kernel_probe_runs_a_kernel(monkeypatch):
    """In Numba's simulator; a GPU needs no other program."""
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    found = probes.run_probe(probes.KERNEL)
    assert "package" in found, found


def test_the_layer_probe(monkeypatch):
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "workqueue")
    assert "error" not in probes.run_probe(probes.LAYER)
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "none")
    assert "error" in probes.run_probe(probes.LAYER)


@pytest.mark.slow
def test_ray_really_starts_and_really_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    failed = probes.run_probe(probes.RAY)
    assert "AF_UNIX" in failed["error"]
    monkeypatch.delenv("RAY_TMPDIR")
    found = probes.run_probe(probes.RAY)
    assert found.get("version"), found


def test_messages_of_our_own_errors_are_found_above_their_hints() -> None:
    program = "from exl2ray.errors import ClusterError\nraise ClusterError('no Ray', 'ask the doctor')"
    assert probes.run_probe(program)["error"] == "exl2ray.errors.ClusterError: no Ray"
    assert os.environ.get("RAY_ADDRESS") is None
