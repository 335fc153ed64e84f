from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest

from orchestrator.errors import TrackingError
from orchestrator.records.tracker import MAX_PARAM_CHARS, MAX_PARAMS, OUTCOME, TrackedRun, Tracker


@pytest.fixture
def key() -> str:
    """Of a configuration no other test has."""
    return uuid.uuid4().hex


def begin(tracker: Tracker, key: str, resume: str = "auto") -> TrackedRun:
    return tracker.open_run(name="a run", key=key, resume=resume)


def status(tracker: Tracker, run: TrackedRun) -> str:
    return str(tracker.client.get_run(run.run_id).info.status)


def test_new_run_is_running_under_its_name(tracker: Tracker, key: str) -> None:
    run = begin(tracker, key)
    assert not run.continued
    assert run.tracking_uri == tracker.uri
    assert run.artifact_uri == tracker.get(run.run_id).info.artifact_uri
    assert tracker.get(run.run_id).info.run_name == "a run"
    assert status(tracker, run) == "RUNNING"


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize(
    ("ended", "outcome"), [(None, ""), ("KILLED", "interrupted"), ("FAILED", "failed")]
)
def test_unfinished_run_of_the_same_key_goes_on(
    tracker: Tracker, key: str, ended: str | None, outcome: str, resume: str
) -> None:
    first = begin(tracker, key)
    if ended is not None:
        tracker.end(first.run_id, status=ended, outcome=outcome)
    second = begin(tracker, key, resume)
    assert second.run_id == first.run_id
    assert second.continued
    assert status(tracker, second) == "RUNNING"


@pytest.mark.parametrize(("ended", "outcome"), [("FINISHED", "finished"), ("FAILED", "diverged")])
def test_finished_or_diverged_run_does_not_go_on(
    tracker: Tracker, key: str, ended: str, outcome: str
) -> None:
    first = begin(tracker, key)
    tracker.end(first.run_id, status=ended, outcome=outcome)
    assert status(tracker, first) == ended
    assert tracker.get(first.run_id).data.tags[OUTCOME] == outcome
    second = begin(tracker, key)
    assert second.run_id != first.run_id
    assert not second.continued


def test_newest_unfinished_run_goes_on(tracker: Tracker, key: str) -> None:
    begin(tracker, key)
    time.sleep(0.005)  # start times are milliseconds
    newest = begin(tracker, key, "never")
    assert not newest.continued
    assert begin(tracker, key).run_id == newest.run_id


def test_other_keys_do_not_go_on(tracker: Tracker, key: str) -> None:
    assert begin(tracker, key).run_id != begin(tracker, key + "0").run_id


def test_resume_by_run_id(tracker: Tracker, key: str) -> None:
    first = begin(tracker, key)
    begin(tracker, key, "never")
    assert begin(tracker, key, first.run_id).run_id == first.run_id


@pytest.mark.parametrize("resume", ["must", "0123456789abcdef"])
def test_nothing_to_resume_is_a_user_error(tracker: Tracker, key: str, resume: str) -> None:
    with pytest.raises(TrackingError, match=r"^--resume: expected ") as caught:
        begin(tracker, key, resume)
    assert "\n" not in str(caught.value)


def test_describing_again_keeps_what_was_said_and_adds_the_rest(
    tracker: Tracker, run_id: str
) -> None:
    many = {f"p{number}": number for number in range(2 * MAX_PARAMS + 1)}
    tracker.describe(run_id, {"model.phi": "0", **many}, {"commit": "a"})
    tracker.describe(run_id, {"model.phi": "1", "new": None, "long": "x" * 9999}, {"commit": "b"})
    data = tracker.get(run_id).data
    assert data.params["model.phi"] == "0"
    assert {name: data.params[name] for name in many} == {n: str(v) for n, v in many.items()}
    assert data.params["new"] == "None"
    assert data.params["long"] == "x" * MAX_PARAM_CHARS
    assert data.tags["commit"] == "b"


def test_experiment_is_found_again(tracker: Tracker, tmp_path: Path) -> None:
    assert Tracker(tracker.uri, "tests", tmp_path).experiment_id == tracker.experiment_id


def test_deleted_experiment_is_a_user_error(tracker: Tracker, tmp_path: Path) -> None:
    deleted = Tracker(tracker.uri, "deleted", tmp_path)
    deleted.client.delete_experiment(deleted.experiment_id)
    with pytest.raises(TrackingError, match=r"^tracking\.experiment: .*'deleted', deleted"):
        Tracker(tracker.uri, "deleted", tmp_path)


@pytest.mark.parametrize("user", ["", "user:secret@", "user:se@cret@"])
def test_server_that_is_down_is_told_soon_and_without_secrets(
    tmp_path: Path, closed_port: int, user: str
) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker(f"http://{user}127.0.0.1:{closed_port}", "tests", tmp_path)
    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert message.startswith("tracking.uri: expected ")
    assert f"http://127.0.0.1:{closed_port} (" in message
    assert "cret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "uri", ["nonsense://user:secret@there", "oracle://user:secret@127.0.0.1:1/x"]
)
def test_unknown_tracker_is_a_user_error_without_secrets(tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrackingError) as caught:
        Tracker(uri, "tests", tmp_path)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_database_in_an_impossible_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"^tracking\.uri: "):
        Tracker(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", "tests", tmp_path)
