from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records import sender as module
from orchestrator.records.journal import metrics_record
from orchestrator.records.run import CARD, TrackedRun, read_card
from orchestrator.records.scribe import Scribe, find_run
from orchestrator.records.sender import Sender, open_spool
from orchestrator.records.spool import Spool
from orchestrator.records.tracker import Tracker
from orchestrator.storage.filesystems import open_place

LOSS = "train/loss"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records" / "rank0.jsonl"


@pytest.fixture(params=["closed", "hung"])
def dead_uri(request: pytest.FixtureRequest, closed_port: int) -> Iterator[str]:
    """A server that refuses connections, and one that takes them and never answers."""
    with socket.socket() as listener:
        if request.param == "hung":
            listener.bind(("127.0.0.1", closed_port))
            listener.listen()
        yield f"http://127.0.0.1:{closed_port}"


def send(run: TrackedRun, path: Path, values: dict[int, float]) -> None:
    """Log step -> value as one process does, to its end."""
    sender = Sender(run, Spool(path))
    for step, value in values.items():
        sender.log(metrics_record(step, {LOSS: value}))
    assert sender.close(30)
    assert sender.lost == 0


def history(tracker: Tracker, run: TrackedRun, key: str = LOSS) -> list[tuple[int, float]]:
    """(step, value) of everything the run has, ascending."""
    assert run.run_id is not None
    found = tracker.client.get_metric_history(run.run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def test_everything_is_sent_with_the_time_it_was_logged(
    path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    before = int(time.time() * 1000)
    send(tracked, path, {step: step / 10 for step in range(30)})
    assert history(tracker, tracked) == [(step, step / 10) for step in range(30)]
    found = tracker.client.get_metric_history(str(tracked.run_id), LOSS)
    assert all(before <= metric.timestamp <= time.time() * 1000 for metric in found)
    assert Spool(path).position() == path.stat().st_size


def test_replaying_the_whole_file_adds_nothing(
    path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    values = {step: step / 10 for step in range(20)}
    send(tracked, path, values)
    Spool(path).set_position(0)
    send(tracked, path, {})
    assert history(tracker, tracked) == list(values.items())


def test_steps_run_again_elsewhere_add_nothing(
    path: Path, tmp_path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    send(tracked, path, {1: 1.0, 2: 2.0, 3: 3.0})
    send(tracked, tmp_path / "another node" / "rank0.jsonl", {2: 2.5, 3: 3.5, 4: 4.0})
    assert history(tracker, tracked) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_dead_tracker_costs_training_nothing_and_a_later_sender_delivers(
    path: Path, tracker: Tracker, tracked: TrackedRun, dead_uri: str
) -> None:
    sender = Sender(replace(tracked, tracking_uri=dead_uri), Spool(path))
    began = time.monotonic()
    for step in range(1050):
        sender.log(metrics_record(step, {LOSS: float(step)}))
    assert time.monotonic() - began < 2
    began = time.monotonic()
    assert not sender.close(timeout_s=1)
    assert time.monotonic() - began < 2
    send(tracked, path, {1050: 0.5})
    assert [step for step, _ in history(tracker, tracked)] == list(range(1051))


def test_nan_is_kept(path: Path, tracker: Tracker, tracked: TrackedRun) -> None:
    send(tracked, path, {1: math.nan, 2: 2.0})
    (step, value), other = history(tracker, tracked)
    assert step == 1
    assert math.isnan(value)
    assert other == (2, 2.0)


def test_what_cannot_be_written_down_is_counted_not_raised(
    path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    sender = Sender(tracked, Spool(path))
    sender.log({"op": "metrics", "step": 1, "time_ms": 1, "metrics": {LOSS: object()}})
    sender.log(metrics_record(2, {LOSS: 2.0}))
    assert sender.close(30)
    sender.log(metrics_record(3, {LOSS: 3.0}))
    assert sender.lost == 2
    assert history(tracker, tracked) == [(2, 2.0)]


def test_only_the_record_that_is_refused_is_dropped(
    path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    said: list[str] = []
    sender = Sender(tracked, Spool(path), say=said.append)
    sender.log(metrics_record(1, {LOSS: 1.0}))
    bad = {"op": "metrics", "step": 2, "time_ms": 2, "metrics": {LOSS: 2.0, "no/such*name?": 2.0}}
    sender.log(bad)
    sender.log({"op": "no such kind"})
    sender.log(metrics_record(3, {LOSS: 3.0}))
    assert sender.close(30)
    assert history(tracker, tracked) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert sender.lost == 2
    assert "no/such*name?" in said[0]
    assert "no known kind" in said[1]


def test_names_of_classes_may_hold_anything(
    path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    sender = Sender(tracked, Spool(path))
    sender.log(metrics_record(1, {"val_class/Drill (Tool), R&D": 0.5}))
    assert sender.close(30)
    assert sender.lost == 0
    assert history(tracker, tracked, "val_class/Drill _Tool__ R_D") == [(1, 0.5)]


class Flaky:
    """A client of MLflow whose n-th answer to a question about a history does not come."""

    def __init__(self, client: Any, fails_at: int) -> None:
        self.client, self.left = client, fails_at

    def get_metric_history(self, run_id: str, key: str) -> Any:
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("lost")
        return self.client.get_metric_history(run_id, key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_answer_that_does_not_come_in_the_middle_loses_nothing(
    path: Path, tmp_path: Path, tracker: Tracker, tracked: TrackedRun, fails_at: int
) -> None:
    first = [{"op": "metrics", "step": 1, "time_ms": 1, "metrics": {"a": 1.0, "b": 1.0, "c": 1.0}}]
    again = [*first, first[0] | {"step": 2, "time_ms": 2}]
    run_id = str(tracked.run_id)
    Scribe(tracker.client, tracked, run_id, tmp_path).write(first)
    flaky: Any = Flaky(tracker.client, fails_at)
    scribe = Scribe(flaky, tracked, run_id, tmp_path)
    with pytest.raises(ConnectionError):
        scribe.write(again)
    scribe.write(again)
    for key in "abc":
        assert history(tracker, tracked, key) == [(1, 1.0), (2, 1.0)]


def test_steps_after_a_rollback_are_recorded_too(
    tmp_path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    """They are not the same steps; whoever reads the run must see what was trained."""

    def step(number: int, time_ms: int, value: float) -> dict[str, Any]:
        return {"op": "metrics", "step": number, "time_ms": time_ms, "metrics": {LOSS: value}}

    back = {"op": "metrics", "step": 1, "time_ms": 50, "metrics": {"train/rolled_back": 1.0}}
    records = [step(1, 10, 1.0), step(2, 20, 9.0), step(3, 30, 99.0), back, step(2, 60, 0.9)]
    records += [step(3, 70, 0.8), step(4, 80, 0.7)]
    for _ in range(2):  # replayed from the start: nothing is added
        Scribe(tracker.client, tracked, str(tracked.run_id), tmp_path).write(records)
    expected = [(1, 1.0), (2, 0.9), (2, 9.0), (3, 0.8), (3, 99.0), (4, 0.7)]
    assert history(tracker, tracked) == expected


def test_copy_beside_the_checkpoints_goes_when_it_is_sent(
    path: Path, tmp_path: Path, tracked: TrackedRun
) -> None:
    """An old copy must not speak for the run when the next node begins."""
    carried = open_place(str(tmp_path / "carried"), "test")
    sender = Sender(tracked, Spool(path), carry_to=carried)
    sender.log(metrics_record(1, {LOSS: 1.0}))
    sender.carry()
    copy, end = tmp_path / "carried" / path.name, time.monotonic() + 30
    while copy.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert sender.close(30)


def test_deleted_run_does_not_keep_the_sender_trying(
    path: Path, tracker: Tracker, tracked: TrackedRun
) -> None:
    tracker.client.delete_run(str(tracked.run_id))
    said: list[str] = []
    sender = Sender(tracked, Spool(path), say=said.append)
    sender.log(metrics_record(1, {LOSS: 1.0}))
    began = time.monotonic()
    assert not sender.close(timeout_s=20)
    assert time.monotonic() - began < 10
    assert "deleted in MLflow" in said[0]
    # Deleted by mistake: nothing was thrown away.
    tracker.client.restore_run(str(tracked.run_id))
    send(tracked, path, {2: 2.0})
    assert history(tracker, tracked) == [(1, 1.0), (2, 2.0)]


def test_one_sender_creates_the_run_and_the_others_find_it(
    tmp_path: Path, tracker: Tracker, unborn: TrackedRun
) -> None:
    waiting = Sender(unborn, Spool(tmp_path / "rank0.jsonl"))
    waiting.log(metrics_record(1, {LOSS: 1.0}))
    time.sleep(1.0)
    assert find_run(tracker.client, unborn) is None
    found: list[TrackedRun] = []
    creating = Sender(unborn, Spool(tmp_path / "driver.jsonl"), creates=True, found=found.append)
    creating.log({"op": "tags", "tags": {"a": "b"}})
    assert creating.close(30)
    assert waiting.close(30)
    [run] = found
    assert run.run_id == find_run(tracker.client, unborn)
    assert history(tracker, run) == [(1, 1.0)]
    made = tracker.client.get_run(str(run.run_id))
    assert made.info.start_time == unborn.began_ms
    assert made.data.tags["a"] == "b"
    assert read_card(open_place(str(tmp_path), "test")).run_id == run.run_id


def test_creating_again_finds_what_was_created(
    tmp_path: Path, tracker: Tracker, unborn: TrackedRun
) -> None:
    for attempt in range(2):
        sender = Sender(unborn, Spool(tmp_path / f"{attempt}.jsonl"), creates=True)
        sender.log({"op": "tags", "tags": {"attempt": str(attempt)}})
        assert sender.close(30)
    found = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`effdet.run_key` = '{unborn.run_key}'"
    )
    assert len(found) == 1


def test_unsent_records_lie_beside_the_checkpoints_and_another_node_sends_them(
    path: Path, tmp_path: Path, tracker: Tracker, tracked: TrackedRun, closed_port: int
) -> None:
    carried = open_place(str(tmp_path / "checkpoints" / "records"), "test")
    dead = replace(tracked, tracking_uri=f"http://127.0.0.1:{closed_port}")
    lost = Sender(dead, Spool(path), carry_to=carried)
    lost.log(metrics_record(1, {LOSS: 1.0}))
    lost.carry()  # as before each commit of a checkpoint
    lost.log(metrics_record(2, {LOSS: 2.0}))
    assert not lost.close(0.1)

    elsewhere = tmp_path / "another node" / "rank0.jsonl"
    sender = Sender(tracked, open_spool(elsewhere, carried), carry_to=carried)
    sender.log(metrics_record(3, {LOSS: 3.0}))
    assert sender.close(30)
    assert history(tracker, tracked) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert carried.filesystem.ls(carried.path) == []  # nothing is left to be sent


def test_what_this_node_has_is_not_taken_over_again(
    path: Path, tmp_path: Path, tracked: TrackedRun, closed_port: int
) -> None:
    carried = open_place(str(tmp_path / "checkpoints" / "records"), "test")
    dead = replace(tracked, tracking_uri=f"http://127.0.0.1:{closed_port}")
    sender = Sender(dead, Spool(path), carry_to=carried)
    sender.log(metrics_record(1, {LOSS: 1.0}))
    assert not sender.close(0.1)
    size = path.stat().st_size
    open_spool(path, carried)
    assert path.stat().st_size == size


def test_carried_now_and_then_while_the_tracker_is_away(
    path: Path,
    tmp_path: Path,
    tracked: TrackedRun,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CARRY_EVERY_S", 0.0)
    carried = open_place(str(tmp_path / "carried"), "test")
    dead = replace(tracked, tracking_uri=f"http://127.0.0.1:{closed_port}")
    sender = Sender(dead, Spool(path), carry_to=carried)
    sender.log(metrics_record(1, {LOSS: 1.0}))
    end = time.monotonic() + 20
    while not (tmp_path / "carried" / path.name).exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (tmp_path / "carried" / CARD).exists()
    sender.close(0.1)


def test_password_of_the_tracker_is_in_no_file(
    path: Path, tmp_path: Path, tracked: TrackedRun, closed_port: int
) -> None:
    carried = open_place(str(tmp_path / "carried"), "test")
    run = replace(tracked, tracking_uri=f"http://user:planted@127.0.0.1:{closed_port}")
    sender = Sender(run, Spool(path), carry_to=carried)
    sender.log(metrics_record(1, {LOSS: 1.0}))
    sender.close(0.1)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 4
    assert [file for file in files if "planted" in file.read_text()] == []


def test_storage_that_fails_is_said_and_the_rest_stays(
    path: Path, tracked: TrackedRun, closed_port: int, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    sender = Sender(
        replace(tracked, tracking_uri=f"http://127.0.0.1:{closed_port}"), Spool(path),
        carry_to=open_place(str(tmp_path / "file" / "records"), "test"), say=said.append,
    )  # fmt: skip
    record: dict[str, Any] = metrics_record(1, {LOSS: 1.0})
    sender.log(record)
    assert not sender.close(0.1)
    assert "stay in" in said[-1]
    assert Spool(path).read(0, 9)[0] == [record]
