"""What k8s/README.md says is so."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT
from helpers.kube_rules import quantity
from helpers.manifests import K8S, find, pods_of, rendered

from model.data.sampler import default_group_size
from model.network.footprint import GIB, activations, network_cost
from model.network.scaling import ModelConfig, resolve
from orchestrator.launch.preflight import BASE_BYTES, COPIES_IN_CHECKPOINT, COPIES_OF_WEIGHTS

README = (K8S / "README.md").read_text()
CLASSES, BATCH = 80, 128
USABLE_GIB = {"24 GB": 22.0, "80 GB": 79.0}  # of such a GPU
SLACK = 0.97


def test_ten_commands_lead_to_the_first_run() -> None:
    block = README.split("```bash\n")[1].split("```")[0]
    commands = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(commands) == 10
    for path in re.findall(r"(?<![\w/.])k8s/[\w/.-]+", block):
        assert (ROOT / path).exists(), path
    tags = {
        container["image"]
        for root in ("overlays/local", "overlays/local/train", "overlays/local/prefetch")
        for doc in rendered()[root]
        for pod in pods_of(doc)
        for container in pod.containers()
        if "effdet" in container["image"]
    }
    assert tags == set(re.findall(r"-t (\S+)", block)), "what is built is what is used"
    for kind, name in re.findall(r"wait (deploy|job|rayjob)/(\S+)", block):
        full = {"deploy": "Deployment", "job": "Job", "rayjob": "RayJob"}[kind]
        docs = [doc for part in rendered().values() for doc in part]
        assert [d for d in docs if d["kind"] == full and d["metadata"]["name"] == name]


def test_folders_and_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:components|overlays|base|secrets)/[\w./-]+)`", README):
        assert (K8S / name).exists(), name
    for name in re.findall(r"`(tests/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
    listed = set(re.findall(r"^\| `(\w+)` \| ", README, re.MULTILINE))
    assert {path.name for path in (K8S / "overlays").iterdir()} <= listed


@pytest.mark.integration
@pytest.mark.parametrize("phi", ["0", "1", "2", "3", "4", "5", "6", "7", "7x"])
def test_sizes_are_those_that_preflight_estimates(phi: str) -> None:
    (row,) = re.findall(rf"^\| {phi} \|(.*)\|$", README, re.MULTILINE)
    fixed, each, again, group, small, large, gpus, checkpoint = (
        cell.strip() for cell in row.split("|")
    )
    spec = resolve(ModelConfig(phi=phi), CLASSES)  # type: ignore[arg-type]
    params = network_cost(spec).params
    traced = activations(spec, half_precision=True)
    needed = (params * 4 * COPIES_OF_WEIGHTS + BASE_BYTES) / GIB
    kept, recomputed = (traced.total(recompute=way) / GIB for way in (False, True))
    assert float(fixed) == pytest.approx(needed, abs=0.06)
    assert float(each) == pytest.approx(kept, abs=0.01)
    assert float(again) == pytest.approx(recomputed, abs=0.01)
    assert int(group) == default_group_size(BATCH, phi)
    for text, gpu in ((small, "24 GB"), (large, "80 GB")):
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        room = USABLE_GIB[gpu] * SLACK - needed
        expected = [room // kept, room // recomputed][: len(numbers)]
        assert numbers == [int(number) for number in expected], gpu
    (most,) = {int(number) for number in re.findall(r"^\d+", large)}
    shares = [n for n in range(1, BATCH + 1) if (BATCH // int(group)) % n == 0]
    assert int(gpus) == next(n for n in shares if BATCH // n <= most)
    assert int(checkpoint) == pytest.approx(params * 4 * COPIES_IN_CHECKPOINT / 2**20, abs=1)


def test_the_platforms_idle_cost_is_as_said() -> None:
    (cpus, memory) = map(int, re.findall(r"about (\d+) CPUs and (\d+) GiB", README)[0])
    used = {"cpu": 0.0, "memory": 0.0}
    for doc in rendered()["overlays/gpu"]:
        if doc["kind"] in ("Deployment", "StatefulSet", "RayCluster"):
            for pod in pods_of(doc):
                if pod.role.startswith("worker"):
                    continue
                for container in pod.spec["containers"]:
                    for key in used:
                        amount = quantity(container["resources"]["requests"][key])
                        used[key] += amount * doc["spec"].get("replicas", 1)
    assert used["cpu"] == pytest.approx(cpus, abs=0.5)
    assert used["memory"] / GIB == pytest.approx(memory, abs=1)


def test_periods_are_as_said() -> None:
    train = find(rendered()["overlays/gpu/train"], "RayJob", "effdet-train")["spec"]
    assert train["ttlSecondsAfterFinished"] == 120
    cluster = find(rendered()["overlays/gpu"], "RayCluster", "effdet-shared")["spec"]
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 600
    retention = find(rendered()["overlays/gpu"], "CronJob", "checkpoint-retention")
    (pod,) = pods_of(retention)
    assert {"--finished-days=30", "--orphan-days=90"} <= set(pod.containers()[0]["args"])
