"""Variants of the RayJob for queues, and the SkyPilot file: each is what its base is but for what it is made for."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from exl2ray.cli import cli

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SCHEMA = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text(encoding="utf-8"))
README = (CLUSTER / "README.md").read_text(encoding="utf-8")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def fixed_size(job: dict[str, Any]) -> dict[str, Any]:
    """The RayJob with all of its workers from the start."""
    job = copy.deepcopy(job)
    cluster = job["spec"]["rayClusterSpec"]
    del cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]
    for group in cluster["workerGroupSpecs"]:
        group["replicas"] = group["minReplicas"] = group["maxReplicas"]
    return job


def test_kueue() -> None:
    claim, base = documents("kuberay-rayjob.yaml")
    own_claim, job = documents("kuberay-kueue.yaml")
    jsonschema.Draft202012Validator(SCHEMA).validate(job)
    assert own_claim == claim
    labels = job["metadata"].pop("labels")
    assert labels.keys() == {"kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"}
    assert job["spec"].pop("suspend") is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # Kueue asks for it
    assert job == fixed_size(base)


def test_pod_group() -> None:
    claim, base = documents("kuberay-rayjob.yaml")
    own_claim, group, job = documents("kuberay-podgroup.yaml")
    jsonschema.Draft202012Validator(SCHEMA).validate(job)
    assert own_claim == claim
    assert (group["apiVersion"], group["kind"]) == ("scheduling.x-k8s.io/v1alpha1", "PodGroup")
    assert set(group["spec"]) == {"minMember", "scheduleTimeoutSeconds"}
    cluster = job["spec"]["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    assert group["spec"]["minMember"] == 1 + sum(g["replicas"] for g in cluster["workerGroupSpecs"])
    for template in templates:
        assert template.pop("metadata") == {"labels": {"scheduling.x-k8s.io/pod-group": group["metadata"]["name"]}}
        assert template["spec"].pop("schedulerName") == "scheduler-plugins-scheduler"
    assert job == fixed_size(base)


SKY: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["name", "resources", "run"],
    "properties": {
        "name": {"type": "string"},
        "envs": {"type": "object", "additionalProperties": {"type": "string"}},
        "resources": {
            "type": "object", "additionalProperties": False, "required": ["image_id", "accelerators"],
            "properties": {
                "image_id": {"type": "string", "pattern": "^docker:\\S+:\\S+$"},
                "accelerators": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
                "use_spot": {"type": "boolean"}, "disk_size": {"type": "integer", "minimum": 50},
                "job_recovery": {
                    "type": "object", "additionalProperties": False,
                    "properties": {"strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]}},
                },
            },
        },
        "file_mounts": {
            "type": "object", "propertyNames": {"pattern": "^/"},
            "additionalProperties": {
                "type": "object", "additionalProperties": False, "required": ["source", "mode"],
                "properties": {"source": {"type": "string"}, "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}},
            },
        },
        "run": {"type": "string"},
    },
}  # fmt: skip


def test_skypilot() -> None:
    (task,) = documents("skypilot.yaml")
    jsonschema.Draft202012Validator(SKY).validate(task)
    line = task["run"].replace("\\\n", " ").replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8")
    for name, value in task["envs"].items():
        line = line.replace(f"${name}", value)
    assert "$" not in line
    words = shlex.split(line)
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    settings = command.make_context(words[1], words[2:], parent=click.Context(cli)).params
    assert settings["in_dir"] == "hf://owner/Model"
    assert settings["out_dir"] == "s3://your-bucket/jobs/Model"
    assert settings["compile_full"].startswith(f"{next(iter(task['file_mounts']))}/")
    assert settings["gpus"] in set(task["resources"]["accelerators"].values())
    assert settings["no_resume"] is False


DAMAGE: list[Callable[[dict[str, Any]], object]] = [
    lambda t: t.update(setups="x"),
    lambda t: t["resources"].update(use_spots=True),
    lambda t: t["resources"].update(accelerators="A100:8"),
    lambda t: t["file_mounts"].update({"out": {"source": "s3://x", "mode": "MOUNT"}}),
    lambda t: t["file_mounts"]["/out"].update(mode="mount"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_check_of_the_sky_file_notices(damage: Callable[[dict[str, Any]], object]) -> None:
    (task,) = documents("skypilot.yaml")
    damage(task)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SKY).validate(task)


@pytest.mark.parametrize("name", ["kuberay-kueue.yaml", "kuberay-podgroup.yaml", "skypilot.yaml"])
def test_readme_replaces_every_placeholder(name: str, tmp_path: Path) -> None:
    command = next(m for m in re.findall(r"^sed .*?> \S+$", README, re.DOTALL | re.MULTILINE) if f"cluster/{name} " in m)
    command = re.sub(r"> \S+$", f"> {shlex.quote(str(tmp_path / 'out.yaml'))}", command)
    subprocess.run(["bash", "-euc", command], check=True, cwd=ROOT, timeout=600)
    found = list(yaml.safe_load_all((tmp_path / "out.yaml").read_text(encoding="utf-8")))
    for word in ("REGISTRY", '"QUEUE"', "PRIORITY", "shared-rwx", "your-bucket"):
        assert word not in json.dumps(found)
    if name != "skypilot.yaml":
        jsonschema.Draft202012Validator(SCHEMA).validate(found[-1])
