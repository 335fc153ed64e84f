"""MLflow that is killed, hangs, fails or was never there: training goes on, no record is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, Done, environment, settings
from helpers.faulty import FaultyProxy
from helpers.jobs import Job
from helpers.mlflow_server import MlflowServer
from mlflow.tracking import MlflowClient

from .conftest import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
STEPS = 150
ARGUMENTS = [*settings(launch__threads_per_worker=1), "--steps", str(STEPS)]
LOCAL = ("--launcher", "local")
END_S = 15.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path / "mlflow") as server:
        yield server


def records(output: Path) -> Path:
    """Of the only run."""
    [card] = (output / "records").glob("*/run.json")
    return card.parent


def emitted(output: Path) -> dict[tuple[str, int], float]:
    """(key, step) -> value of every metric that the run wrote down; the first, if several."""
    found: dict[tuple[str, int], float] = {}
    for spool in records(output).glob("*.jsonl"):
        for line in spool.read_text().splitlines():
            record = json.loads(line)
            for key, value in record.get("metrics", {}).items():
                if record["op"] == "metrics":
                    found.setdefault((key, record["step"]), value)
    return found


def stored(uri: str, run_key: str) -> list[tuple[str, int, float]]:
    """Every metric that MLflow has of the run, as often as it has it."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("efficientdet")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id], f"tags.`effdet.run_key` = '{run_key}'")
    return [
        (key, metric.step, metric.value)
        for key in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, key)
    ]


def assert_complete(server: MlflowServer, output: Path) -> None:
    expected = emitted(output)
    found = stored(server.uri, records(output).name)
    assert len(found) == len(expected)
    assert {(key, step): value for key, step, value in found} == pytest.approx(expected)
    assert {step for key, step in expected if key == "train/loss"} == set(range(1, STEPS + 1))


def replay(place: Path | str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "doctor.py"), "--replay", str(place)],
        capture_output=True, text=True, timeout=300, env=environment(**env),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_ended_soon(output: Path) -> None:
    """After the last step, by the time that its record bears."""
    said = map(json.loads, (records(output) / "rank0.jsonl").read_text().splitlines())
    last_ms = max(
        record["time_ms"]
        for record in said
        if record.get("step") == STEPS and "train/loss" in record.get("metrics", {})
    )
    assert time.time() - last_ms / 1000 < END_S


def finish(job: Job) -> Done:
    done = job.finish()
    assert_ended_soon(job.output)
    assert done.code == 0, done.out
    assert done.report["step"] == STEPS
    return done


@pytest.mark.parametrize(
    "fault",
    [pytest.param("killed", marks=pytest.mark.slow), pytest.param("hung", marks=pytest.mark.chaos), pytest.param("500", marks=pytest.mark.chaos)],
)  # fmt: skip
def test_server_fails_in_the_middle(server: MlflowServer, tmp_path: Path, fault: str) -> None:
    output = tmp_path / "out"
    with FaultyProxy(server.uri) as proxy:
        job = Job(output, *ARGUMENTS, *LOCAL, "--tracking-uri", proxy.endpoint)
        job.wait_for(lambda: job.text().count("step ") > 1 or "rank0" in _sent(output))
        if fault == "killed":
            server.kill()
        elif fault == "hung":
            server.signal(signal.SIGSTOP)
        else:
            proxy.share = 1.0
        done = finish(job)
        assert "jobs/doctor.py --replay" in done.out
        if fault == "killed":
            server.start()
        elif fault == "hung":
            server.signal(signal.SIGCONT)
        proxy.share = 0.0
        replay(output)
        assert_complete(server, output)
        run = MlflowClient(server.uri).get_run(done.report["run_id"])
        assert run.info.status == "FINISHED"
        assert "validation" in run.data.tags["mlflow.note.content"]


@pytest.mark.chaos
def test_server_was_never_there(tmp_path: Path) -> None:
    """A first start without it, a restart without it, then everything is sent into one run."""
    server, output = MlflowServer(tmp_path / "mlflow"), tmp_path / "out"
    asked = [*ARGUMENTS, *LOCAL, "--tracking-uri", server.uri]
    refused = Job(output, *asked)
    assert refused.process.wait(120) == 2
    assert "tracking.required=false" in refused.text()
    assert "Traceback" not in refused.text()

    job = Job(output, *asked, "--set", "tracking.required=false")
    job.wait_for(lambda: list(output.glob("checkpoints/*/step_*/meta.json")))
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    done = finish(Job(output, *asked))  # a restart needs no leave
    assert "continuing unfinished run" in done.out
    assert done.report["run_id"] is None

    with server:
        assert "does not answer" not in replay(output)
        assert_complete(server, output)
        found = replay(output)
        assert "all was there" in found
        assert_complete(server, output)


@pytest.mark.chaos
def test_pod_lost_with_its_disk_while_the_server_is_away(
    server: MlflowServer, storage: Storage, tmp_path: Path
) -> None:
    """What was recorded until the last checkpoint lies beside it, and so does the run's card."""
    output = tmp_path / "out"
    asked = [
        *ARGUMENTS, *LOCAL, "--tracking-uri", server.uri,
        "--set", f"checkpoint.uri=s3://{storage.bucket}/checkpoints",
    ]  # fmt: skip
    job = Job(output, *asked, **storage.env)
    job.wait_for(lambda: len(storage.steps()) >= 1)
    server.kill()
    job.wait_for(lambda: storage.steps()[-1] > 60)
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    job.log.close()
    shutil.rmtree(output)
    done = finish(Job(output, *asked, **storage.env))
    assert "continuing unfinished run" in done.out
    server.start()
    uri = f"s3://{storage.bucket}/checkpoints/{records(output).name}"
    replay(
        uri, MLFLOW_TRACKING_URI=server.uri, **storage.env
    )  # from where the checkpoints are: this pod may be gone as well
    found = stored(server.uri, records(output).name)
    steps = [step for key, step, _ in found if key == "train/loss"]
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert storage.keys("/records/") == [], "nothing is left to be sent"


@pytest.mark.chaos
def test_worker_killed_while_the_server_is_away(server: MlflowServer, tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = Job(output, *ARGUMENTS, "--tracking-uri", server.uri)
    job.wait_for(lambda: list(output.glob("checkpoints/*/step_*/meta.json")))
    server.kill()
    os.kill(job.workers()[0], signal.SIGKILL)
    done = job.finish()
    assert done.code == 0, done.out
    assert done.report["interruptions"]["failures"] == 1
    server.start()
    replay(output)
    assert_complete(server, output)
    run = MlflowClient(server.uri).get_run(done.report["run_id"])
    assert run.data.metrics["events/failures"] == 1


def _sent(output: Path) -> str:
    """Names of spools of which something was sent."""
    return " ".join(
        path.stem for path in output.glob("records/*/*.sent") if int(path.read_text() or 0)
    )
