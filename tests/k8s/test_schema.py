"""Every document and every pod against the schemas of Kubernetes and of KubeRay's operator."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers.manifests import OVERLAYS, RENDERED, Doc, distinct, pods, rendered

kubernetes_validate = pytest.importorskip("kubernetes_validate")

OLDEST = (1, 32)
FOREIGN = ("ray.io/", "kueue.x-k8s.io/")
VERSIONS = tuple(
    version
    for version in dict.fromkeys(kubernetes_validate.utils.all_versions())
    if tuple(map(int, version.split(".")[:2])) >= OLDEST
)


@cache
def definitions(version: str) -> dict[str, Any]:
    """By name, with references replaced by what they name: following them is most of the time."""
    found: dict[str, Any] = _schema(version, "_definitions")["$defs"]
    for schema in found.values():
        _link(schema, found)
    return found


def _link(schema: Any, named: dict[str, Any]) -> None:
    """Replaces {"$ref": ...#/$defs/NAME} below a schema by the definition itself."""
    for key, part in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if isinstance(part, dict) and isinstance(part.get("$ref"), str):
            schema[key] = named[part["$ref"].rpartition("/")[2]]
        elif isinstance(part, dict | list):
            _link(part, named)


@cache
def validator(version: str, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    """kubernetes-validate's own check, strict, with its schemas read once."""
    group, _, release = api_version.rpartition("/")
    prefix = f"{group.split('.')[0]}-" if group else ""
    schema = _schema(version, f"{kind.lower()}-{prefix}{release}")
    _link(schema, definitions(version))
    return jsonschema.Draft202012Validator(schema)


def _schema(version: str, name: str) -> Any:
    path = f"kubernetes-json-schema/v{version}-local-strict/{name}.json"
    return kubernetes_validate.utils.schema_contents(path, version)


def problems(doc: Doc, version: str) -> list[str]:
    check = validator(version, doc["apiVersion"], doc["kind"])
    return [f"{error.json_path}: {error.message[:200]}" for error in check.iter_errors(doc)]


def as_document(template: Doc) -> Doc:
    metadata = {"name": "x"}
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}


def test_every_overlay_renders() -> None:
    assert set(rendered()) == set(RENDERED)
    for overlay in OVERLAYS:
        kinds = {doc["kind"] for doc in rendered()[f"overlays/{overlay}"]}
        assert {"RayCluster", "Deployment", "NetworkPolicy", "CronJob", "Job"} <= kinds
        for job in ("train", "sweep"):
            there = [doc["kind"] for doc in rendered()[f"overlays/{overlay}/{job}"]]
            assert there == ["NetworkPolicy", "RayJob"]


def test_the_schemas_reach_from_the_oldest_supported_kubernetes_to_the_newest_known() -> None:
    assert VERSIONS[0].startswith("1.32")
    assert VERSIONS[-1] == kubernetes_validate.latest_version()
    assert len(VERSIONS) >= 5


@pytest.mark.parametrize("version", VERSIONS)
def test_documents_and_pods_are_valid(version: str) -> None:
    checked = 0
    found = {}
    for name, doc in distinct().items():
        if not doc["apiVersion"].startswith(FOREIGN):
            found[name] = problems(doc, version)
            checked += 1
    for pod in pods():
        found[pod.name] = problems(as_document(pod.template), version)
        checked += 1
    assert {name: what for name, what in found.items() if what} == {}
    assert checked > 80


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("restartPolicyy",), "Never"),
        (("containers", 0, "image"), 5),
        (("containers", 0, "resources", "request"), {}),
        (("containers", 0, "ports"), [{"containerPort": "http"}]),
        (("volumes", 0, "emptyDir", "size"), "1Gi"),
    ],
)
def test_a_mistake_in_a_pod_of_a_custom_resource_is_found(
    path: tuple[Any, ...], value: Any
) -> None:
    template = copy.deepcopy(next(p for p in pods() if p.role.startswith("worker")).template)
    place = template["spec"]
    for key in path[:-1]:
        place = place[key]
    assert problems(as_document(template), VERSIONS[-1]) == []
    place[path[-1]] = value
    assert problems(as_document(template), VERSIONS[-1])


def closed(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that knows no other fields, as the API server's strict mode."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        key: (
            {name: closed(value) for name, value in part.items()}
            if key == "properties"
            else closed(part)
        )
        for key, part in schema.items()
        if key != "description" and not key.startswith("x-kubernetes")
    }
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


@pytest.fixture(scope="session")
def custom(crds: Path) -> dict[str, jsonschema.Draft202012Validator]:
    """By kind."""
    found = {}
    for name in ("rayclusters", "rayjobs"):
        crd = yaml.load((crds / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)
        (version,) = [entry for entry in crd["spec"]["versions"] if entry["name"] == "v1"]
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[crd["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return found


def test_custom_resources_fit_the_operators_schema(
    custom: dict[str, jsonschema.Draft202012Validator],
) -> None:
    checked = {}
    for name, doc in distinct().items():
        if doc["kind"] in custom:
            errors = custom[doc["kind"]].iter_errors(doc)
            checked[name] = [f"{error.json_path}: {error.message[:200]}" for error in errors]
    assert {name: what for name, what in checked.items() if what} == {}
    assert len(checked) >= 10


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "shutdownAfterJobFinish"), True),
        (("spec", "backoffLimit"), "three"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "tolerations"), "all"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"), 1),
    ],
)
def test_a_mistake_in_a_custom_resource_is_found(
    custom: dict[str, jsonschema.Draft202012Validator], path: tuple[Any, ...], value: Any
) -> None:
    job = copy.deepcopy(next(doc for doc in distinct().values() if doc["kind"] == "RayJob"))
    assert list(custom["RayJob"].iter_errors(job)) == []
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert list(custom["RayJob"].iter_errors(job))
