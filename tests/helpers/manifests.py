"""The manifests of k8s/ as kubectl renders them, and the pods that come out of them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import ROOT

K8S = ROOT / "k8s"
OVERLAYS = ("local", "gpu", "spot", "kueue", "aws")
PARTS = (".", "train", "sweep", "prefetch")
JOBS = ("train", "sweep")
JOB_ROOTS = (
    *(f"overlays/{overlay}/{job}" for overlay in OVERLAYS for job in JOBS),
    *(f"base/{job}" for job in JOBS),
)
RENDERED = (
    *((f"overlays/{overlay}/{part}").rstrip("/.") for overlay in OVERLAYS for part in PARTS),
    *("base/platform", "base/train", "base/sweep", "base/prefetch"),
)

Doc = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod as Kubernetes will see it. name: of its owner and role; template: with what the operator adds."""

    root: str
    kind: str
    owner: str
    role: str
    template: Doc

    @property
    def name(self) -> str:
        return f"{self.root}:{self.kind}/{self.owner}/{self.role}"

    @property
    def spec(self) -> Doc:
        return dict(self.template["spec"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"]["labels"])

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def containers(self) -> list[Doc]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def kustomize() -> list[str]:
    """The command that renders a folder; skips the test where there is none."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    pytest.skip("neither kubectl nor kustomize is installed: manifests cannot be rendered")


def build(folder: Path) -> list[Doc]:
    done = subprocess.run([*kustomize(), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, f"{folder}:\n{done.stderr}"
    return [doc for doc in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if doc]


@cache
def rendered() -> dict[str, list[Doc]]:
    """Every overlay, once a session."""
    kustomize()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RENDERED, pool.map(lambda root: build(K8S / root), RENDERED), strict=True))


def everything(overlay: str) -> list[Doc]:
    """All that one overlay puts into a cluster: the platform and its jobs."""
    return [
        doc
        for root, docs in rendered().items()
        for doc in docs
        if root == f"overlays/{overlay}" or root.startswith(f"overlays/{overlay}/")
    ]


@cache
def distinct() -> dict[str, Doc]:
    """Documents by where they are first rendered; equal ones once."""
    seen: dict[str, Doc] = {}
    names: dict[str, str] = {}
    for root, docs in rendered().items():
        for doc in docs:
            text = json.dumps(doc, sort_keys=True)
            if text not in names:
                names[text] = f"{root}:{doc['kind']}/{doc['metadata']['name']}"
                seen[names[text]] = doc
    return seen


def find(docs: list[Doc], kind: str, name: str) -> Doc:
    (found,) = [doc for doc in docs if doc["kind"] == kind and doc["metadata"]["name"] == name]
    return found


def named(docs: list[Doc], kind: str) -> dict[str, Doc]:
    return {doc["metadata"]["name"]: doc for doc in docs if doc["kind"] == kind}


def rayjob(root: str) -> Doc:
    """The one that a folder renders, beside its NetworkPolicy."""
    (found,) = named(rendered()[root], "RayJob").values()
    return found


def secret_keys(text: str) -> dict[str, set[str]]:
    """Keys of the Secrets in a YAML, by their names."""
    docs = [doc for doc in yaml.safe_load_all(text) if doc]
    return {doc["metadata"]["name"]: set(doc["stringData"]) for doc in docs}


@cache
def expected_secrets() -> dict[str, set[str]]:
    """What the platform expects there to be."""
    return secret_keys((K8S / "secrets" / "secrets.example.yaml").read_text())


def ray_spec(doc: Doc) -> Doc | None:
    """Of the cluster that a RayCluster or RayJob describes."""
    if doc["kind"] == "RayCluster":
        return dict(doc["spec"])
    if doc["kind"] == "RayJob":
        return dict(doc["spec"]["rayClusterSpec"])
    return None


def pods_of(doc: Doc, root: str = "") -> Iterator[Pod]:
    kind, name = doc["kind"], doc["metadata"]["name"]
    if kind in ("Deployment", "StatefulSet", "Job"):
        yield Pod(root, kind, name, "pod", doc["spec"]["template"])
    if kind == "CronJob":
        yield Pod(root, kind, name, "pod", doc["spec"]["jobTemplate"]["spec"]["template"])
    spec = ray_spec(doc)
    if spec is None:
        return
    yield Pod(root, kind, name, "head", _head(spec))
    for group in spec["workerGroupSpecs"]:
        yield Pod(root, kind, name, f"worker-{group['groupName']}", _worker(group))
    if kind == "RayJob":
        yield Pod(root, kind, name, "submitter", doc["spec"]["submitterPodTemplate"])


def _head(spec: Doc) -> Doc:
    """With the autoscaler beside it, which the operator adds, and the label it gives."""
    template: Doc = copy.deepcopy(spec["headGroupSpec"]["template"])
    template["metadata"]["labels"]["ray.io/node-type"] = "head"
    if spec.get("enableInTreeAutoscaling"):
        options = spec["autoscalerOptions"]
        template["spec"]["containers"].append(
            {
                "name": "autoscaler",
                "image": template["spec"]["containers"][0]["image"],
                **{
                    key: copy.deepcopy(options[key])
                    for key in ("resources", "securityContext", "volumeMounts", "env")
                    if key in options
                },
            }
        )
    return template


def _worker(group: Doc) -> Doc:
    """With the container that waits for the head: the operator takes its security from the first one."""
    template: Doc = copy.deepcopy(group["template"])
    template["metadata"]["labels"]["ray.io/node-type"] = "worker"
    first = template["spec"]["containers"][0]
    waiting = {
        "name": "wait-gcs-ready",
        "image": first["image"],
        "securityContext": copy.deepcopy(first.get("securityContext")),
        "volumeMounts": copy.deepcopy(first["volumeMounts"]),
        "resources": {
            "requests": {"cpu": "200m", "memory": "256Mi"},
            "limits": {"cpu": "200m", "memory": "256Mi"},
        },
    }
    template["spec"].setdefault("initContainers", []).append(waiting)
    return template


def overlay_pods(overlay: str) -> list[Pod]:
    return [pod for doc in everything(overlay) for pod in pods_of(doc, overlay)]


@cache
def pods() -> tuple[Pod, ...]:
    """Of every distinct document."""
    return tuple(
        pod for name, doc in distinct().items() for pod in pods_of(doc, name.partition(":")[0])
    )
