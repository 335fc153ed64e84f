"""Versions and images agree with the pins and the Dockerfile, and the optional parts can be added."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from helpers.kube_rules import bad_volumes
from helpers.manifests import (
    K8S,
    OVERLAYS,
    build,
    distinct,
    find,
    named,
    overlay_pods,
    pods,
    pods_of,
    ray_spec,
)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    for name, doc in distinct().items():
        spec = ray_spec(doc)
        if spec is not None:
            assert spec["rayVersion"] == pins()["ray"], name
        if doc["kind"] == "Job" and "migrate" in name:
            assert doc["metadata"]["name"].endswith(pins()["mlflow"].replace(".", "-")), name
    for pod in pods():
        for container in pod.containers():
            image, _, tag = container["image"].rpartition(":")
            if pod.root.startswith("base") and not image:  # named by components/image
                continue
            assert image, f"{pod.name}: {container['image']}"
            assert tag != "latest", pod.name
            if image.rpartition("/")[2].startswith("effdet"):
                assert tag.split("-")[0] == version, f"{pod.name}: {tag}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_those_that_the_dockerfile_makes(overlay: str) -> None:
    targets = set(re.findall(r"FROM \S+ AS (\w+)$", (K8S / "Dockerfile").read_text(), re.MULTILINE))
    kind = "cpu" if overlay == "local" else "cuda"
    assert {"cpu", "cuda", "mlflow"} <= targets
    for pod in overlay_pods(overlay):
        for container in pod.containers():
            image, _, tag = container["image"].rpartition("/")[2].partition(":")
            if image == "effdet":
                assert tag.endswith(f"-{kind}"), pod.name
            elif not image.startswith("effdet"):
                assert image in ("postgres", "redis", "minio"), pod.name


@pytest.mark.parametrize("component", ["nvme", "external-postgres"])
def test_optional_components_can_be_added(component: str, tmp_path: Path) -> None:
    here = Path("../" * len(tmp_path.resolve().parts)) / K8S.resolve().relative_to("/")
    resources = "overlays/gpu" if component == "nvme" else "base/platform"
    lines: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(here / resources)],
        "components": [str(here / "components" / component)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    docs = build(tmp_path)
    for pod in (pod for doc in docs for pod in pods_of(doc, component)):
        assert bad_volumes(pod.spec) == [], pod.name
    if component == "nvme":
        spec = find(docs, "RayCluster", "effdet-shared")["spec"]["workerGroupSpecs"][0]
        (cache,) = [v for v in spec["template"]["spec"]["volumes"] if v["name"] == "cache"]
        assert cache["ephemeral"]["volumeClaimTemplate"]["spec"]["storageClassName"] == "local-nvme"
    else:
        assert "postgres" not in named(docs, "StatefulSet") | named(docs, "Service")
        assert "postgres" not in named(docs, "NetworkPolicy")
