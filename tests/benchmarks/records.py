"""What recording costs training: python tests/benchmarks/records.py CASE [CASE ...]

    cost      microseconds of the training thread for each logged step, beside a working sender
    outages   step time and time to the end with a tracker that is killed, hangs, fails or is absent

Medians; the outages take turns with a tracker that works, in one run of this program.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers import settings  # noqa: E402
from helpers.faulty import FaultyProxy  # noqa: E402
from helpers.jobs import Job  # noqa: E402
from helpers.mlflow_server import MlflowServer  # noqa: E402

from orchestrator.launch.interruptions import Interruptions  # noqa: E402  # before Ray: it sets its defaults
from orchestrator.launch.mailbox import RemoteBoard, mailbox  # noqa: E402
from orchestrator.records.journal import metrics_record  # noqa: E402
from orchestrator.records.run import new_run  # noqa: E402
from orchestrator.records.sender import Sender  # noqa: E402
from orchestrator.records.spool import Spool  # noqa: E402

import ray  # noqa: E402  # isort: skip

ROUNDS, LOGGED, PAUSE_S, STEPS = 3, 3000, 0.003, 400
STEP = {
    f"{group}/{name}": 0.123456789
    for group, names in {
        "train": ("loss", "loss_classes", "loss_boxes", "positives", "grad_norm", "lr", "epoch"),
        "perf": (
            "img_per_s",
            "step_s",
            "step_s_p50",
            "step_s_p95",
            "data_wait_share",
            "memory_gib",
        ),
    }.items()
    for name in names
}


def percentiles(seconds: list[float]) -> dict[str, float]:
    micro = sorted(1e6 * value for value in seconds)
    return {"median_us": statistics.median(micro), "p99_us": micro[int(0.99 * len(micro))]}


def cost(folder: Path) -> dict[str, float]:
    """The record as rank 0 makes and spools it; and with Ray's board, which tells the driver."""
    found = {}
    with MlflowServer(folder / "mlflow") as server:
        run = new_run(server.uri, "benchmark", None, "cost", "cost")
        sender = Sender(run, Spool(folder / "records" / "rank0.jsonl"), creates=True)

        def spool(step: int, metrics: Mapping[str, float]) -> None:
            sender.log(metrics_record(step, metrics))

        taken = []
        for step in range(LOGGED):
            began = time.perf_counter()
            spool(step, STEP)
            taken.append(time.perf_counter() - began)
            time.sleep(PAUSE_S)
        found |= {f"record_{key}": value for key, value in percentiles(taken).items()}
        found["metrics_per_step"] = float(len(STEP))
        assert sender.close(120), "the server did not take everything"
    found |= {f"board_{key}": value for key, value in percentiles(ray_board()).items()}
    return found


def ray_board() -> list[float]:
    class Nobody:
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            return

        def say(self, text: str) -> None:
            return

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    taken = []
    with mailbox(Nobody(), Interruptions(print), threading.Event()) as actor:
        board = RemoteBoard(actor)
        for step in range(LOGGED):
            began = time.perf_counter()
            board.log(step, STEP)
            taken.append(time.perf_counter() - began)
            time.sleep(PAUSE_S)
    ray.shutdown()
    return taken


def outages(folder: Path) -> dict[str, float]:
    """A fault begins at step 100; steps after it count. The first case is a tracker that works."""
    seconds: dict[str, list[float]] = {name: [] for name in ("works", "killed", "hung", "500", "absent")}  # fmt: skip
    ends: dict[str, list[float]] = {name: [] for name in seconds}
    for turn in range(ROUNDS):
        for name in seconds:
            steps, end_s = one_run(folder / f"{name}-{turn}", name)
            seconds[name] += steps
            ends[name].append(end_s)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {f"{name}_step_ms": 1000 * value for name, value in medians.items()}
    found |= {f"{name}_over_works": medians[name] / medians["works"] for name in medians}
    return found | {f"{name}_end_s_worst": max(values) for name, values in ends.items()}


def one_run(folder: Path, fault: str) -> tuple[list[float], float]:
    """Seconds of each step after the fault, and from the last step to the end of the process."""
    server, output = MlflowServer(folder / "mlflow"), folder / "out"
    folder.mkdir()
    with server, FaultyProxy(server.uri) as proxy:
        if fault == "absent":
            server.kill()
        arguments = [
            *settings(launch__threads_per_worker=1, tracking__required="false"), "--launcher",
            "local", "--steps", str(STEPS), "--tracking-uri", proxy.endpoint,
        ]  # fmt: skip
        job = Job(output, *arguments)
        job.wait_for(lambda: list(output.glob("checkpoints/*/step_000001??/meta.json")))
        if fault == "killed":
            server.kill()
        elif fault == "hung":
            server.signal(signal.SIGSTOP)
        elif fault == "500":
            proxy.share = 1.0
        assert job.process.wait(600) == 0, job.text()
        ended = time.time()
        if fault == "hung":
            server.signal(signal.SIGCONT)
    [spool] = output.glob("records/*/rank0.jsonl")
    steps, last = [], 0.0
    for line in spool.read_text().splitlines():
        record = json.loads(line)
        if "train/loss" in record.get("metrics", {}):
            last = record["time_ms"] / 1000
            if record["step"] > 120:
                steps.append(record["metrics"]["perf/step_s"])
    return steps, ended - last


CASES = {"cost": cost, "outages": outages}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        folder = Path(tempfile.mkdtemp(prefix=f"records-{name}-"))
        try:
            figures = CASES[name](folder)
            print(json.dumps({name: {k: round(v, 4) for k, v in figures.items()}}), flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
