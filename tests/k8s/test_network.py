"""Who may talk to whom, worked out from the NetworkPolicies as a cluster would, against a list by hand."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from helpers.manifests import (
    JOB_ROOTS,
    OVERLAYS,
    Doc,
    Pod,
    everything,
    pods_of,
    rayjob,
    rendered,
)

TCP = "TCP"
S3_ADDRESS, METADATA_ADDRESS, PRIVATE_ADDRESS = "52.216.1.1", "169.254.169.254", "10.96.0.1"
OUTSIDE = {
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
    "operator": ("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}),
    "prometheus": ("monitoring", {"app.kubernetes.io/name": "prometheus"}),
    "ingress": ("ingress-nginx", {"app.kubernetes.io/name": "ingress-nginx"}),
    "stranger": ("default", {"app.kubernetes.io/name": "anything"}),
}
PORTS = (22, 53, 80, 443, 5000, 5432, 6379, 6443, 8000, 8080, 8265, 9000, 10001, 44217, 52365)


@dataclass(frozen=True)
class Peer:
    """A pod, or an address outside the cluster."""

    name: str
    namespace: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    address: str = ""


def matches(selector: Doc, labels: dict[str, str]) -> bool:
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In", "the only operator that is used"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def is_peer(rule: Doc, peer: Peer, namespace: str) -> bool:
    if "ipBlock" in rule:
        if not peer.address:
            return False
        address = ipaddress.ip_address(peer.address)
        block = rule["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(part) for part in block.get("except", ())
        )
    if peer.address:
        return False
    if "namespaceSelector" in rule:
        name = {"kubernetes.io/metadata.name": peer.namespace}
        if not matches(rule["namespaceSelector"], name):
            return False
    elif peer.namespace != namespace:
        return False
    return matches(rule.get("podSelector", {}), dict(peer.labels))


def permits(
    rules: Iterable[Doc], side: str, peer: Peer, namespace: str, port: int, protocol: str
) -> bool:
    for rule in rules:
        assert rule.get(side), "a rule for everybody"
        assert rule.get("ports"), "a rule for all ports"
        on_port = any(
            entry["protocol"] == protocol
            and entry["port"] <= port <= entry.get("endPort", entry["port"])
            for entry in rule["ports"]
        )
        if on_port and any(is_peer(one, peer, namespace) for one in rule[side]):
            return True
    return False


class Network:
    """One overlay's namespace."""

    def __init__(self, overlay: str) -> None:
        docs = everything(overlay)
        self.policies = [doc for doc in docs if doc["kind"] == "NetworkPolicy"]
        self.namespace = "efficientdet"
        self.pods: dict[str, Peer] = {}
        for doc in docs:
            for pod in pods_of(doc, overlay):
                self.pods.setdefault(kind_of(pod), self.peer(pod))

    def peer(self, pod: Pod) -> Peer:
        return Peer(kind_of(pod), self.namespace, tuple(sorted(pod.labels.items())))

    def outside(self) -> list[Peer]:
        named = (
            Peer(name, space, tuple(labels.items())) for name, (space, labels) in OUTSIDE.items()
        )
        addresses = {"s3": S3_ADDRESS, "metadata": METADATA_ADDRESS, "private": PRIVATE_ADDRESS}
        return [*named, *(Peer(name, address=value) for name, value in addresses.items())]

    def selected(self, peer: Peer, direction: str) -> list[Doc]:
        labels = dict(peer.labels)
        return [
            policy["spec"]
            for policy in self.policies
            if direction in policy["spec"]["policyTypes"]
            and matches(policy["spec"]["podSelector"], labels)
        ]

    def allowed(self, source: Peer, target: Peer, port: int, protocol: str = TCP) -> bool:
        """Both ends must let it through; outside the namespace nobody is asked."""
        if source.namespace == self.namespace:
            selected = self.selected(source, "Egress")
            assert selected, f"{source.name}: no policy"
            rules = [rule for spec in selected for rule in spec.get("egress", ())]
            if not permits(rules, "to", target, self.namespace, port, protocol):
                return False
        if target.namespace == self.namespace:
            selected = self.selected(target, "Ingress")
            assert selected, f"{target.name}: no policy"
            rules = [rule for spec in selected for rule in spec.get("ingress", ())]
            return permits(rules, "from", source, self.namespace, port, protocol)
        return True

    def flows(self) -> Iterator[tuple[str, str, int]]:
        everybody = [*self.pods.values(), *self.outside()]
        for source in everybody:
            for target in everybody:
                if self.namespace not in (source.namespace, target.namespace):
                    continue
                for port in PORTS:
                    if self.allowed(source, target, port):
                        yield source.name, target.name, port


def kind_of(pod: Pod) -> str:
    """What tells pods apart for the network: of Ray's and submitters, their cluster too."""
    if pod.component not in ("ray", "submitter"):
        return pod.component
    parts = [pod.component, pod.labels["effdet.io/cluster"]]
    parts += [what for what in ("shared-head", "autoscaler") if f"effdet.io/{what}" in pod.labels]
    return " ".join(parts)


def cluster_of(name: str) -> str:
    return name.split()[1]


def expected(overlay: str, names: set[str]) -> set[tuple[str, str, int]]:
    """Every flow that is meant to be, and why."""
    ray = {name for name in names if name.startswith("ray ")}
    flows = {
        (a, b, port) for a in ray for b in ray for port in PORTS if cluster_of(a) == cluster_of(b)
    }  # Ray, NCCL, gloo
    flows |= {(name, "dns", 53) for name in names}
    flows |= {
        (name, head, 8265)
        for name in names if name.startswith("submitter ")
        for head in ray if cluster_of(name) == cluster_of(head)
    }  # fmt: skip  # ray job submit
    flows |= {("operator", head, 8265) for head in ray}  # asks how a job is doing
    flows |= {("prometheus", node, 8080) for node in ray}
    flows |= {(node, "mlflow", 5000) for node in ray}  # records, figures, models
    flows |= {("ingress", "mlflow", 5000)}  # people
    flows |= {("mlflow-gc", "mlflow", 5000), ("retention", "mlflow", 5000)}
    database = {("mlflow", 5432), ("mlflow-migrate", 5432), ("mlflow-gc", 5432)}
    if "postgres" in names:
        flows |= {(name, "postgres", port) for name, port in database}
    else:  # an external one, in the private network
        flows |= {(name, "private", port) for name, port in database}
    flows |= {
        (name, "redis", 6379) for name in ray if "shared-head" in name
    }  # what a head must remember
    stores = {*ray, "mlflow", "mlflow-gc", "retention", "prefetch"}
    flows |= {(name, "s3", 443) for name in stores}
    if overlay == "local":
        flows |= {(name, "s3-server", 9000) for name in {*stores, "buckets"}}
    for name in ray:
        if "autoscaler" in name:  # asks Kubernetes for pods
            flows |= {(name, "private", 443), (name, "private", 6443), (name, "s3", 6443)}
    return flows


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_must_flow_flows_and_nothing_else(overlay: str) -> None:
    network = Network(overlay)
    if "s3" in network.pods:  # not to be mixed up with the one outside
        server = network.pods.pop("s3")
        network.pods["s3-server"] = Peer("s3-server", server.namespace, server.labels)
    wanted = expected(overlay, set(network.pods))
    there = set(network.flows())
    assert wanted - there == set(), "needed, but not allowed"
    assert there - wanted == set(), "allowed, but not needed"
    assert len(network.pods) >= 12
    assert {cluster_of(name) for name in network.pods if name.startswith("ray ")} == {
        "effdet-shared", "effdet-train", "effdet-sweep"
    }  # fmt: skip


@pytest.mark.parametrize("root", JOB_ROOTS)
def test_a_job_brings_the_policy_of_its_own_pods(root: str) -> None:
    job = rayjob(root)
    name = job["metadata"]["name"]
    assert {pod.labels["effdet.io/cluster"] for pod in pods_of(job)} == {name}
    (policy,) = [doc for doc in rendered()[root] if doc["kind"] == "NetworkPolicy"]
    assert policy["metadata"]["name"] == name
    found = re.findall(r"'effdet.io/cluster': '([\w-]+)'", str(policy["spec"]))
    assert found == [name] * 4


def test_names_are_resolved_over_udp_too() -> None:
    network = Network("gpu")
    dns = next(peer for peer in network.outside() if peer.name == "dns")
    assert all(network.allowed(pod, dns, 53, "UDP") for pod in network.pods.values())


def test_every_pod_is_denied_what_is_not_allowed() -> None:
    for overlay in OVERLAYS:
        policies = [doc for doc in everything(overlay) if doc["kind"] == "NetworkPolicy"]
        (deny,) = [doc["spec"] for doc in policies if doc["metadata"]["name"] == "default-deny"]
        assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_nobody_reaches_the_cloud_providers_credentials() -> None:
    for overlay in OVERLAYS:
        network = Network(overlay)
        metadata = next(peer for peer in network.outside() if peer.name == "metadata")
        for pod in network.pods.values():
            assert not any(network.allowed(pod, metadata, port) for port in PORTS), pod.name


def test_a_policy_that_is_gone_is_missed() -> None:
    network = Network("gpu")
    network.policies = [doc for doc in network.policies if doc["metadata"]["name"] != "postgres"]
    assert not network.allowed(network.pods["mlflow"], network.pods["postgres"], 5432)
