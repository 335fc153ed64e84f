"""The commands of the jobs and of the pods beside them, run in their own words.

Every RayJob with --dry-run, on as many CPUs and GPUs as its manifest gives it (Ray is told so, nothing
is computed on them) and on the data that the prefetch Jobs brought. Replaced are the folders that pods
mount, the address of COCO's archives, and pretrained weights, which would be downloaded.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
from helpers import ROOT, environment
from helpers.kube_rules import quantity
from helpers.manifests import (
    JOB_ROOTS,
    K8S,
    OVERLAYS,
    Doc,
    find,
    ray_spec,
    rayjob,
    rendered,
)

from model.data.shapes import ShapesConfig, ensure_shapes

pytestmark = pytest.mark.slow

SCRIPTS = K8S / "base" / "platform" / "scripts"
PREFETCH_ROOTS = ("base/prefetch", *(f"overlays/{overlay}/prefetch" for overlay in OVERLAYS))
ARCHIVES_HOST, ARCHIVES_BUCKET = "https://s3.amazonaws.com", "images.cocodataset.org"
BUCKETS = ("effdet-datasets", "effdet-checkpoints", ARCHIVES_BUCKET)
NO_DOWNLOAD = {"train": "model.pretrained=no", "tune": "train.model.pretrained=no"}
MOUNTED = re.compile(r"(?<![\w:/])/(?:scratch|cache)\b")
CLASSES = 80


def coco_archives(folder: Path) -> dict[str, Path]:
    """Archives as COCO's own are laid out, by their key, with more training images than one batch."""
    drawn = folder / "shapes"
    ensure_shapes(drawn, ShapesConfig(num_train=136, num_val=8, size_px=64))
    made = {}
    for name in ("train2017", "val2017"):
        made[f"zips/{name}.zip"] = folder / f"{name}.zip"
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for path in sorted((drawn / "images" / name.removesuffix("2017")).iterdir()):
                archive.write(path, f"{name}/{path.name}")
    annotations = "annotations/annotations_trainval2017.zip"
    made[annotations] = folder / "annotations.zip"
    with zipfile.ZipFile(made[annotations], "w") as archive:
        for path in sorted((drawn / "annotations").iterdir()):
            split = "train" if "train" in path.name else "val"
            content = json.loads(path.read_text())
            # Classes are a part of what a network costs, and a sweep may bound that.
            used = content["categories"]
            free = set(range(1, 91)) - {category["id"] for category in used}
            more = sorted(free)[: CLASSES - len(used)]
            content["categories"] = [*used, *({"id": n, "name": f"class {n}"} for n in more)]
            archive.writestr(f"annotations/instances_{split}2017.json", json.dumps(content))
    return made


@dataclass
class Bench:
    """Where commands run. done: what came of them by their words, so that equal ones run once."""

    endpoint: str
    folder: Path
    done: dict[tuple[str, ...], subprocess.CompletedProcess[str]] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """With the settings that pods share, but for those of a tracker and of pods' interfaces."""
        settings = dict(find(rendered()["base/platform"], "ConfigMap", "effdet-config")["data"])
        for name in ("MLFLOW_TRACKING_URI", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            del settings[name]
        env = environment(
            **settings, AWS_ENDPOINT_URL=self.endpoint, AWS_ACCESS_KEY_ID="test",
            AWS_SECRET_ACCESS_KEY="test", HOME=str(self.folder), OMP_NUM_THREADS="1",
            PYTHONPATH=str(ROOT),
        )  # fmt: skip
        env.pop("MLFLOW_TRACKING_URI", None)
        return env

    def run(self, words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=self.environment() | env,
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip

    def prefetch(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """A container's command and arguments."""
        python, script, *words = command
        assert python == "python"
        words = [word.replace(ARCHIVES_HOST, self.endpoint) for word in words]
        local = str(SCRIPTS / script.removeprefix("/scripts/"))
        if (key := tuple(command)) not in self.done:
            self.done[key] = self.run([local, *words], {})
        return self.done[key]

    def dry_run(
        self, command: list[str], cpus: float, gpus: float
    ) -> subprocess.CompletedProcess[str]:
        """A job's command, on a cluster of that size."""
        assert command[0] == "python"
        resources = json.dumps({"CPU": cpus, "GPU": gpus})
        if (key := (*command, resources)) not in self.done:
            # A folder of its own: what one run finds is not what another one left.
            here = str(self.folder / f"pod-{len(self.done)}")
            words = [MOUNTED.sub(lambda found: here + found[0], word) for word in command[1:]]
            words += ["--set", NO_DOWNLOAD[Path(command[1]).stem], "--dry-run", "--json"]
            # Ray would start an idle process for each CPU that it believes in.
            env = {"RAY_OVERRIDE_RESOURCES": resources, "RAY_prestart_worker_first_driver": "0"}
            self.done[key] = self.run(words, env)
        return self.done[key]


def would_start(done: subprocess.CompletedProcess[str], cpus: float, gpus: float) -> None:
    assert done.returncode == 0, f"{shlex.join(done.args)}\n{done.stdout}\n{done.stderr}"
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "dry run"
    text = re.sub(r"[\s│]+", " ", done.stdout)
    assert f"{cpus:g} CPUs, {gpus:g} GPUs" in text, "it saw another cluster than was meant"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """An S3 with the platform's buckets, still empty, and one that holds archives as COCO's does."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    made = Bench(f"http://{host}:{port}", tmp_path_factory.mktemp("bench"))
    client = boto3.client(
        "s3", endpoint_url=made.endpoint, aws_access_key_id="test", aws_secret_access_key="test",
        region_name="us-east-1",
    )  # fmt: skip
    for bucket in BUCKETS:
        client.create_bucket(Bucket=bucket)
    for key, path in coco_archives(made.folder).items():
        client.upload_file(str(path), ARCHIVES_BUCKET, key, ExtraArgs={"ACL": "public-read"})
    yield made
    server.stop()


def prefetch_command(root: str) -> list[str]:
    (job,) = rendered()[root]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]]


@pytest.fixture(scope="module")
def datasets(bench: Bench) -> Bench:
    """The buckets as the prefetch Jobs leave them."""
    for root in PREFETCH_ROOTS:
        done = bench.prefetch(prefetch_command(root))
        assert done.returncode == 0, f"{root}:\n{done.stdout}\n{done.stderr}"
    return bench


@pytest.mark.parametrize("root", PREFETCH_ROOTS)
def test_a_prefetch_job_brings_its_dataset(root: str, datasets: Bench) -> None:
    said = datasets.prefetch(prefetch_command(root)).stdout
    if "local" in root:
        assert "shapes: 963 files written to s3://effdet-datasets/shapes" in said
    else:
        copied = re.findall(r"(\w+)\.zip: (\d+) files copied to s3://effdet-datasets/coco, 0", said)
        assert copied == [("annotations_trainval2017", "2"), ("val2017", "8"), ("train2017", "136")]


def size(spec: Doc, replicas: int | None = None) -> tuple[float, float]:
    """(CPUs, GPUs) of a cluster's workers when it begins."""
    (group,) = spec["workerGroupSpecs"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    number = group["replicas"] if replicas is None else replicas
    gpus = quantity(requests.get("nvidia.com/gpu", 0))
    return number * quantity(requests["cpu"]), number * gpus


@pytest.mark.parametrize("root", JOB_ROOTS)
def test_an_entrypoint_runs(root: str, datasets: Bench) -> None:
    job = rayjob(root)
    cpus, gpus = size(job["spec"]["rayClusterSpec"])
    would_start(datasets.dry_run(shlex.split(job["spec"]["entrypoint"]), cpus, gpus), cpus, gpus)


def test_the_submission_in_the_readme_runs(datasets: Bench) -> None:
    """On the shared cluster, after it has made room for what was asked."""
    text = (K8S / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"ray job submit .* -- (python jobs/train\.py .*)", text)
    words = shlex.split(command)
    workers = int(words[words.index("--workers") + 1])
    spec = ray_spec(find(rendered()["overlays/gpu"], "RayCluster", "effdet-shared"))
    assert spec is not None
    cpus, gpus = size(spec, replicas=workers)
    would_start(datasets.dry_run(words, cpus, gpus), cpus, gpus)
