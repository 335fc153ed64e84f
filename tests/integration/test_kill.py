"""Workers and drivers killed or told to stop, then the same command: nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Done, command, descendants, environment, settings, train

pytestmark = pytest.mark.integration
STEPS = 60
# Epochs of 3 steps, a checkpoint every 5: a kill nearly always falls inside an epoch and between
# two checkpoints.
ARGUMENTS = [*settings(), "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    output.mkdir()
    done = train(output, *ARGUMENTS)
    assert done.code == 0, done.err
    return done


class Job:
    """A training job in the background whose progress can be watched."""

    def __init__(self, output: Path) -> None:
        self.output = output
        output.mkdir(exist_ok=True)
        self.log = (output / "stdout.txt").open("w+")
        self.process = subprocess.Popen(
            command(*ARGUMENTS, "--output", str(output), "--json"),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=output,
        )

    def workers(self) -> list[int]:
        below = descendants(self.process.pid)
        return [pid for pid, line in below if "RayTrainWorker" in line]

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def checkpoints(self) -> int:
        return len(list(self.output.glob("artifacts/*/artifacts/checkpoints/step_*/meta.json")))

    def wait_for(self, what: Callable[[], object], timeout_s: float = 240) -> None:
        end = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < end, f"waited {timeout_s} s in vain:\n{self.text()}"
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)

    def finish(self, timeout_s: float = 300) -> Done:
        code = self.process.wait(timeout_s)
        return Done(code, self.text(), "")


def assert_same(disturbed: Done, undisturbed: Done) -> None:
    assert disturbed.code == 0, disturbed.out
    assert disturbed.report["step"] == STEPS
    # Every step once, with the value it has in the undisturbed run.
    assert disturbed.history() == undisturbed.history()
    assert [step for step, _ in disturbed.history()] == list(range(1, STEPS + 1))
    a, b = disturbed.weights(), undisturbed.weights()
    assert [key for key in b if not torch.equal(a[key], b[key])] == []


def test_worker_killed(undisturbed: Done, tmp_path: Path) -> None:
    job = Job(tmp_path / "out")
    job.wait_for(lambda: job.checkpoints() and job.workers())
    time.sleep(0.2)
    os.kill(job.workers()[0], signal.SIGKILL)
    done = job.finish()
    assert "went on from the checkpoint of step" in done.out
    assert_same(done, undisturbed)


def test_driver_killed_and_same_command(undisturbed: Done, tmp_path: Path) -> None:
    job = Job(tmp_path / "out")
    job.wait_for(lambda: job.checkpoints() and job.workers())
    left_over = [pid for pid, _ in descendants(job.process.pid)]
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    end = time.monotonic() + 60
    while any(_training(pid) for pid in left_over):
        assert time.monotonic() < end, "workers outlived their driver"
        time.sleep(0.2)
    again = Job(tmp_path / "out")
    done = again.finish()
    assert "continuing unfinished run" in done.out
    assert_same(done, undisturbed)
    # One MLflow run, whatever happened.
    from mlflow.tracking import MlflowClient

    client = MlflowClient(done.report["tracking_uri"])
    experiment = client.get_experiment_by_name("efficientdet")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1
    for pid in left_over:  # what Ray itself leaves behind when its driver is killed
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


def test_driver_told_to_stop(undisturbed: Done, tmp_path: Path) -> None:
    """SIGTERM: a checkpoint of the step that was under way, and nothing is computed twice."""
    job = Job(tmp_path / "out")
    job.wait_for(lambda: job.checkpoints() and job.workers())
    began = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    stopped = job.finish()
    assert time.monotonic() - began < 20, "longer than a grace period"
    assert stopped.code == 130, stopped.out
    report = stopped.report
    assert report["status"] == "stopped: stopped"
    assert 5 <= report["step"] < STEPS
    assert report["checkpoint"].endswith(f"step_{report['step']:08d}")
    done = Job(tmp_path / "out").finish()
    assert f"from step {report['step']}" in done.out
    assert_same(done, undisturbed)


def _training(pid: int) -> bool:
    try:
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
