"""Sweeps whose trials have workers of their own: stopped early, killed; nothing stays behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from helpers.sweeps import SweepJob, children, count, events, write_sweep
from mlflow.tracking import MlflowClient

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
STOPPED = 12


def test_twelve_stopped_leave_nothing(tmp_path: Path) -> None:
    """Trials with two workers each: never more than two at once, none left, none in the way."""
    output = tmp_path / "out"
    sweep = write_sweep(
        tmp_path,
        trials={"num": 18, "workers_per_trial": 2},
        # Only what is as good as the best so far goes on.
        scheduler={"kind": "asha", "unit": "step", "grace": 3, "reduction": 30},
        # A second or two pass until the workers hear of it.
        train={
            "train.bn_group": 4, "train.duration": "{steps: 90}",
            "train.evaluate_every": "{steps: 3}", "train.checkpoint_every": "{steps: 3}",
        },
    )  # fmt: skip
    job = SweepJob(output, "--config", str(sweep))
    most = 0

    def watch() -> bool:
        nonlocal most
        most = max(most, len(job.workers()))
        return job.process.poll() is not None

    while not watch():
        time.sleep(0.2)
    done = job.finish()
    assert done.code == 0, done.out
    found = events(output)
    states = [e["state"] for e in found if e["op"] == "end"]
    assert set(states) == {"finished", "stopped"}
    assert states.count("stopped") >= STOPPED
    assert most == 2
    assert not job.below("ray::")
    client = MlflowClient(done.report["tracking_uri"])
    outcomes = [r.data.tags["effdet.outcome"] for r in children(client, done.report["run_id"])]
    assert outcomes.count("stopped early by asha") == states.count("stopped")


def test_a_killed_worker_costs_a_trial_nothing(tmp_path: Path) -> None:
    """kill -9 of one of two workers, twice: the group starts anew, the trial goes on."""
    output = tmp_path / "out"
    sweep = write_sweep(
        tmp_path, trials={"num": 2, "workers_per_trial": 2, "max_failures": 2},
        train={"train.bn_group": 4, "train.duration": "{epochs: 30}"},
    )  # fmt: skip
    job = SweepJob(output, "--config", str(sweep))
    for trial in ("000", "001"):
        job.wait_for(lambda trial=trial: count(job.events(), "scored")[trial] > 3)
        os.kill(job.workers()[-1], signal.SIGKILL)
    done = job.finish()
    assert done.code == 0, done.out
    client = MlflowClient(done.report["tracking_uri"])
    runs = children(client, done.report["run_id"])
    assert [run.data.tags["effdet.failures"] for run in runs] == ["1", "1"]
    for run in runs:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == list(range(1, 91))
