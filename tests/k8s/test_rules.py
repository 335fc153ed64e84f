"""What schemas let through and clusters refuse: quantities, the operator's rules, pod security."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from helpers.kube_rules import (
    bad_quantities,
    bad_resources,
    not_restricted,
    quantity,
    refused_by_operator,
)
from helpers.manifests import Doc, distinct, find, pods, rendered


def test_quantities_are_quantities() -> None:
    assert {
        name: bad_quantities(doc) for name, doc in distinct().items() if bad_quantities(doc)
    } == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [("16Gi", 16 * 2**30), ("250m", 0.25), (4, 4.0), ("1.5", 1.5), ("3Ti", 3 * 2**40)],
)
def test_a_quantity_is_read(text: object, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["16GiB", "16gb", "", "four", "1,5Gi"])
def test_a_bad_quantity_is_found(text: str) -> None:
    doc = copy.deepcopy(find(rendered()["overlays/gpu/train"], "RayJob", "effdet-train"))
    group = doc["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = text
    assert len(bad_quantities(doc)) == 1


def test_every_container_says_what_it_needs() -> None:
    assert {pod.name: bad_resources(pod.spec) for pod in pods() if bad_resources(pod.spec)} == {}


def test_every_pod_is_restricted() -> None:
    found = {pod.name: not_restricted(pod.template) for pod in pods()}
    assert {name: what for name, what in found.items() if what} == {}
    roles = {pod.role for pod in pods()}
    names = {container["name"] for pod in pods() for container in pod.containers()}
    assert {"head", "worker-workers", "submitter", "pod"} <= roles
    assert {"wait-for-schema", "wait-gcs-ready", "autoscaler", "ray-job-submitter"} <= names


def test_every_namespace_enforces_it() -> None:
    namespaces = [doc for doc in distinct().values() if doc["kind"] == "Namespace"]
    assert namespaces
    for doc in namespaces:
        assert doc["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def container_of(template: Doc) -> Doc:
    return dict(template["spec"]["containers"][0])


Change = Callable[[Doc], Any]
UNSAFE: dict[str, Change] = {
    "privileged": lambda t: t["spec"]["containers"][0]["securityContext"].update(privileged=True),
    "escalation": lambda t: t["spec"]["containers"][0]["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "capabilities": lambda t: t["spec"]["containers"][0]["securityContext"].pop("capabilities"),
    "added capability": lambda t: t["spec"]["containers"][0]["securityContext"][
        "capabilities"
    ].update(add=["SYS_ADMIN"]),
    "root": lambda t: t["spec"]["securityContext"].update(runAsUser=0),
    "non-root unsaid": lambda t: t["spec"]["securityContext"].pop("runAsNonRoot"),
    "seccomp": lambda t: t["spec"]["securityContext"].pop("seccompProfile"),
    "host path": lambda t: t["spec"]["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "host network": lambda t: t["spec"].update(hostNetwork=True),
    "host port": lambda t: t["spec"]["containers"][0].update(
        ports=[{"containerPort": 1, "hostPort": 1}]
    ),
    "an init container": lambda t: t["spec"]["initContainers"].append({"name": "x", "image": "x"}),
}


@pytest.mark.parametrize("change", UNSAFE)
def test_an_unsafe_pod_is_found(change: str) -> None:
    pod = next(pod for pod in pods() if pod.role == "worker-workers")
    template = copy.deepcopy(pod.template)
    assert not_restricted(template) == []
    UNSAFE[change](template)
    assert not_restricted(template)


def test_the_operator_takes_every_custom_resource() -> None:
    found = {name: refused_by_operator(doc) for name, doc in distinct().items()}
    assert {name: what for name, what in found.items() if what} == {}


def cluster(doc: Doc) -> Doc:
    spec: Doc = doc["spec"].get("rayClusterSpec", doc["spec"])
    return spec


REFUSED: dict[str, Change] = {
    "long name": lambda d: d["metadata"].update(name="x" * 48),
    "name with a digit first": lambda d: d["metadata"].update(name="1-job"),
    "ttl without shutdown": lambda d: d["spec"].update(shutdownAfterJobFinishes=False),
    "suspend without shutdown": lambda d: d["spec"].update(
        suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0
    ),
    "deletion rules": lambda d: d["spec"].update(deletionStrategy={"deletionRules": [{}]}),
    "selector": lambda d: d["spec"].update(clusterSelector={"a": "b"}),
    "no entrypoint": lambda d: d["spec"].pop("entrypoint"),
    "deadline": lambda d: d["spec"].update(activeDeadlineSeconds=0),
    "submitter restarts": lambda d: d["spec"]["submitterPodTemplate"]["spec"].update(
        restartPolicy="Always"
    ),
    "token for an old Ray": lambda d: cluster(d).update(rayVersion="2.51.0"),
    "token for an unknown Ray": lambda d: cluster(d).pop("rayVersion"),
    "alpha network policy": lambda d: cluster(d).update(networkPolicy={}),
    "alpha storage": lambda d: cluster(d).update(gcsFaultToleranceOptions={"backend": "rocksdb"}),
    "upgrade strategy": lambda d: cluster(d).update(upgradeStrategy={"type": "None"}),
    "replicas": lambda d: cluster(d)["workerGroupSpecs"][0].update(minReplicas=99),
    "number as a parameter": lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update(
        {"num-cpus": 0}
    ),
    "resources twice": lambda d: cluster(d)["headGroupSpec"].update(resources={"CPU": "1"}),
    "labels": lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update(labels="a=b"),
    "autoscaler options alone": lambda d: cluster(d).update(enableInTreeAutoscaling=False),
    "v2 with restarts": lambda d: cluster(d)["headGroupSpec"]["template"]["spec"].update(
        restartPolicy="Always"
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_the_operator_refuses_is_found(change: str) -> None:
    doc = copy.deepcopy(find(rendered()["overlays/spot/train"], "RayJob", "effdet-train"))
    assert refused_by_operator(doc) == []
    REFUSED[change](doc)
    assert refused_by_operator(doc)


def test_a_second_name_for_redis_is_found() -> None:
    doc = copy.deepcopy(find(rendered()["overlays/gpu"], "RayCluster", "effdet-shared"))
    assert refused_by_operator(doc) == []
    head = doc["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["env"].append({"name": "REDIS_PASSWORD", "value": "x"})
    assert refused_by_operator(doc)
