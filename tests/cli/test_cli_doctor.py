"""``exl2ray doctor`` as a command: what it prints, as text and as JSON, and its exit status."""

from __future__ import annotations

import json
import os

import pytest
from doctor_helpers import CARD, USABLE

from exl2ray.doctor import examination as doctor
from exl2ray.doctor import probes

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_doctor_runs(run, tmp_path):
    """For real, whatever this machine is like."""
    result = run("doctor", "-o", str(tmp_path / "not" / "there"), "--json")
    assert result.exit_code in (0, 1)
    findings = json.loads(result.stdout)["findings"]
    topics = [f["topic"] for f in findings]
    for topic in ("exl2ray", "Python", "torch", "numpy", "ray", "numba", "memory", "work directory"):
        assert topic in topics
    assert result.exit_code == any(f["level"] == "problem" for f in findings)
    assert not (tmp_path / "not").exists()


def test_doctor_without_a_gpu(run, quick_probes, tmp_path):
    result = run("doctor", "-o", str(tmp_path))
    assert result.exit_code == 0
    assert "conversion runs on the CPU" in result.stdout
    assert result.stdout.rstrip().endswith("ready to convert")


def test_doctor_with_a_gpu_that_torch_cannot_use(run, quick_probes, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: ([CARD.format(driver="550.1")], ""))
    result = run("doctor")
    assert result.exit_code == 1
    assert "NVIDIA RTX A6000" in result.stdout
    assert "build without CUDA" in result.stdout


def test_doctor_with_kernels(run, quick_probes, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: ([CARD.format(driver="590.1")], ""))
    quick_probes[probes.TORCH] = USABLE
    assert run("doctor").exit_code == 1
    quick_probes[probes.KERNEL] = {"package": "numba-cuda 0.30.0", "built_in": False}
    assert run("doctor").exit_code == 0
    quick_probes[probes.KERNEL] = {"package": "CUDA target of numba 0.61.0", "built_in": True}
    result = run("doctor")
    assert result.exit_code == 0
    assert "deprecated" in result.stdout


@pytest.mark.parametrize(
    ("name", "value", "level", "says"),
    [
        ("NUMBA_NUM_THREADS", "abc", "problem", "environment variable NUMBA_NUM_THREADS is 'abc', not a number of threads"),
        ("OMP_NUM_THREADS", "-1", "problem", "environment variable OMP_NUM_THREADS is '-1', not a number of threads"),
        ("NUMBA_THREADING_LAYER", "ttb", "problem", "environment variable NUMBA_THREADING_LAYER is 'ttb', not one of"),
        ("NUMBA_DISABLE_JIT", "1", "warning", "NUMBA_DISABLE_JIT=1: kernels are not compiled"),
        ("CUDA_LAUNCH_BLOCKING", "1", "warning", "CUDA_LAUNCH_BLOCKING=1: every kernel is waited for"),
    ],
)
def test_doctor_names_variables_that_stop_or_slow(run, quick_probes, monkeypatch, name, value, level, says):
    monkeypatch.setenv(name, value)
    result = run("doctor")
    assert result.exit_code == (level == "problem")
    assert f"{level}: environment: {says}" in result.stdout
    assert f"  unset {name}" in result.stdout


def test_doctor_survives_its_own_checks(run, quick_probes, monkeypatch):
    def broken() -> list[doctor.Finding]:
        raise ValueError("no such sysctl")

    monkeypatch.setattr(doctor, "memory", broken)
    result = run("doctor")
    assert "ValueError: no such sysctl" in result.stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("/dev/null", "/dev/null is a device, not a directory"),
        ("file", "file is a file, not a directory"),
        ("file/below", "below: Not a directory"),
        ("pipe", "pipe is a FIFO, not a directory"),
        ("gone", "a link to nowhere, which does not exist"),
        ("http://host/work", "cannot store under http://"),
    ],
)
def test_doctor_of_what_is_no_directory(run, quick_probes, monkeypatch, tmp_path, given, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    result = run("doctor", "-o", given, "--json")
    assert result.exit_code == 1
    (found,) = [f for f in json.loads(result.stdout)["findings"] if f["topic"] == "work directory"]
    assert found["level"] == "problem"
    assert says in found["value"]
    assert found["fix"]
    assert (tmp_path / "file").read_text() == "mine"
