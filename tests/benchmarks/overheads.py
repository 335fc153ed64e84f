"""What safety costs, measured side by side: python tests/benchmarks/overheads.py CASE [CASE ...]

    ray         step time under Ray Train against torchrun, 1 worker and 2
    checkpoint  step time with a checkpoint every 50 steps against the steps between
    kill        from kill -9 of a worker to the next training step
    node        from the loss of a node to the next training step (needs network namespaces)
    s3          images a second from S3 with a warm cache against the local folder

Medians; where two things are compared they take turns in one run of this program.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers import ROOT, Done, settings, train  # noqa: E402
from helpers.jobs import Job  # noqa: E402

ROUNDS = 3
# Large enough a network for a step to take what it takes in earnest, not what Python takes.
REAL = {
    "data__shapes__num_train": 64,
    "data__shapes__size_px": 256,
    "model__image_size_px": 256,
    "model__backbone": "efficientnet_b0",
    "model__fpn_channels": 64,
    "model__fpn_repeats": 3,
    "model__head_layers": 3,
    "model__max_level": 7,
    "model__pretrained": "no",
    "train__checkpoint_every": "{steps: 100000}",
}


def step_seconds(done: Done, skip: int = 5) -> list[float]:
    """Of each step but the first ones."""
    assert done.code == 0, done.out + done.err
    return [value for step, value in done.history("perf/step_s") if step > skip]


def compare_ray(folder: Path) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for workers in (1, 2):
        common = [
            *settings(**REAL, train__batch_size=4, launch__threads_per_worker=1), "--steps", "40",
            "--workers", str(workers), "--set", "train.bn_group=2",
        ]  # fmt: skip
        seconds: dict[str, list[float]] = {"ray": [], "torchrun": []}
        for turn in range(ROUNDS):
            for name in seconds:
                output = folder / f"{name}{workers}-{turn}"
                output.mkdir()
                local = ["--launcher", "local"] if name == "torchrun" else []
                done = train(
                    output, *common, *local, torchrun=workers if local else 0, timeout_s=900
                )
                seconds[name] += step_seconds(done)
        ray, torchrun = (statistics.median(seconds[name]) for name in ("ray", "torchrun"))
        ratios |= {f"ray_step_s_{workers}": ray, f"torchrun_step_s_{workers}": torchrun}
        ratios[f"ray_over_torchrun_{workers}"] = ray / torchrun
    return ratios


def checkpoint_cost(folder: Path) -> dict[str, float]:
    """Steps while a checkpoint is written beside them, and the loop's own stop for the copy."""
    every, total = 50, 400
    output = folder / "checkpoint"
    output.mkdir()
    done = train(
        output, *settings(**REAL | {"train__checkpoint_every": f"{{steps: {every}}}"}, train__batch_size=4),
        "--steps", str(total), "--launcher", "local", timeout_s=1800,
    )  # fmt: skip
    steps = dict(done.history("perf/step_s"))
    blocked = [value for _, value in done.history("perf/checkpoint_blocked_s")]
    writing = [value for _, value in done.history("perf/checkpoint_s")]
    median = statistics.median(steps.values())
    # The first steps after a save run beside its writing; the same number before the next do not.
    beside = -(-max(writing) // median)
    near, far = [], []
    for step, value in steps.items():
        since = (step - 1) % every
        if every < step and since < beside:
            near.append(value)
        elif every < step and since >= every - beside:
            far.append(value)
    slower = (statistics.median(near) - statistics.median(far)) * beside
    return {
        "step_s": median,
        "blocked_s": statistics.median(blocked),
        "written_in_s": statistics.median(writing),
        "steps_beside_writing": beside,
        "cost_share": (statistics.median(blocked) + max(0.0, slower)) / (every * median),
    }


def kill_to_step(folder: Path) -> dict[str, float]:
    took = []
    for turn in range(ROUNDS):
        job = Job(folder / f"kill{turn}", *settings(), "--steps", "2000")
        job.wait_for(lambda job=job: job.step() > 20)  # type: ignore[misc]
        killed = time.time()
        os.kill(job.workers()[0], signal.SIGKILL)
        done = job.finish(600)
        took.append(next_step_after(done, killed) - killed)
    return {"kill_to_step_s": statistics.median(took), "worst_s": max(took)}


def next_step_after(done: Done, moment: float) -> float:
    """When the first step was logged by the group of workers that came after `moment`."""
    from mlflow.tracking import MlflowClient

    assert done.code == 0, done.out
    client = MlflowClient(done.report["tracking_uri"])
    found = client.get_metric_history(done.report["run_id"], "train/loss")
    times = sorted(metric.timestamp / 1000 for metric in found)
    # The old group's last steps may be logged in the moment of the kill itself.
    gaps = [(b - a, b) for a, b in itertools.pairwise(times) if b > moment]
    return max(gaps)[1]


def node_to_step(folder: Path) -> dict[str, float]:
    from helpers import hosts

    reason = hosts.why_not()
    if reason:
        print(f"node: {reason}")
        return {}
    took = []
    for turn in range(ROUNDS):
        own = folder / f"node{turn}"
        (own / "out").mkdir(parents=True)
        with hosts.network(own) as network:
            network.add()
            network.add()
            arguments = [
                *settings(launch__threads_per_worker=1, train__bn_group=4), "--steps", "1500",
                "--workers", "1:2", "--output", str(own / "out"),
                "--set", f"checkpoint.uri={own}/out/checkpoints", "--json",
            ]  # fmt: skip
            log = own / "log"
            driver = network.driver(
                sys.executable, str(ROOT / "jobs" / "train.py"), *arguments, log=log
            )
            while not list(own.glob("out/checkpoints/*/step_0000005?/meta.json")):
                assert driver.poll() is None, log.read_text()
                time.sleep(0.02)
            killed = time.time()
            network.hosts[1].kill()
            driver.wait(600)
        done = Done(driver.returncode, log.read_text(), "")
        took.append(next_step_after(done, killed) - killed)
    return {"node_to_step_s": statistics.median(took), "worst_s": max(took)}


def s3_against_local(folder: Path) -> dict[str, float]:
    import boto3
    from moto.server import ThreadedMotoServer

    from model.data.shapes import ShapesConfig, ensure_shapes

    data = folder / "shapes"
    ensure_shapes(data, ShapesConfig(num_train=64, num_val=8, size_px=256))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="key",
        aws_secret_access_key="secret", region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket="data")
    for file in data.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "data", f"shapes/{file.relative_to(data)}")
    speeds: dict[str, list[float]] = {"local": [], "s3": []}
    for turn in range(ROUNDS + 1):
        for name, root in (("local", str(data)), ("s3", "s3://data/shapes")):
            output = folder / f"{name}-{turn}"
            output.mkdir()
            done = train(
                output, *settings(**REAL, train__batch_size=4), "--steps", "40", "--data", root,
                "--set", f"data.cache.folder={folder}/cache", "--launcher", "local",
                timeout_s=900, **env,
            )  # fmt: skip
            if turn:  # the first one fills the cache
                speeds[name] += [4 / seconds for seconds in step_seconds(done)]
    server.stop()
    local, s3 = (statistics.median(speeds[name]) for name in ("local", "s3"))
    return {"local_img_per_s": local, "s3_img_per_s": s3, "s3_over_local": s3 / local}


CASES = {
    "ray": compare_ray,
    "checkpoint": checkpoint_cost,
    "kill": kill_to_step,
    "node": node_to_step,
    "s3": s3_against_local,
}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        folder = Path(tempfile.mkdtemp(prefix=f"overheads-{name}-"))
        try:
            figures = CASES[name](folder)
            print(json.dumps({name: {k: round(v, 4) for k, v in figures.items()}}), flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
