"""What manifests name exists: settings, secrets, volumes, ports, services, accounts, scripts."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.manifests import (
    K8S,
    OVERLAYS,
    Doc,
    Pod,
    distinct,
    everything,
    expected_secrets,
    find,
    named,
    overlay_pods,
    pods,
    ray_spec,
    rendered,
)

# Where each command that a pod runs is run by a test, in its own words.
RUN_BY = {
    "jobs/train.py": "test_entrypoints",
    "jobs/tune.py": "test_entrypoints",
    "prefetch.py": "test_entrypoints",
    "buckets.py": "test_mlflow_stack",
    "drain.py": "test_scripts",
    "mlflow_prepare.py migrate": "test_mlflow_stack",
    "mlflow_prepare.py wait": "test_mlflow_stack",
    "mlflow_ready.py": "test_mlflow_stack",
    "retain_checkpoints.py": "test_mlflow_stack",
}


def references(pod: Pod) -> Iterator[tuple[str, str, str | None]]:
    """(ConfigMap or Secret, its name, key or None for all of it) of everything that must be there."""
    for container in pod.containers():
        for source in container.get("envFrom", ()):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in source and not source[field].get("optional"):
                    yield kind, source[field]["name"], None
        for env in container.get("env", ()):
            for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                ref = env.get("valueFrom", {}).get(field)
                if ref is not None:
                    yield kind, ref["name"], ref["key"]
    for volume in pod.spec.get("volumes", ()):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], None
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"], None


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_and_secrets_exist(overlay: str) -> None:
    maps = named(everything(overlay), "ConfigMap")
    checked = 0
    for pod in overlay_pods(overlay):
        for kind, name, key in references(pod):
            there = (
                expected_secrets().get(name) if kind == "Secret" else maps.get(name, {}).get("data")
            )
            assert there, f"{pod.name}: {kind} {name}"
            assert key is None or key in there, f"{pod.name}: {kind} {name}, key {key}"
            checked += 1
    for doc in everything(overlay):
        redis = (ray_spec(doc) or {}).get("gcsFaultToleranceOptions")
        if redis:
            ref = redis["redisPassword"]["valueFrom"]["secretKeyRef"]
            assert ref["key"] in expected_secrets()[ref["name"]]
    assert checked > 20


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_accounts_priorities_and_volumes_exist(overlay: str) -> None:
    docs = everything(overlay)
    accounts, classes = named(docs, "ServiceAccount"), named(docs, "PriorityClass")
    for pod in overlay_pods(overlay):
        assert pod.spec["serviceAccountName"] in accounts, pod.name
        assert "automountServiceAccountToken" in pod.spec, pod.name
        assert pod.spec.get("priorityClassName", "effdet-train") in classes, pod.name
        claims = find(docs, pod.kind, pod.owner)["spec"].get("volumeClaimTemplates", ())
        volumes = [volume["name"] for volume in pod.spec.get("volumes", ())]
        volumes += [claim["metadata"]["name"] for claim in claims]
        assert len(set(volumes)) == len(volumes), pod.name
        mounted = {m["name"] for c in pod.containers() for m in c.get("volumeMounts", ())}
        assert mounted == set(volumes), f"{pod.name}: mounted and defined volumes differ"


def test_only_the_autoscaler_may_talk_to_kubernetes() -> None:
    for pod in pods():
        autoscaled = any(container["name"] == "autoscaler" for container in pod.containers())
        assert pod.spec["automountServiceAccountToken"] is autoscaled, pod.name
        assert (pod.spec["serviceAccountName"] == "effdet-ray-head") is autoscaled, pod.name
        assert ("effdet.io/autoscaler" in pod.labels) is autoscaled, pod.name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_select_pods_that_have_their_ports(overlay: str) -> None:
    docs = everything(overlay)
    services = named(docs, "Service")
    assert {"mlflow", "redis"} <= set(services)
    for name, service in services.items():
        selector = service["spec"]["selector"].items()
        chosen = [pod for pod in overlay_pods(overlay) if selector <= pod.labels.items()]
        assert len(chosen) == 1, f"{name} selects {[pod.name for pod in chosen]}"
        ports = {
            port["name"]: port["containerPort"]
            for container in chosen[0].containers()
            for port in container.get("ports", ())
        }
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_addresses_are_those_of_services(overlay: str) -> None:
    docs = everything(overlay)
    ports = {
        f"{name}:{port['port']}"
        for name, service in named(docs, "Service").items()
        for port in service["spec"]["ports"]
    }
    settings = find(docs, "ConfigMap", "effdet-config")["data"]
    assert settings["MLFLOW_TRACKING_URI"].removeprefix("http://") in ports
    assert settings.get("AWS_ENDPOINT_URL", "http://mlflow:5000").removeprefix("http://") in ports
    shared = find(docs, "RayCluster", "effdet-shared")["spec"]
    assert shared["gcsFaultToleranceOptions"]["redisAddress"] in ports
    host = find(docs, "ConfigMap", "mlflow-config")["data"]["POSTGRES_HOST"]
    assert f"{host}:5432" in ports or host.endswith(".internal")


def test_the_tracker_answers_to_every_name_of_its_service() -> None:
    for overlay in OVERLAYS:
        docs = everything(overlay)
        server = find(docs, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]
        (hosts,) = [arg for arg in server["args"] if arg.startswith("--allowed-hosts=")]
        allowed = hosts.partition("=")[2].split(",")
        assert "*" not in hosts
        namespace = find(docs, "Deployment", "mlflow")["metadata"]["namespace"]
        for suffix in ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local"):
            assert {f"mlflow{suffix}", f"mlflow{suffix}:5000"} <= set(allowed)
        assert "--app-name=basic-auth" in server["args"]
        assert "--disable-security-middleware" not in server["args"]
        settings = find(docs, "ConfigMap", "mlflow-config")["data"]
        assert settings["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
        assert settings["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


def variables(container: Doc, maps: dict[str, Doc]) -> set[str]:
    names = {env["name"] for env in container.get("env", ())}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            names |= set(maps[source["configMapRef"]["name"]]["data"])
        else:
            names |= expected_secrets()[source["secretRef"]["name"]]
    return names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_environment_is_complete(overlay: str) -> None:
    """What values and scripts refer to is defined in the same container."""
    maps = named(everything(overlay), "ConfigMap")
    expanded = read = 0
    for pod in overlay_pods(overlay):
        for container in pod.containers():
            known = variables(container, maps)
            for env in container.get("env", ()):
                used = set(re.findall(r"\$\((\w+)\)", env.get("value", "")))
                assert used <= known, f"{pod.name}: {used - known}"
                expanded += len(used)
            script = script_of(container)
            if script is not None:
                needed = required_variables(script)
                if container.get("command", [])[-1:] == ["wait"]:
                    needed -= {"EFFDET_TRAINING_PASSWORD"}
                needed -= {"RAY_ADDRESS"}  # the operator's
                assert needed <= known, f"{pod.name}: {script.name} needs {needed - known}"
                read += len(needed)
    assert expanded
    assert read


def script_of(container: Doc) -> Path | None:
    command = [*container.get("command", ()), *container.get("args", ())]
    if command[:1] != ["python"]:
        return None
    folder, _, name = command[1].rpartition("/")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert folder in mounts, command
    (found,) = list(K8S.rglob(name))
    return found


def required_variables(script: Path) -> set[str]:
    return set(re.findall(r"os\.environ\[[\"'](\w+)[\"']\]", script.read_text()))


def probes_and_hooks(container: Doc) -> Iterator[list[str]]:
    for place in (container, container.get("lifecycle", {})):
        for key in ("startupProbe", "readinessProbe", "livenessProbe", "preStop"):
            if "exec" in place.get(key, {}):
                yield place[key]["exec"]["command"]


def test_scripts_are_those_that_are_mounted() -> None:
    scripts = find(rendered()["overlays/local"], "ConfigMap", "effdet-scripts")["data"]
    used = set()
    for pod in pods():
        for container in pod.containers():
            commands = [container.get("command", []), *probes_and_hooks(container)]
            for command in commands:
                if command[:1] == ["python"] and command[1].startswith("/scripts/"):
                    name = command[1].removeprefix("/scripts/")
                    assert name in scripts, f"{pod.name}: {name}"
                    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
                    assert "/scripts" in mounts, pod.name
                    used.add(name)
    assert used == set(scripts)
    for text in scripts.values():
        ast.parse(text)


def own_scripts() -> set[str]:
    """What pods run of ours, with the task where a script has several."""
    jobs = [doc for doc in distinct().values() if doc["kind"] == "RayJob"]
    found = {shlex.split(job["spec"]["entrypoint"])[1] for job in jobs}
    for container in (container for pod in pods() for container in pod.containers()):
        for words in (container.get("command", []), *probes_and_hooks(container)):
            if words[:1] == ["python"]:
                tasks = [word for word in words[2:] if not word.startswith("-")]
                found.add(" ".join([words[1].rpartition("/")[2], *tasks]))
    return found


def test_every_script_that_a_pod_runs_is_known_to_be_run_by_a_test() -> None:
    assert own_scripts() == set(RUN_BY)
    assert all((Path(__file__).parent / f"{where}.py").exists() for where in RUN_BY.values())


def test_probes_name_ports_of_their_container() -> None:
    for pod in pods():
        for container in pod.containers():
            ports = {port["name"] for port in container.get("ports", ())}
            for key in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(key, {}).get("httpGet")
                assert probe is None or probe["port"] in ports, pod.name


def test_everything_lies_in_its_namespace() -> None:
    cluster_wide = {
        "Namespace",
        "PriorityClass",
        "ResourceFlavor",
        "ClusterQueue",
        "WorkloadPriorityClass",
    }
    for name, doc in distinct().items():
        namespace = doc["metadata"].get("namespace")
        assert namespace == (None if doc["kind"] in cluster_wide else "efficientdet"), name


def test_shared_annotations_lead_prometheus_to_every_node() -> None:
    for pod in pods():
        if pod.component == "ray":
            annotations = pod.template["metadata"]["annotations"]
            ports = {
                port["name"]: port["containerPort"]
                for port in pod.spec["containers"][0].get("ports", ())
            }
            assert annotations["prometheus.io/scrape"] == "true"
            assert int(annotations["prometheus.io/port"]) == ports["metrics"], pod.name
    for name, doc in distinct().items():
        spec = ray_spec(doc)
        if spec:
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                assert group["rayStartParams"]["metrics-export-port"] == "8080", name
