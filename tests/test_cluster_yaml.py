"""cluster.yaml, the KubeRay example and the Dockerfile, offline: against Ray's schema, and for what they promise."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

import pipeline

ROOT = Path(__file__).parents[1]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_rays_own_validation_accepts_the_cluster_and_would_notice_a_key_that_ray_does_not_know() -> None:
    pytest.importorskip("jsonschema")
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load("cluster.yaml")))
    with pytest.raises(ValidationError):
        validate_config(prepare_config({**load("cluster.yaml"), "max_wrkers": 3}))


def test_nothing_is_scheduled_on_the_head_and_gpus_cost_nothing_between_jobs() -> None:
    cluster = load("cluster.yaml")
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    (gpu,) = (kind for name, kind in types.items() if name != cluster["head_node_type"])
    assert gpu["min_workers"] == 0
    assert gpu["max_workers"] == cluster["max_workers"]
    assert gpu["resources"]["GPU"] == 1


def test_images_are_pinned_to_the_tested_versions_of_ray_and_python() -> None:
    tested = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested is not None
    assert load("cluster.yaml")["docker"]["image"] == f"rayproject/ray:{tested[1]}-py311-gpu"
    assert load("docs/kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == tested[1] == ray.__version__


def test_every_ray_process_starts_with_a_token_that_stands_in_no_file() -> None:
    cluster = load("cluster.yaml")
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (command for command in cluster[commands] if "ray start" in command)
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in start
        assert not re.search(r"RAY_AUTH_TOKEN=|AWS_SECRET|AWS_ACCESS_KEY", start)
    job = load("docs/kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [job["headGroupSpec"], *job["workerGroupSpecs"]]
    for container in (container for group in groups for container in group["template"]["spec"]["containers"]):
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in variables["RAY_AUTH_TOKEN"]["valueFrom"]


def test_the_head_listens_below_the_ports_that_workers_take() -> None:
    (start,) = (command for command in load("cluster.yaml")["head_start_ray_commands"] if "ray start" in command)
    port = int(re.search(r"--port=(\d+)", start)[1])  # type: ignore[index]
    assert not 10002 <= port <= 19999


def test_the_kubernetes_job_runs_the_command_that_operators_type() -> None:
    job = load("docs/kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].startswith("python -m jobs.edit ")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["minReplicas"] == 0
    assert f"run.workers={group['maxReplicas']}" in job["spec"]["entrypoint"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, an instruction and its arguments at a time."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def of(wanted: str) -> list[str]:
    return [rest for word, rest in instructions() if word == wanted]


def test_the_image_is_built_on_the_one_that_the_cluster_was_tested_with() -> None:
    assert of("FROM") == [load("cluster.yaml")["docker"]["image"]]
    assert "docker build" in (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    group = load("docs/kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example.com/shardedit:{pipeline.__version__}"
    assert f"docker build -t {container['image']} ." in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_image_holds_what_the_package_is_built_from() -> None:
    copied = [place for arguments in of("COPY") for place in arguments.split()[1:-1]]
    assert [place for place in copied if not (ROOT / place).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert {place.rstrip("/") for place in copied} == packages | files | {"configs"}
    # A COPY of a folder puts what is in it, not itself, at its target.
    for arguments in of("COPY"):
        *sources, target = arguments.split()[1:]
        assert target == "./" or sources == [target]


def test_the_image_has_the_tested_versions_and_torch_for_its_gpus() -> None:
    (index,) = of("ARG")
    assert re.fullmatch(r"TORCH_INDEX=https://download\.pytorch\.org/whl/cu\d+", index)
    torch, package = of("RUN")
    assert "--index-url ${TORCH_INDEX}" in torch
    assert "\"$(grep '^torch==' constraints.txt)\"" in torch
    assert len(re.findall(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)) == 1
    assert "torch.version.cuda" in torch, "a build for CPUs ends the build"
    assert 'pip install --no-cache-dir -c constraints.txt ".[cluster]"' in package
    assert "index" not in package, "what is installed beside torch comes from PyPI"
    words = [word for word, _ in instructions()]
    # Ray starts its processes with commands of its own, as the base image's user.
    assert not {"ENTRYPOINT", "CMD", "USER"} & set(words)
