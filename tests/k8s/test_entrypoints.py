"""The commands of the jobs, run: their own words with --dry-run, on data in the buckets they name."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from helpers import ROOT, environment
from helpers.manifests import K8S, find, rendered

from model.data.shapes import ShapesConfig, ensure_shapes

pytestmark = pytest.mark.slow

BUCKETS = ("effdet-datasets", "effdet-checkpoints")
# What this machine has instead of the cluster; the rest is as written.
HERE = {
    "train": ["--workers", "1", "--gpus-per-worker", "0", "--cpus-per-worker", "1", "--pretrained", "no",
              "--batch-size", "4", "--image-size", "128", "--set", "train.bn_group=4",
              "--set", "data.check=none"],
    "tune": ["--workers", "1", "--set", "train.train.batch_size=4", "--set", "train.train.bn_group=4", "--set", "train.launch.gpus_per_worker=0",
             "--set", "train.launch.cpus_per_worker=1", "--set", "train.model.pretrained=\"no\"",
             "--set", "train.data.check=none"],
}  # fmt: skip
CACHE = {"train": "data.cache.folder", "tune": "train.data.cache.folder"}


# The other overlays' commands differ from these in numbers only; all are parsed by test_wiring.py.
RUN = ("overlays/local/train", "overlays/spot/train", "overlays/local/sweep", "overlays/gpu/sweep")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment with an S3 that has the datasets."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="test",
        aws_secret_access_key="test", region_name="us-east-1",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("data") / "shapes"
    ensure_shapes(folder, ShapesConfig(num_train=24, num_val=6, size_px=64))
    for bucket in BUCKETS:
        client.create_bucket(Bucket=bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            for name in ("coco", "shapes"):
                client.upload_file(
                    str(path), BUCKETS[0], f"{name}/{path.relative_to(folder).as_posix()}"
                )
    yield env
    server.stop()


@pytest.mark.parametrize("root", RUN)
def test_an_entrypoint_runs(root: str, s3: dict[str, str], tmp_path: Path) -> None:
    (job,) = rendered()[root]
    words = shlex.split(job["spec"]["entrypoint"])
    script = words[1]
    if not (ROOT / script).exists():
        pytest.skip(f"{script} is not there")
    kind = Path(script).stem
    here = [
        *HERE[kind], "--output", str(tmp_path / "runs"),
        "--set", f"{CACHE[kind]}={tmp_path / 'cache'}", "--dry-run", "--json",
    ]  # fmt: skip
    env = environment(**s3, HOME=str(tmp_path), OMP_NUM_THREADS="1")
    env.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, *words[1:], *here],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{root}:\n{done.stdout}\n{done.stderr}"
    assert '"status": "dry run"' in done.stdout.splitlines()[-1]


def test_the_local_dataset_is_what_prefetch_draws() -> None:
    (prefetch,) = rendered()["overlays/local/prefetch"]
    train = find(rendered()["overlays/local/train"], "RayJob", "effdet-train")["spec"]["entrypoint"]
    (container,) = prefetch["spec"]["template"]["spec"]["containers"]
    (target,) = [arg for arg in container["args"] if arg.startswith("--to=")]
    words = shlex.split(train)
    assert words[words.index("--data") + 1] == target.removeprefix("--to=")
    assert (K8S / "base" / "platform" / "scripts" / "prefetch.py").exists()
