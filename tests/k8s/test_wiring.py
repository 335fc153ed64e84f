"""What manifests name exists: settings, secrets, volumes, ports, services, accounts, scripts, versions."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from helpers.kube_rules import quantity
from helpers.manifests import (
    JOBS,
    K8S,
    OVERLAYS,
    Doc,
    Pod,
    build,
    distinct,
    everything,
    find,
    pods,
    pods_of,
    ray_spec,
    rendered,
)

from orchestrator.config.cli import parse_train, train_parser
from orchestrator.config.schema import TrainJob
from orchestrator.config.sweep_cli import parse_tune
from orchestrator.search.config import decode_sweep

SAFE_ENTRYPOINT = re.compile(r"[\w./:=, -]+")
IN_EVERY_NAMESPACE = ("kube-root-ca.crt",)


def named(docs: list[Doc], kind: str) -> dict[str, Doc]:
    return {doc["metadata"]["name"]: doc for doc in docs if doc["kind"] == kind}


def secrets(text: str) -> dict[str, set[str]]:
    """Keys by name."""
    docs = [doc for doc in yaml.safe_load_all(text) if doc]
    return {doc["metadata"]["name"]: set(doc["stringData"]) for doc in docs}


EXAMPLE = secrets((K8S / "secrets" / "secrets.example.yaml").read_text())


def overlay_pods(overlay: str) -> list[Pod]:
    return [pod for doc in everything(overlay) for pod in pods_of(doc, overlay)]


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
            there = EXAMPLE.get(name) if kind == "Secret" else maps.get(name, {}).get("data")
            assert there, f"{pod.name}: {kind} {name}"
            assert key is None or key in there, f"{pod.name}: {kind} {name}, key {key}"
            checked += 1
    for doc in everything(overlay):
        redis = (ray_spec(doc) or {}).get("gcsFaultToleranceOptions")
        if redis:
            ref = redis["redisPassword"]["valueFrom"]["secretKeyRef"]
            assert ref["key"] in EXAMPLE[ref["name"]]
    assert checked > 20


def test_the_generator_makes_every_secret_that_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    script = ["bash", str(K8S / "secrets" / "generate.sh")]
    first, second = (
        subprocess.run(script, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert secrets(first) == EXAMPLE
    values = re.findall(r'(?:password|PASSWORD|secret-key): "(.*)"', first)
    assert len(set(values)) == len(values) == 5
    assert all(re.fullmatch(r"[\w-]{40,}", value) for value in values), "they go into URLs"
    assert not set(values) & set(re.findall(r'"(.*)"', second))


def test_no_secret_is_in_a_manifest() -> None:
    assert [name for name, doc in distinct().items() if doc["kind"] == "Secret"] == []
    for path in K8S.rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".yml", ".json"):
            values = re.findall(
                r"(?i)(?:password|secret-key|secret_access_key): (\S+)", path.read_text()
            )
            assert set(values) <= {"CHANGE-ME"}, path


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


def test_users_have_one_name() -> None:
    example = list(yaml.safe_load_all((K8S / "secrets" / "secrets.example.yaml").read_text()))
    client = next(doc for doc in example if doc["metadata"]["name"] == "mlflow-client")
    settings = find(rendered()["base/platform"], "ConfigMap", "mlflow-config")["data"]
    assert client["stringData"]["MLFLOW_TRACKING_USERNAME"] == settings["EFFDET_TRAINING_USERNAME"]


def variables(container: Doc, maps: dict[str, Doc]) -> set[str]:
    names = {env["name"] for env in container.get("env", ())}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            names |= set(maps[source["configMapRef"]["name"]]["data"])
        else:
            names |= EXAMPLE[source["secretRef"]["name"]]
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


def test_probes_name_ports_of_their_container() -> None:
    for pod in pods():
        for container in pod.containers():
            ports = {port["name"] for port in container.get("ports", ())}
            for key in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(key, {}).get("httpGet")
                assert probe is None or probe["port"] in ports, pod.name


def test_a_pod_has_time_for_what_it_does_before_its_end() -> None:
    checked = 0
    for pod in pods():
        for container in pod.containers():
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            if hook is None:
                continue
            seconds = float(hook[-1].rpartition("=")[2])
            # What remains is for SIGTERM and the last upload.
            assert seconds + 20 <= pod.spec["terminationGracePeriodSeconds"], pod.name
            checked += 1
    assert checked >= 10


def test_memory_volumes_fit_into_their_pods() -> None:
    for pod in pods():
        limit = sum(quantity(c["resources"]["limits"]["memory"]) for c in pod.spec["containers"])
        shared = [
            quantity(volume["emptyDir"]["sizeLimit"])
            for volume in pod.spec.get("volumes", ())
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
        assert sum(shared) <= limit / 2, pod.name
        if pod.component == "ray":
            assert shared, f"{pod.name}: /dev/shm"


def test_local_volumes_fit_into_ephemeral_storage() -> None:
    for pod in pods():
        if pod.component != "ray":
            continue
        sizes = [
            quantity(volume["emptyDir"]["sizeLimit"])
            for volume in pod.spec["volumes"]
            if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory"
        ]
        limit = quantity(pod.spec["containers"][0]["resources"]["limits"]["ephemeral-storage"])
        assert max(sizes) < limit, pod.name


def entrypoints() -> dict[str, list[str]]:
    return {
        name: shlex.split(doc["spec"]["entrypoint"])
        for name, doc in distinct().items()
        if doc["kind"] == "RayJob"
    }


def test_entrypoints_name_scripts_and_files_that_exist() -> None:
    found = entrypoints()
    assert len(found) >= 8
    for name, words in found.items():
        assert SAFE_ENTRYPOINT.fullmatch(" ".join(words)), f"{name}: the shell would read it anew"
        assert words[0] == "python", name
        assert (ROOT / words[1]).is_file(), name
        if "--config" in words:
            assert (ROOT / words[words.index("--config") + 1]).is_file(), name


def test_sweeps_parse_and_fit_into_their_clusters() -> None:
    checked = 0
    for name, doc in distinct().items():
        if doc["kind"] != "RayJob" or "tune.py" not in doc["spec"]["entrypoint"]:
            continue
        words = shlex.split(doc["spec"]["entrypoint"])
        request, _ = parse_tune(
            "", [str(ROOT / w) if w.startswith("jobs/") else w for w in words[2:]]
        )
        sweep = decode_sweep(request.mapping, folder=request.folder, name=request.name)
        (group,) = doc["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        each = quantity(requests.get("nvidia.com/gpu", requests["cpu"]))
        assert sweep.trials.workers_per_trial <= each * group["minReplicas"], name
        assert sweep.base.data.cache.folder == "/cache", name
        assert sweep.base.run.output.startswith("/scratch/"), name
        assert str(sweep.base.checkpoint.uri).startswith("s3://"), name
        checked += 1
    assert checked >= 4


def training(words: list[str]) -> TrainJob:
    job, _ = parse_train(train_parser("jobs/train.py", ""), words[2:])
    return job


def test_trainings_fit_into_their_clusters() -> None:
    checked = 0
    for name, doc in distinct().items():
        if doc["kind"] != "RayJob" or "train.py" not in doc["spec"]["entrypoint"]:
            continue
        job = training(shlex.split(doc["spec"]["entrypoint"]))
        (group,) = doc["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        container = group["template"]["spec"]["containers"][0]
        requests = container["resources"]["requests"]
        launch, pods_least, pods_most = job.launch, group["minReplicas"], group["maxReplicas"]
        cpus, gpus = quantity(requests["cpu"]), quantity(requests.get("nvidia.com/gpu", 0))
        per_pod = int(cpus // (launch.cpus_per_worker or 1))
        if launch.gpus_per_worker:
            per_pod = min(per_pod, int(gpus // launch.gpus_per_worker))
        assert bool(gpus) == bool(launch.gpus_per_worker), f"{name}: GPUs that nobody uses"
        # It is refused where the least is not there, and waits in vain for more than the most.
        assert launch.workers <= per_pod * pods_least, name
        assert (launch.max_workers or launch.workers) == per_pod * pods_most, name
        assert bool(launch.max_workers) == bool(
            doc["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")
        ), name
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        cache = volumes[mounts[str(job.data.cache.folder)]]
        assert job.data.cache.limit_gib * 2**30 < quantity(cache["emptyDir"]["sizeLimit"]), name
        assert job.run.output.startswith("/scratch/"), name
        assert job.run.name, "a fixed name: a new cluster continues the run"
        assert str(job.checkpoint.uri).startswith("s3://"), "the pods' disks go with them"
        checked += 1
    assert checked >= 4


def test_a_job_lives_as_long_as_it_must_and_no_longer() -> None:
    for name, doc in distinct().items():
        if doc["kind"] == "RayJob":
            spec = doc["spec"]
            assert spec["shutdownAfterJobFinishes"], name
            assert spec["ttlSecondsAfterFinished"] > 0, name
            assert spec["backoffLimit"] >= 1, name
            assert spec["activeDeadlineSeconds"] > 0, name
        if doc["kind"] == "Job":
            assert doc["spec"]["ttlSecondsAfterFinished"] > 0, name
            assert doc["spec"]["activeDeadlineSeconds"] > 0, name
        if doc["kind"] == "CronJob":
            assert doc["spec"]["concurrencyPolicy"] == "Forbid", name
            assert "TZ=" not in doc["spec"]["schedule"], name


def test_tokens_guard_every_cluster() -> None:
    specs = {name: ray_spec(doc) for name, doc in distinct().items() if ray_spec(doc)}
    for name, spec in specs.items():
        assert spec is not None
        assert spec["authOptions"] == {"mode": "token"}, name
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name


def test_the_shared_cluster_scales_from_zero_and_survives_its_head() -> None:
    for overlay in OVERLAYS:
        spec = find(rendered()[f"overlays/{overlay}"], "RayCluster", "effdet-shared")["spec"]
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0]
        assert "gcsFaultToleranceOptions" in spec


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


def test_jobs_wait_in_a_queue_that_could_ever_hold_them() -> None:
    docs = everything("kueue")
    (queue,) = [doc for doc in docs if doc["kind"] == "ClusterQueue"]
    local = named(docs, "LocalQueue")
    (group,) = queue["spec"]["resourceGroups"]
    flavors = {flavor["name"]: flavor for flavor in group["flavors"]}
    assert set(flavors) == set(named(docs, "ResourceFlavor"))
    for name in JOBS:
        (job,) = rendered()[f"overlays/kueue/{name}"]
        labels = job["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] in local
        assert labels["kueue.x-k8s.io/priority-class"] in named(docs, "WorkloadPriorityClass")
        assert "suspend" not in job["spec"], "to apply a running job again would stop it"
        assert not job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")
        for pod in pods_of(job):
            flavor = flavors["effdet-gpu" if pod.role.startswith("worker") else "effdet-cpu"]
            quota = {item["name"]: quantity(item["nominalQuota"]) for item in flavor["resources"]}
            (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            number = workers["replicas"] if pod.role.startswith("worker") else 1
            for container in pod.spec["containers"]:
                for resource, amount in container["resources"]["requests"].items():
                    assert resource in group["coveredResources"], f"{pod.name}: {resource}"
                    assert number * quantity(amount) <= quota[resource], f"{pod.name}: {resource}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_platform_and_a_job_fit_into_the_quota(overlay: str) -> None:
    docs = everything(overlay)
    hard = find(docs, "ResourceQuota", "effdet")["spec"]["hard"]
    used: dict[str, float] = {}
    for doc in docs:
        if doc["kind"] in ("CronJob", "Job"):
            continue
        for pod in pods_of(doc):
            number = doc["spec"].get("replicas", 1)
            if pod.role.startswith("worker"):
                (group,) = (ray_spec(doc) or {})["workerGroupSpecs"]
                number = group["maxReplicas"]
            for container in pod.spec["containers"]:
                for resource, amount in container["resources"]["requests"].items():
                    key = f"requests.{resource}"
                    used[key] = used.get(key, 0.0) + number * quantity(amount)
    assert {key: value for key, value in used.items() if value > quantity(hard[key])} == {}


def test_heads_stay_while_workers_come_and_go() -> None:
    for root in ("overlays/spot", "overlays/spot/train", "overlays/spot/sweep"):
        for doc in rendered()[root]:
            for pod in pods_of(doc) if ray_spec(doc) else ():
                if pod.role.startswith("worker"):
                    assert pod.spec["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
                    keys = {toleration["key"] for toleration in pod.spec["tolerations"]}
                    assert keys == {"nvidia.com/gpu", "karpenter.sh/capacity-type"}
                elif pod.role == "head":
                    text = str(pod.spec["affinity"]["nodeAffinity"])
                    assert "on-demand" in text
                    assert "spot" not in text


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
    if component == "nvme":
        spec = find(docs, "RayCluster", "effdet-shared")["spec"]["workerGroupSpecs"][0]
        (cache,) = [v for v in spec["template"]["spec"]["volumes"] if v["name"] == "cache"]
        assert cache["ephemeral"]["volumeClaimTemplate"]["spec"]["storageClassName"] == "local-nvme"
    else:
        assert "postgres" not in named(docs, "StatefulSet") | named(docs, "Service")
        assert "postgres" not in named(docs, "NetworkPolicy")


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


def test_budgets_are_of_what_can_be_counted() -> None:
    """Kubernetes counts the pods of a RayCluster for no budget of a share: that would block every drain."""
    budgets = named(rendered()["base/platform"], "PodDisruptionBudget")
    for name, budget in budgets.items():
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        chosen = [pod for pod in pods() if wanted <= pod.labels.items()]
        assert chosen, name
        assert not [pod.name for pod in chosen if pod.kind in ("RayJob", "RayCluster")], name


def test_queued_jobs_and_the_shared_cluster_fit_into_the_quota() -> None:
    docs = rendered()["overlays/kueue"]
    (queue,) = [doc for doc in docs if doc["kind"] == "ClusterQueue"]
    queued = sum(
        quantity(resource["nominalQuota"])
        for flavor in queue["spec"]["resourceGroups"][0]["flavors"]
        for resource in flavor["resources"]
        if resource["name"] == "nvidia.com/gpu"
    )
    cluster = find(docs, "RayCluster", "effdet-shared")["spec"]
    shared = sum(
        group["maxReplicas"]
        * quantity(
            group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        )
        for group in cluster["workerGroupSpecs"]
    )
    quota = find(docs, "ResourceQuota", "effdet")["spec"]["hard"]
    assert queued + shared <= quantity(quota["requests.nvidia.com/gpu"])


def test_the_local_overlay_fits_into_16_gib() -> None:
    """Platform and one training, a GiB left for Kubernetes itself and KubeRay."""
    total = 0.0
    for doc in [*rendered()["overlays/local"], *rendered()["overlays/local/train"]]:
        for pod in pods_of(doc):
            if doc["kind"] in ("Job", "CronJob"):
                continue
            number = doc["spec"].get("replicas", 1)
            if pod.role.startswith("worker"):
                number = ray_spec(doc)["workerGroupSpecs"][0]["replicas"]
            running = sum(
                quantity(container["resources"]["requests"]["memory"])
                for container in pod.spec["containers"]
            )
            first = max(
                (quantity(container["resources"]["requests"]["memory"])
                 for container in pod.spec.get("initContainers", ())), default=0,
            )  # fmt: skip
            total += number * max(running, first)
    assert total <= 15 * 2**30, f"{total / 2**30:.1f} GiB"
