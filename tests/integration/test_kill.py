"""Workers and drivers killed or told to stop, then the same command: nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from helpers import Done, settings, train
from helpers.jobs import Job, assert_same

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


def test_driver_killed_and_same_command(undisturbed: Done, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", *ARGUMENTS)
    job.wait_for(lambda: job.step() and job.workers())
    job.kill()
    again = Job(tmp_path / "out", *ARGUMENTS)
    done = again.finish()
    assert "continuing unfinished run" in done.out
    assert_same(done, undisturbed)
    # One MLflow run, whatever happened.
    from mlflow.tracking import MlflowClient

    client = MlflowClient(done.report["tracking_uri"])
    experiment = client.get_experiment_by_name("efficientdet")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.slow
def test_driver_told_to_stop(undisturbed: Done, tmp_path: Path) -> None:
    """SIGTERM: a checkpoint of the step that was under way, and nothing is computed twice."""
    job = Job(tmp_path / "out", *ARGUMENTS)
    job.wait_for(lambda: job.step() and job.workers())
    began = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    stopped = job.finish()
    assert time.monotonic() - began < 20, "longer than a grace period"
    assert stopped.code == 130, stopped.out
    report = stopped.report
    assert report["status"] == "stopped: stopped"
    assert 5 <= report["step"] < STEPS
    assert report["checkpoint"].endswith(f"step_{report['step']:08d}")
    done = Job(tmp_path / "out", *ARGUMENTS).finish()
    assert f"from step {report['step']}" in done.out
    assert_same(done, undisturbed)
