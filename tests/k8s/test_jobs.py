"""Jobs and clusters of Ray: what they run fits into them, and they live as long as they must."""

from __future__ import annotations

import re
import shlex

from helpers import ROOT
from helpers.kube_rules import quantity
from helpers.manifests import (
    OVERLAYS,
    Doc,
    distinct,
    find,
    named,
    pods,
    pods_of,
    ray_spec,
    rendered,
)

from orchestrator.config.cli import parse_train, train_parser
from orchestrator.config.schema import LaunchConfig, TrainJob
from orchestrator.config.sweep_cli import parse_tune
from orchestrator.search.config import decode_sweep

SAFE_ENTRYPOINT = re.compile(r"[\w./:=, -]+")


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


def workers_in_a_pod(launch: LaunchConfig, group: Doc) -> int:
    """GPUs are used where there are some, and are there where they are used."""
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    cpus, gpus = quantity(requests["cpu"]), quantity(requests.get("nvidia.com/gpu", 0))
    assert bool(gpus) == bool(launch.gpus_per_worker)
    found = int(cpus // (launch.cpus_per_worker or 1))
    if launch.gpus_per_worker:
        found = min(found, int(gpus // launch.gpus_per_worker))
    return found


def cache_fits(job: TrainJob, group: Doc) -> bool:
    """The dataset's copy into the volume that is mounted for it."""
    pod = group["template"]["spec"]
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    cache = volumes[mounts[str(job.data.cache.folder)]]
    return job.data.cache.limit_gib * 2**30 < quantity(cache["emptyDir"]["sizeLimit"])


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
        here = workers_in_a_pod(sweep.base.launch, group)
        assert sweep.trials.workers_per_trial <= here * group["minReplicas"], name
        assert cache_fits(sweep.base, group), name
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
        launch, pods_least, pods_most = job.launch, group["minReplicas"], group["maxReplicas"]
        per_pod = workers_in_a_pod(launch, group)
        # It is refused where the least is not there, and waits in vain for more than the most.
        assert launch.workers <= per_pod * pods_least, name
        assert (launch.max_workers or launch.workers) == per_pod * pods_most, name
        assert bool(launch.max_workers) == bool(
            doc["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")
        ), name
        assert cache_fits(job, group), name
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


def test_budgets_are_of_what_can_be_counted() -> None:
    """Kubernetes counts the pods of a RayCluster for no budget of a share: that would block every drain."""
    budgets = named(rendered()["base/platform"], "PodDisruptionBudget")
    for name, budget in budgets.items():
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        chosen = [pod for pod in pods() if wanted <= pod.labels.items()]
        assert chosen, name
        assert not [pod.name for pod in chosen if pod.kind in ("RayJob", "RayCluster")], name
