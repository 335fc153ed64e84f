from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.records.spool import MAX_BATCH, MetricSender, Spool
from orchestrator.records.tracker import Tracker

LOSS = "train/loss"


def send(tracker: Tracker, run_id: str, path: Path, values: dict[int, float]) -> None:
    """Log step -> value as one process does, to its end."""
    sender = MetricSender(tracker.uri, run_id, Spool(path))
    for step, value in values.items():
        sender.log(step, {LOSS: value})
    assert sender.close()
    assert sender.lost == 0


def history(tracker: Tracker, run_id: str, key: str = LOSS) -> list[tuple[int, float]]:
    """(step, value) of everything the run has, ascending."""
    found = tracker.client.get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "run.jsonl"


@pytest.fixture(params=["closed", "hung"])
def dead_uri(request: pytest.FixtureRequest, closed_port: int) -> Iterator[str]:
    """A server that refuses connections, and one that takes them and never answers."""
    with socket.socket() as listener:
        if request.param == "hung":
            listener.bind(("127.0.0.1", closed_port))
            listener.listen()
        yield f"http://127.0.0.1:{closed_port}"


def test_records_are_read_back_in_parts(path: Path) -> None:
    spool = Spool(path)
    for step in range(5):
        spool.append(step, {LOSS: step / 10, "train/lr": 0.1})
    first, position = spool.read(0, limit=3)
    rest, end = spool.read(position, limit=3)
    assert [record["step"] for record in first + rest] == [0, 1, 2, 3, 4]
    assert rest[-1]["metrics"] == {LOSS: 0.4, "train/lr": 0.1}
    assert spool.read(end, limit=3) == ([], end)


def test_position_survives(path: Path) -> None:
    spool = Spool(path)
    assert spool.position() == 0
    spool.append(1, {LOSS: 1.0})
    spool.set_position(17)
    spool.close()
    assert Spool(path).position() == 17


@pytest.mark.parametrize("text", ["", "1x"])
def test_damaged_position_means_from_the_start(path: Path, text: str) -> None:
    Spool(path).position_path.write_text(text)
    assert Spool(path).position() == 0


def test_line_torn_by_a_kill_is_skipped_and_its_step_logged_again(
    path: Path, tracker: Tracker, run_id: str
) -> None:
    spool = Spool(path)
    for step in (1, 2, 3):
        spool.append(step, {LOSS: float(step)})
    spool.close()
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 9)
    send(tracker, run_id, path, {3: 30.0, 4: 4.0})
    assert history(tracker, run_id) == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 4.0)]


def test_line_still_being_written_is_not_read(path: Path) -> None:
    spool = Spool(path)
    spool.append(1, {LOSS: 1.0})
    _, whole = spool.read(0, limit=9)
    with path.open("a") as file:
        file.write('{"step": 2, "metr')
    assert spool.read(whole, limit=9) == ([], whole)


def test_everything_is_sent_with_the_time_it_was_logged(
    path: Path, tracker: Tracker, run_id: str
) -> None:
    before = int(time.time() * 1000)
    send(tracker, run_id, path, {step: step / 10 for step in range(30)})
    assert history(tracker, run_id) == [(step, step / 10) for step in range(30)]
    found = tracker.client.get_metric_history(run_id, LOSS)
    assert all(before <= metric.timestamp <= time.time() * 1000 for metric in found)
    assert Spool(path).position() == path.stat().st_size


def test_replaying_the_whole_file_adds_nothing(path: Path, tracker: Tracker, run_id: str) -> None:
    values = {step: step / 10 for step in range(20)}
    send(tracker, run_id, path, values)
    Spool(path).set_position(0)
    send(tracker, run_id, path, {})
    assert history(tracker, run_id) == list(values.items())


def test_steps_run_again_elsewhere_add_nothing(
    path: Path, tmp_path: Path, tracker: Tracker, run_id: str
) -> None:
    send(tracker, run_id, path, {1: 1.0, 2: 2.0, 3: 3.0})
    send(tracker, run_id, tmp_path / "another node.jsonl", {2: 2.5, 3: 3.5, 4: 4.0})
    assert history(tracker, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_dead_tracker_costs_training_nothing_and_a_later_sender_delivers(
    path: Path, tracker: Tracker, run_id: str, dead_uri: str
) -> None:
    number = MAX_BATCH + 50
    sender = MetricSender(dead_uri, run_id, Spool(path))
    began = time.monotonic()
    for step in range(number):
        sender.log(step, {LOSS: float(step)})
    assert time.monotonic() - began < 2
    began = time.monotonic()
    assert not sender.close(timeout_s=1)
    assert time.monotonic() - began < 2
    send(tracker, run_id, path, {number: 0.5})
    assert [step for step, _ in history(tracker, run_id)] == list(range(number + 1))


def test_nan_is_kept(path: Path, tracker: Tracker, run_id: str) -> None:
    send(tracker, run_id, path, {1: math.nan, 2: 2.0})
    (step, value), other = history(tracker, run_id)
    assert step == 1
    assert math.isnan(value)
    assert other == (2, 2.0)


def test_what_cannot_be_written_down_is_counted_not_raised(
    path: Path, tracker: Tracker, run_id: str
) -> None:
    sender = MetricSender(tracker.uri, run_id, Spool(path))
    sender.log(1, {LOSS: object()})  # type: ignore[dict-item]
    sender.log(2, {LOSS: 2.0})
    assert sender.close()
    sender.log(3, {LOSS: 3.0})
    assert sender.lost == 2
    assert history(tracker, run_id) == [(2, 2.0)]


def test_deleted_run_does_not_keep_the_sender_trying(
    path: Path, tracker: Tracker, run_id: str
) -> None:
    tracker.client.delete_run(run_id)
    sender = MetricSender(tracker.uri, run_id, Spool(path))
    sender.log(1, {LOSS: 1.0})
    assert sender.close(timeout_s=5)
    assert sender.lost == 1
