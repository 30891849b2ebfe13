"""The files of cluster/, validated offline: Ray's own checks for its YAML, a strict schema for the RayJob, the README's
commands parsed by the command line and its `sed` lines run.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from exl2ray.cli import cli

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text(encoding="utf-8")
PLACEHOLDERS = ("REGISTRY", "REPLACE", "FILE_SYSTEM", "PROJECT", "shared-rwx")
GI = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_command(words: list[str]) -> dict[str, Any]:
    """Settings of ``exl2ray`` command line words; fails as the program would for a flag that does not exist."""
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, words[0]
    return command.make_context(words[0], list(words[1:]), parent=click.Context(cli)).params


# ---- Ray's cluster launcher -----------------------------------------------------------------------------------------


def launcher_config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` would use it, by Ray's own functions."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_launcher_files_are_valid_for_ray(name: str) -> None:
    prepared = validated(launcher_config(name))
    head, gpu = (prepared["available_node_types"][kind] for kind in ("head", "gpu"))
    assert prepared["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert gpu["resources"]["GPU"] >= 1
    assert gpu["min_workers"] == 0 < gpu["max_workers"] <= prepared["max_workers"]
    assert "-v /shared:/shared" in prepared["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert any("--autoscaling-config" in c for c in prepared["head_start_ray_commands"])
    assert any("--address=$RAY_HEAD_IP:6379" in c for c in prepared["worker_start_ray_commands"])
    assert not any("pip install" in c for c in prepared["setup_commands"])  # Ray's defaults would replace the image's Ray
    assert any("mount -t nfs" in c for c in prepared["initialization_commands"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(idle_timeout="5"),
        lambda c: c.pop("provider"),
        lambda c: c.update(head_node_type="nonexistent"),
        lambda c: c["available_node_types"]["gpu"].update(min_workers=9),
        lambda c: c["available_node_types"]["gpu"].update(resources={"GPU": "four"}),
    ],
)
def test_the_validation_notices(damage: Callable[[dict[str, Any]], object]) -> None:
    config = launcher_config("aws.yaml")
    damage(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validated(config)


# ---- KubeRay --------------------------------------------------------------------------------------------------------


def kuberay_documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """(volume claim, RayJob)"""
    claim, job = yaml.safe_load_all((CLUSTER / "kuberay-rayjob.yaml").read_text(encoding="utf-8"))
    return claim, job


def check_rayjob(job: dict[str, Any]) -> None:
    schema = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    validator(schema).validate(job)


def pod_specs(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]["spec"]


def size_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * GI[quantity[-2:]]


def test_rayjob_matches_the_schema() -> None:
    check_rayjob(kuberay_documents()[1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: spec.update(shutDownAfterJobFinishes=True),
        lambda spec: spec.update(ttlSecondsAfterFinished="600"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplica=3),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"].pop("containers"),
    ],
)
def test_the_schema_notices(damage: Callable[[dict[str, Any]], object]) -> None:
    job = kuberay_documents()[1]
    damage(job["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(job)


def test_rayjob_makes_sense() -> None:
    claim, job = kuberay_documents()
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for spec in pod_specs(job):
        (container,) = spec["containers"]
        volumes = {v["name"]: v for v in spec["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits  # guaranteed pods are not evicted for memory
        assert size_bytes(mounts["/dev/shm"]["emptyDir"]["sizeLimit"]) <= size_bytes(limits["memory"]) // 2
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    images = {spec["containers"][0]["image"] for spec in pod_specs(job)}
    assert len(images) == 1
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG RAY_VERSION={cluster['rayVersion']}\n" in text


def test_rayjob_entrypoint() -> None:
    job = kuberay_documents()[1]
    words = shlex.split(job["spec"]["entrypoint"])
    settings = parse_command(words[1:])
    for path in (settings["in_dir"], settings["out_dir"], settings["compile_full"]):
        assert path.startswith("/shared/")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert settings["gpus"] == gpus * group["maxReplicas"]
    assert settings["device"] == "cuda"
    assert settings["no_resume"] is False  # a retry would start over


# ---- image and README -----------------------------------------------------------------------------------------------


def test_image_has_what_it_needs() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    for line in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE):
        assert set(line.split()) <= kept
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"exl2ray\[([\w,]+)\]", text)
    assert extras is not None
    for extra in extras[1].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    assert "--shm-size" in text


def shell_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_readme_commands_are_shell() -> None:
    assert len(shell_blocks()) >= 8
    for block in shell_blocks():
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=600)


def exl2ray_command_lines() -> list[list[str]]:
    """Words after each ``exl2ray`` that the README's blocks and the files' comments call."""
    texts = shell_blocks()
    for name in ("Dockerfile", "slurm.sh"):
        comments = (CLUSTER / name).read_text(encoding="utf-8").splitlines()
        texts.append("\n".join(line.removeprefix("#").strip() for line in comments if line.startswith("#")))
    lines = []
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            if "exl2ray " not in line and "slurm.sh " not in line:
                continue
            words = shlex.split(line.replace("`", "").replace("'", "") if line.count("'") % 2 else line, comments=True)
            for i, word in enumerate(words[:-1]):
                if (word == "exl2ray" or word.endswith("slurm.sh")) and words[i + 1] in cli.commands:
                    lines.append(words[i + 1 :])
                    break
    return lines


def test_documented_commands_parse() -> None:
    lines = exl2ray_command_lines()
    assert len(lines) >= 12
    for words in lines:
        own, _, inner = " ".join(words).partition(" -- ")
        parse_command(own.split() + (["--", *inner.split()] if inner else []))
        if inner:
            settings = parse_command(inner.split())
            assert settings["out_dir"].startswith("/shared/")


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "aws.yaml", "gcp.yaml"])
def test_readme_replaces_every_placeholder(name: str, tmp_path: Path) -> None:
    """Runs the `sed` command that the README gives for the file."""
    command = next(m for m in re.findall(r"^sed .*?> \S+$", README, re.DOTALL | re.MULTILINE) if f"cluster/{name} " in m)
    command = re.sub(r"> \S+$", f"> {shlex.quote(str(tmp_path / 'out.yaml'))}", command)
    subprocess.run(["bash", "-euc", f"AMI=ami-0123\n{command}"], check=True, cwd=ROOT, timeout=600)
    documents = list(yaml.safe_load_all((tmp_path / "out.yaml").read_text(encoding="utf-8")))
    for word in PLACEHOLDERS:
        assert word not in json.dumps(documents), word
    if name == "kuberay-rayjob.yaml":
        check_rayjob(documents[1])
    else:
        validated(documents[0])
