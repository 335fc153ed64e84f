"""Amounts: volumes fit into their pods, pods into quotas and queues."""

from __future__ import annotations

import re
import shlex

import pytest
from helpers.kube_rules import bad_volumes, quantity
from helpers.manifests import (
    JOBS,
    OVERLAYS,
    Doc,
    Pod,
    everything,
    find,
    named,
    pods,
    pods_of,
    ray_spec,
    rayjob,
    rendered,
)

from model.data.sampler import default_group_size, plan_batch
from model.network.footprint import GIB, activations, network_cost
from model.network.scaling import resolve
from orchestrator.config.cli import parse_train, train_parser
from orchestrator.config.schema import TrainJob
from orchestrator.config.sweep_cli import parse_tune
from orchestrator.launch.preflight import BASE_BYTES, COPIES_OF_WEIGHTS
from orchestrator.search.config import decode_sweep

CLASSES = 80
ON_CPUS = ("base/train", "base/sweep", "overlays/local/train", "overlays/local/sweep")
GIB_PER_GPU = 32  # of the host: loaders and the driver's side of CUDA; README, Sizes
# 1.24 measured: Ray's own processes with a dashboard, and the driver of a sweep.
HEAD_GIB = 1.5
TRACKER_WORKER_GIB, TRACKER_GIB = 0.2, 0.2


def test_volumes_fit_into_their_pods() -> None:
    assert {pod.name: bad_volumes(pod.spec) for pod in pods() if bad_volumes(pod.spec)} == {}
    for pod in pods():
        if pod.component == "ray":
            shared = [v for v in pod.spec["volumes"] if v.get("emptyDir", {}).get("medium")]
            assert [v["name"] for v in shared] == ["shm"], f"{pod.name}: /dev/shm"


def pod_with(volumes: list[Doc], limits: Doc) -> Doc:
    mounts = [{"name": volume["name"], "mountPath": f"/{volume['name']}"} for volume in volumes]
    container = {"name": "c", "resources": {"limits": limits}, "volumeMounts": mounts}
    return {"containers": [container], "volumes": volumes}


@pytest.mark.parametrize(
    ("sizes", "medium", "limits", "well"),
    [
        (["1Gi", "1Gi"], "Memory", {"memory": "4Gi"}, True),
        (["3Gi", "2Gi"], "Memory", {"memory": "4Gi"}, False),
        (["1Gi", "2Gi"], "", {"memory": "1Gi", "ephemeral-storage": "3Gi"}, True),
        (["2Gi", "2Gi"], "", {"memory": "1Gi", "ephemeral-storage": "3Gi"}, False),
        (["2Gi", "2Gi"], "", {"memory": "1Gi"}, True),
        ([None], "", {"memory": "1Gi"}, False),
    ],
)
def test_volumes_that_do_not_fit_are_found(
    sizes: list[str | None], medium: str, limits: Doc, well: bool
) -> None:
    volumes: list[Doc] = [
        {
            "name": f"v{number}",
            "emptyDir": {"medium": medium} | ({"sizeLimit": size} if size else {}),
        }
        for number, size in enumerate(sizes)
    ]
    assert (bad_volumes(pod_with(volumes, limits)) == []) is well


def in_memory(pod: Pod, container: Doc) -> float:
    """Bytes of what the container may write into memory-backed volumes: they count as its own."""
    mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
    return sum(
        quantity(volume["emptyDir"]["sizeLimit"])
        for volume in pod.spec.get("volumes", ())
        if volume["name"] in mounted and volume.get("emptyDir", {}).get("medium") == "Memory"
    )


def needed(container: Doc) -> float:
    """Bytes of the processes themselves, without what they write into volumes; 0 where none is known."""
    gpus = quantity(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    if gpus:
        return gpus * GIB_PER_GPU * GIB
    if container["name"] == "ray-head":
        return HEAD_GIB * GIB
    words = " ".join(container.get("args", ()))
    if container["name"] == "postgres":
        (shared,) = re.findall(r"shared_buffers=(\d+)MB", words)
        return float(shared) * 2**20
    if container["name"] == "mlflow":
        (workers,) = re.findall(r"--workers=(\d+)", words)
        return (TRACKER_GIB + float(workers) * TRACKER_WORKER_GIB) * GIB
    return 0.0


def test_memory_is_enough_with_volumes_full() -> None:
    checked = 0
    for pod in pods():
        for container in pod.spec["containers"]:
            limit = quantity(container["resources"]["limits"]["memory"])
            assert in_memory(pod, container) + needed(container) <= limit, pod.name
            checked += needed(container) > 0
    assert checked >= 20


def test_ray_keeps_its_objects_in_half_of_shared_memory_at_most() -> None:
    for root, docs in rendered().items():
        for spec in filter(None, map(ray_spec, docs)):
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                store = float(group["rayStartParams"]["object-store-memory"])
                (shm,) = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
                assert store <= quantity(shm["emptyDir"]["sizeLimit"]) / 2, root


def trained_by(job: Doc) -> tuple[TrainJob, int]:
    """(what one training of it is, on how many workers)."""
    words = shlex.split(job["spec"]["entrypoint"])
    if "train.py" in words[1]:
        found, _ = parse_train(train_parser("jobs/train.py", ""), words[2:])
        return found, found.launch.workers
    request, _ = parse_tune("", words[2:])
    sweep = decode_sweep(request.mapping, folder=request.folder, name=request.name)
    return sweep.base, sweep.trials.workers_per_trial


@pytest.mark.integration
@pytest.mark.parametrize("root", ON_CPUS)
def test_a_workers_share_of_the_batch_fits_beside_shared_memory(root: str) -> None:
    """A GPU has memory of its own, which preflight looks at when it is there."""
    job = rayjob(root)
    (worker,) = [pod for pod in pods_of(job, root) if pod.role.startswith("worker")]
    (container,) = worker.spec["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    config, workers = trained_by(job)
    spec = resolve(config.model, CLASSES)
    group = config.train.bn_group or default_group_size(config.train.batch_size, config.model.phi)
    images = plan_batch(config.train.batch_size, group, workers).images_at_once()
    half = config.train.precision == "bf16"
    recompute = config.train.checkpoint_activations == "yes"
    saved = activations(spec, half_precision=half).total(recompute=recompute) * images
    fixed = network_cost(spec).params * 4 * COPIES_OF_WEIGHTS + BASE_BYTES
    there = quantity(container["resources"]["limits"]["memory"]) - in_memory(worker, container)
    requests = container["resources"]["requests"]
    at_once = int(quantity(requests["cpu"]) // (config.launch.cpus_per_worker or 1))
    assert at_once * (fixed + saved) <= there, f"{(fixed + saved) / GIB:.1f} GiB each"


def test_jobs_wait_in_a_queue_that_could_ever_hold_them() -> None:
    docs = everything("kueue")
    (queue,) = [doc for doc in docs if doc["kind"] == "ClusterQueue"]
    local = named(docs, "LocalQueue")
    (group,) = queue["spec"]["resourceGroups"]
    flavors = {flavor["name"]: flavor for flavor in group["flavors"]}
    assert set(flavors) == set(named(docs, "ResourceFlavor"))
    for name in JOBS:
        job = rayjob(f"overlays/kueue/{name}")
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
