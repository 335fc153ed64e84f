from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, StorageError
from orchestrator.records.journal import DRIVER, Journal, metrics_record
from orchestrator.records.replay import replay
from orchestrator.records.run import TrackedRun
from orchestrator.records.scribe import find_run
from orchestrator.records.sender import Sender
from orchestrator.records.spool import Spool
from orchestrator.records.tracker import Tracker
from orchestrator.storage.filesystems import open_place


def leave_unsent(run: TrackedRun, output: Path, checkpoints: str, closed_port: int) -> None:
    """As a run does that never reached its tracker."""
    folder, carried = output / "records" / run.run_key, open_place(f"{checkpoints}/records", "test")
    dead = replace(run, tracking_uri=f"http://127.0.0.1:{closed_port}")
    rank0 = Sender(dead, Spool(folder / "rank0.jsonl"), carry_to=carried)
    rank0.log(metrics_record(1, {"train/loss": 1.0}))
    assert not rank0.close(0.1)
    journal = Journal(Sender(dead, Spool(folder / DRIVER), creates=True, carry_to=carried))
    journal.params({"model.phi": "0"})
    journal.end("FINISHED", "finished")
    assert not journal.close(0.1)


@pytest.mark.parametrize("place", ["output", "records", "checkpoints", "s3"])
def test_what_waits_is_sent_from_wherever_it_lies(
    place: str, tracker: Tracker, unborn: TrackedRun, tmp_path: Path, closed_port: int, bucket: str
) -> None:
    """The run is created first, by the driver's part."""
    checkpoints = f"s3://{bucket}/run" if place == "s3" else str(tmp_path / "checkpoints")
    leave_unsent(unborn, tmp_path / "output", checkpoints, closed_port)
    asked = {
        "output": tmp_path / "output",
        "records": tmp_path / "output" / "records" / unborn.run_key,
    }.get(place, checkpoints)
    sent = list(replay(str(asked), tracking_uri=tracker.uri))
    assert [(one.spool, one.records, one.left, one.lost) for one in sent] == [
        (DRIVER, 2, 0, 0), ("rank0.jsonl", 1, 0, 0),
    ]  # fmt: skip
    run = tracker.client.get_run(str(find_run(tracker.client, unborn)))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model.phi": "0"}
    assert run.data.metrics == {"train/loss": 1.0}
    again = list(replay(str(asked), tracking_uri=tracker.uri))
    assert sum(one.records for one in again) == 0


def test_tracker_that_is_still_away(
    unborn: TrackedRun, tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.records.replay.FIRST_ANSWER_S", 0.5)
    leave_unsent(unborn, tmp_path / "output", str(tmp_path / "checkpoints"), closed_port)
    sent = list(replay(str(tmp_path / "output"), tracking_uri=None))
    assert len(sent) == 2
    assert all(one.left for one in sent)


@pytest.mark.parametrize("place", ["nowhere", "s3://no-such-bucket/x"])
def test_place_that_is_not_there(s3: str, place: str) -> None:
    with pytest.raises(StorageError, match=rf"^--replay: .*{place}"):
        list(replay(place, tracking_uri="sqlite://"))


def test_card_of_a_bucket_does_not_say_who_is_sent_a_password(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"^--tracking-uri: "):
        list(replay(f"s3://{bucket}/run", tracking_uri=None))
