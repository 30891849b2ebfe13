"""The files of cluster/serve, validated offline: fields of manifests, versions that belong together, shell that parses."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "cluster" / "serve"
RAYJOB = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text(encoding="utf-8"))
DEPLOYMENT = json.loads(Path(__file__).with_name("deployment.schema.json").read_text(encoding="utf-8"))
IMAGE = "REGISTRY/exl2ray-vllm:0.1.0"


def text_of(name: str) -> str:
    return (SERVE / name).read_text(encoding="utf-8")


def ray_service_schema() -> dict[str, Any]:
    """A RayService is a RayCluster, as in a RayJob, and the configuration of Ray Serve."""
    cluster = RAYJOB["properties"]["spec"]["properties"]["rayClusterSpec"]
    spec = {
        "type": "object", "additionalProperties": False, "required": ["serveConfigV2", "rayClusterConfig"],
        "properties": {"serveConfigV2": {"type": "string"}, "rayClusterConfig": cluster},
    }  # fmt: skip
    properties = {**RAYJOB["properties"], "kind": {"const": "RayService"}, "spec": spec}
    return {**RAYJOB, "properties": properties}


def llm_config_fields(class_name: str) -> set[str]:
    """Fields of a class of ray.serve.llm, from its source: importing it needs vLLM."""
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "llm/_internal/serve/core/configs/llm_config.py"
    if not path.is_file():
        pytest.skip("this Ray has the classes of ray.serve.llm elsewhere")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (cls,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == class_name]
    return {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def check_service(service: dict[str, Any]) -> dict[str, Any]:
    """Raises ValidationError or AssertionError; returns the only LLM configuration."""
    schema = ray_service_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(service)
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert set(config) == {"applications"}
    (app,) = config["applications"]
    assert set(app) == {"name", "route_prefix", "import_path", "args"}
    assert app["import_path"] == "ray.serve.llm:build_openai_app"
    (llm,) = app["args"]["llm_configs"]
    assert set(llm) <= llm_config_fields("LLMConfig")
    assert set(llm["model_loading_config"]) <= llm_config_fields("ModelLoadingConfig")
    return llm


def test_ray_service() -> None:
    service = yaml.safe_load(text_of("rayservice.yaml"))
    llm = check_service(service)
    cluster = service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    replicas = llm["deployment_config"]["autoscaling_config"]["max_replicas"]
    assert llm["engine_kwargs"]["tensor_parallel_size"] == gpus
    assert replicas <= group["maxReplicas"]
    assert cluster["rayVersion"] == re.search(r"^ARG RAY_VERSION=(\S+)$", text_of("vllm.Dockerfile"), re.MULTILINE)[1]  # type: ignore[index]
    assert f"ARG RAY_VERSION={cluster['rayVersion']}\n" in (ROOT / "cluster/Dockerfile").read_text()


DAMAGE: list[Callable[[dict[str, Any]], object]] = [
    lambda s: s.update(kind="RayJob"),
    lambda s: s["spec"].update(serveConfig="x"),
    lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(maxReplica=2),
    lambda s: s["spec"].update(serveConfigV2=s["spec"]["serveConfigV2"].replace("engine_kwargs", "engine_arguments")),
    lambda s: s["spec"].update(serveConfigV2=s["spec"]["serveConfigV2"].replace("model_source", "source")),
    lambda s: s["spec"].update(serveConfigV2=s["spec"]["serveConfigV2"].replace("route_prefix", "prefix")),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checks_notice(damage: Callable[[dict[str, Any]], object]) -> None:
    service = yaml.safe_load(text_of("rayservice.yaml"))
    damage(service)
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_service(service)


def test_deployment() -> None:
    deployment, service = yaml.safe_load_all(text_of("vllm.yaml"))
    validator = jsonschema.Draft202012Validator
    validator.check_schema(DEPLOYMENT)
    validator(DEPLOYMENT).validate(deployment)
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    arguments = container["args"]
    assert arguments[arguments.index("--tensor-parallel-size") + 1] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in {p["name"] for p in container["ports"]}
    claim, _ = yaml.safe_load_all((ROOT / "cluster/kuberay-rayjob.yaml").read_text())
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for change in ({"arg": []}, {"image": 3}, {"livenessProbe": {"httpGet": {"path": "health", "port": "http"}}}):
        broken = copy.deepcopy(deployment)
        broken["spec"]["template"]["spec"]["containers"][0].update(change)
        with pytest.raises(jsonschema.ValidationError):
            validator(DEPLOYMENT).validate(broken)


def test_versions_belong_together() -> None:
    vllm = re.search(r"^ARG VLLM_VERSION=(\S+)$", text_of("vllm.Dockerfile"), re.MULTILINE)
    assert vllm is not None
    assert f"vllm=={vllm[1]}'" in text_of("README.md")
    bound = re.search(r'^vllm = \["(vllm[^"]*)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert bound is None or vllm[1] in Requirement(bound[1]).specifier
    tabby = text_of("tabbyapi.Dockerfile")
    assert re.search(r"^ARG TABBYAPI_COMMIT=[0-9a-f]{40}$", tabby, re.MULTILINE)
    assert "['0.3.2', '2.8.0']" in tabby  # what the build makes sure of
    assert tabby.count("nvidia/cuda:12.8.") == 1
    ignored = (SERVE / "vllm.Dockerfile.dockerignore").read_text().split()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    for line in re.findall(r"^COPY (.+) \S+$", text_of("vllm.Dockerfile"), re.MULTILINE):
        assert set(line.split()) <= kept


def test_commands_are_shell_and_replace_the_placeholders(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", text_of("README.md"), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=600)
    for name in ("vllm.Dockerfile", "tabbyapi.Dockerfile"):
        said = re.findall(r"^#   (docker .*?[^\\])$", text_of(name), re.DOTALL | re.MULTILINE)
        said = [" ".join(s.replace("\\\n#", "").split()) for s in said]
        assert len(said) == 2
        page = " ".join(text_of("README.md").replace("\\\n", "").split())
        assert all(s in page for s in said)  # one command, in both places
    for name in ("vllm.yaml", "rayservice.yaml"):
        found_lines = re.findall(r"^sed .*?> \S+$", text_of("README.md"), re.DOTALL | re.MULTILINE)
        (command,) = [m for m in found_lines if f"/{name} " in m]
        command = re.sub(r"> \S+$", f"> {shlex.quote(str(tmp_path / name))}", command)
        subprocess.run(["bash", "-euc", command], check=True, cwd=ROOT, timeout=600)
        found = json.dumps(list(yaml.safe_load_all((tmp_path / name).read_text())))
        assert "REGISTRY" not in found
        assert "/shared/out/M" not in found
        assert text_of(name).count(IMAGE) >= 1
