"""jobs/tune.py for real: killed, resumed, extended, stopped early; what it leaves and records."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from helpers import train
from helpers.sweeps import SweepJob, children, count, events, write_sweep
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.integration


def test_killed_resumed_and_extended(tmp_path: Path) -> None:
    """Each trial is trained once, whatever happens to the driver; the records are complete."""
    output = tmp_path / "out"
    sweep = write_sweep(
        tmp_path,
        search={"algorithm": "random", "seed": 5, "points": [
            {"model.fusion": "sum", "model.fpn_channels": 8, "optim.lr_per_64": 0.5}
        ]},
        constraints={"max_params_m": 0.1},
        scheduler={"kind": "asha", "grace": 1, "reduction": 3},
    )  # fmt: skip
    killed = SweepJob(output, "--config", str(sweep))
    killed.wait_for(lambda: killed.ended() >= 3)
    killed.kill()
    before = count(events(output), "end")
    assert 3 <= len(before) < 8

    done = SweepJob(output, "--config", str(sweep), "--resume").finish()
    assert done.code == 0, done.out
    found = events(output)
    assert count(found, "new") == count(found, "end") == {f"{n:03d}": 1 for n in range(8)}
    assert {e["sample"]["model.fpn_channels"] for e in found if e["op"] == "new"} == {8, 16}
    assert "samples rejected" in done.out
    assert all(count(found, "began")[trial] == 1 for trial in before), "trained again"

    # Given once more, as a cluster does, it says what it found and trains nothing.
    told = SweepJob(output, "--config", str(sweep)).finish()
    assert (told.code, told.report["winner"]) == (0, done.report["winner"]), told.out
    assert events(output) == found

    more = SweepJob(output, "--config", str(sweep), "--extend", "4").finish()
    assert more.code == 0, more.out
    assert more.report["run_id"] == done.report["run_id"]
    extended = events(output)
    assert extended[: len(found)] == found
    assert count(extended[len(found) :], "began") == {f"{n:03d}": 1 for n in range(8, 12)}

    folder = Path(more.report["folder"])
    states = {e["trial"]: e["state"] for e in extended if e["op"] == "end"}
    assert set(states.values()) <= {"finished", "stopped"}
    for name in ("leaderboard.csv", "findings.md", "pareto.png", "curves.png", "winner.yaml"):
        assert (folder / name).stat().st_size > 0
    _check_records(more.report, states, extended)
    # Checkpoints of the best three trials are left, of the others none.
    left = {
        path.parents[2].name for path in output.glob("artifacts/*/artifacts/checkpoints/step_*")
    }
    assert len(left) == 3

    winner = train(output, "--config", str(folder / "winner.yaml"))
    assert winner.code == 0, winner.err
    [best] = [r for r in json.loads((folder / "trials.json").read_text())
              if r["trial_id"] == more.report["winner"]]  # fmt: skip
    assert winner.report["metrics"]["val/AR100"] == pytest.approx(best["last"]["val/AR100"])


def _check_records(
    report: dict[str, str], states: dict[str, str], found: list[dict[str, object]]
) -> None:
    client = MlflowClient(report["tracking_uri"])
    runs = children(client, report["run_id"])
    by_trial = {run.data.tags["effdet.trial"]: run for run in runs}
    assert len(runs) == len(by_trial) == len(states)
    for trial, run in by_trial.items():
        assert run.info.status == "FINISHED", (trial, run.data.tags)
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == list(range(1, max(steps) + 1)), "a step twice, or none"
        scored = [e["step"] for e in found if e["op"] == "scored" and e["trial"] == trial]
        there = {m.step for m in client.get_metric_history(run.info.run_id, "val/AP")}
        assert there >= set(scored)
        # What it trained is what its record says.
        [new] = [e for e in found if e["op"] == "new" and e["trial"] == trial]
        sample = new["sample"]
        assert isinstance(sample, dict)
        assert {path: run.data.params[path] for path in sample} == {
            path: str(value) for path, value in sample.items()
        }
        path = client.download_artifacts(run.info.run_id, "config.yaml")
        config = yaml.safe_load(Path(path).read_text())["job"]
        assert config["model"]["fusion"] == sample["model.fusion"]
        assert config["optim"]["lr_per_64"] == sample["optim.lr_per_64"]
    parent = client.get_run(report["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["sweep/trials_ended"] == len(states)
    assert "best:" in parent.data.tags["mlflow.note.content"]
    names = {f.path for f in client.list_artifacts(report["run_id"], "sweep")}
    assert {"sweep/winner.yaml", "sweep/pareto.png", "sweep/leaderboard.csv"} <= names


@pytest.mark.slow
def test_what_diverges_fails_and_never_wins(tmp_path: Path) -> None:
    point = {"model.fusion": "sum", "model.fpn_channels": 8}
    sweep = write_sweep(
        tmp_path, trials={"num": 2},
        space={
            "model.fusion": {"choice": ["sum"]}, "model.fpn_channels": {"choice": [8]},
            "optim.lr_per_64": {"loguniform": [0.01, 1e9]},
        },
        search={"algorithm": "random", "points": [
            point | {"optim.lr_per_64": 1e9}, point | {"optim.lr_per_64": 0.1}
        ]},
    )  # fmt: skip
    done = SweepJob(tmp_path / "out", "--config", str(sweep)).finish()
    assert done.code == 0, done.out
    ends = {e["trial"]: e for e in events(tmp_path / "out") if e["op"] == "end"}
    assert ends["000"]["state"] == "failed"
    assert "not finite" in ends["000"]["reason"]
    assert done.report["winner"] == "001"
    assert any("trial 000 failed: diverged" in line for line in done.report["findings"])


@pytest.mark.slow
def test_asked_to_end_it_saves_and_goes_on_later(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sweep = write_sweep(tmp_path, trials={"num": 2}, train={"train.duration": "{epochs: 40}"})
    job = SweepJob(output, "--config", str(sweep))
    job.wait_for(lambda: len([e for e in job.events() if e["op"] == "scored"]) > 4)
    os.kill(job.process.pid, signal.SIGTERM)
    interrupted = job.finish()
    assert interrupted.code == 130, interrupted.out
    assert "run the same command again" in interrupted.out
    assert job.ended() == 0
    client = MlflowClient(interrupted.report["tracking_uri"])
    assert {r.info.status for r in children(client, interrupted.report["run_id"])} == {"KILLED"}
    done = SweepJob(output, "--config", str(sweep)).finish()
    assert done.code == 0, done.out
    assert done.report["run_id"] == interrupted.report["run_id"]
    runs = children(client, done.report["run_id"])
    assert len(runs) == 2
    for run in runs:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == list(range(1, 121))


@pytest.mark.slow
def test_population_takes_over_weights_and_settings(tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path, trials={"num": 4, "concurrent": 2},
        space={"optim.lr_per_64": {"loguniform": [0.0001, 0.5]}},
        scheduler={"kind": "pbt", "grace": 2}, train={"train.duration": "{epochs: 8}"},
    )  # fmt: skip
    done = SweepJob(tmp_path / "out", "--config", str(sweep)).finish()
    assert done.code == 0, done.out
    found = events(tmp_path / "out")
    changed = [e for e in found if e["op"] == "changed"]
    assert changed, "nobody took over anything"
    client = MlflowClient(done.report["tracking_uri"])
    runs = children(client, done.report["run_id"])
    taken = [run for run in runs if "effdet.exploited_from" in run.data.tags]
    by_rate = {run.data.params["optim.lr_per_64"]: run for run in taken}
    for event in changed:
        run = by_rate[str(event["sample"]["optim.lr_per_64"])]
        assert run.data.tags["effdet.trial"] == event["trial"]
        first = min(m.step for m in client.get_metric_history(run.info.run_id, "train/loss"))
        assert first > 1, "it goes on from the weights it took"
    ends = [e for e in found if e["op"] == "end"]
    assert sorted(e["trial"] for e in ends) == ["000", "001", "002", "003"]


@pytest.mark.slow
def test_a_trial_outlives_its_process(tmp_path: Path) -> None:
    """kill -9 of the process that trains: the trial goes on from its checkpoint and counts once."""
    output = tmp_path / "out"
    sweep = write_sweep(
        tmp_path, trials={"num": 1, "max_failures": 2},
        train={"train.duration": "{epochs: 30}"},
    )  # fmt: skip
    job = SweepJob(output, "--config", str(sweep))
    job.wait_for(lambda: len([e for e in job.events() if e["op"] == "scored"]) > 3)
    for pid in job.below("ray::Trial"):
        os.kill(pid, signal.SIGKILL)
    done = job.finish()
    assert done.code == 0, done.out
    found = events(output)
    assert len({e["process"] for e in found if e["op"] == "scored"}) == 2
    client = MlflowClient(done.report["tracking_uri"])
    [run] = children(client, done.report["run_id"])
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 91))
