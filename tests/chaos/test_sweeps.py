"""Sweeps whose trials have workers of their own: stopped early, killed; nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.sweeps import SweepJob, children, count, events, write_sweep
from mlflow.tracking import MlflowClient

from .conftest import Storage

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


def test_a_new_machine_goes_on(tmp_path: Path, storage: Storage) -> None:
    """The driver's machine is lost with its disk: what is on S3 and in the tracker is enough."""
    sweep = write_sweep(
        tmp_path, trials={"num": 5, "concurrent": 1},
        train={"checkpoint.uri": f"s3://{storage.bucket}/checkpoints"},
    )  # fmt: skip
    tracker = f"sqlite:///{tmp_path}/mlflow.db"
    command = ("--config", str(sweep), "--tracking-uri", tracker)
    lost = SweepJob(tmp_path / "lost", *command, **storage.env)

    def carried() -> int:
        keys = storage.keys("sweeps/tiny/trials.jsonl")
        if not keys:
            return 0
        body = storage.client.get_object(Bucket=storage.bucket, Key=keys[0])["Body"].read()
        return int(body.count(b'"op": "end"'))

    lost.wait_for(lambda: carried() >= 2)
    lost.kill()
    before = carried()
    assert before < 5
    shutil.rmtree(tmp_path / "lost")
    done = SweepJob(tmp_path / "new", *command, **storage.env).finish()
    assert done.code == 0, done.out
    found = events(tmp_path / "new")
    assert len(count(found, "end")) == 5
    # Only what the copy had not yet heard of is trained again.
    again = [trial for trial, times in count(found, "began").items() if times > 1]
    assert len(again) <= 5 - before
    client = MlflowClient(tracker)
    sweeps = client.search_runs(["1"], "attributes.run_name = 'tiny'")
    assert [run.info.status for run in sweeps] == ["FINISHED"]
    left = {key.split("checkpoints/")[1].split("/")[0] for key in storage.keys("/step_")}
    assert len(left) == 3


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
