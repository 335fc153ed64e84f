from __future__ import annotations

import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import TrackingError
from orchestrator.records.run import TrackedRun
from orchestrator.records.runs import Runs
from orchestrator.records.tracker import OUTCOME, RUN_KEY, Tracker
from orchestrator.storage.filesystems import open_place


@pytest.fixture
def key() -> str:
    """Of a configuration no other test has."""
    return uuid.uuid4().hex


@pytest.fixture
def runs(tracker: Tracker, tmp_path: Path) -> Runs:
    return open_runs(tracker.uri, tmp_path)


def open_runs(uri: str, folder: Path) -> Runs:
    """As a process does that keeps its cards in a folder."""
    return Runs(uri, "tests", None, [open_place(str(folder / "cards"), "test")], say=print)


def begin(runs: Runs, key: str, resume: str = "auto") -> TrackedRun:
    run = runs.open(name="a run", key=key, resume=resume)
    runs.cards.keep(run)
    return run


def status(tracker: Tracker, run: TrackedRun) -> str:
    return str(tracker.client.get_run(str(run.run_id)).info.status)


def end(tracker: Tracker, run: TrackedRun, ended: str, outcome: str) -> None:
    tracker.client.set_tag(str(run.run_id), OUTCOME, outcome)
    tracker.client.set_terminated(str(run.run_id), ended)


@pytest.fixture
def dead(closed_port: int) -> str:
    return f"http://user:planted@127.0.0.1:{closed_port}"


def test_new_run_is_running_under_its_name_with_a_key_made_here(
    tracker: Tracker, runs: Runs, key: str
) -> None:
    run = begin(runs, key)
    assert not run.continued
    there = tracker.get(str(run.run_id))
    assert run.artifact_uri == there.info.artifact_uri
    assert there.info.run_name == "a run"
    assert there.data.tags[RUN_KEY] == run.run_key
    assert status(tracker, run) == "RUNNING"


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize(
    ("ended", "outcome"), [(None, ""), ("KILLED", "interrupted"), ("FAILED", "failed")]
)
def test_unfinished_run_of_the_same_key_goes_on(
    tracker: Tracker, runs: Runs, key: str, ended: str | None, outcome: str, resume: str
) -> None:
    first = begin(runs, key)
    if ended is not None:
        end(tracker, first, ended, outcome)
    second = begin(runs, key, resume)
    assert (second.run_id, second.run_key) == (first.run_id, first.run_key)
    assert second.continued


@pytest.mark.parametrize(("ended", "outcome"), [("FINISHED", "finished"), ("FAILED", "diverged")])
def test_finished_or_diverged_run_does_not_go_on(
    tracker: Tracker, runs: Runs, key: str, ended: str, outcome: str
) -> None:
    first = begin(runs, key)
    end(tracker, first, ended, outcome)
    second = begin(runs, key)
    assert second.run_id != first.run_id
    assert not second.continued


def test_newest_unfinished_run_goes_on(runs: Runs, key: str) -> None:
    begin(runs, key)
    time.sleep(0.005)  # start times are milliseconds
    newest = begin(runs, key, "never")
    assert not newest.continued
    assert begin(runs, key).run_id == newest.run_id


def test_other_keys_do_not_go_on(runs: Runs, key: str) -> None:
    assert begin(runs, key).run_id != begin(runs, key + "0").run_id


def test_resume_by_run_id(runs: Runs, key: str) -> None:
    first = begin(runs, key)
    begin(runs, key, "never")
    assert begin(runs, key, str(first.run_id)).run_id == first.run_id


@pytest.mark.parametrize("resume", ["must", "0123456789abcdef"])
def test_nothing_to_resume_is_a_user_error(runs: Runs, key: str, resume: str) -> None:
    with pytest.raises(TrackingError, match=r"^--resume: expected ") as caught:
        begin(runs, key, resume)
    assert "\n" not in str(caught.value)


def test_run_that_began_goes_on_without_the_tracker(
    runs: Runs, key: str, tmp_path: Path, dead: str
) -> None:
    first = begin(runs, key)
    offline = open_runs(dead, tmp_path)
    said = offline.check(key, resume="auto", required=True)
    assert said is not None
    assert "does not answer" in said
    assert "planted" not in said
    second = begin(offline, key)
    assert (second.run_id, second.run_key, second.continued) == (first.run_id, first.run_key, True)
    assert second.tracking_uri == dead  # with today's password, which no card holds
    assert begin(offline, key, str(first.run_id)).run_key == first.run_key


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_first_start_needs_the_tracker(key: str, tmp_path: Path, dead: str, resume: str) -> None:
    offline = open_runs(dead, tmp_path)
    with pytest.raises(
        TrackingError, match=r"^tracking\.uri: .*tracking\.required=false"
    ) as caught:
        offline.check(key, resume=resume, required=True)
    assert "planted" not in str(caught.value)


def test_first_start_without_the_tracker_where_it_is_not_required(
    tracker: Tracker, key: str, tmp_path: Path, dead: str
) -> None:
    offline = open_runs(dead, tmp_path)
    assert offline.check(key, resume="auto", required=False)
    first = begin(offline, key)
    assert first.run_id is None
    # It answers again before anything was sent: the same run, not a second one.
    online = open_runs(tracker.uri, tmp_path)
    assert online.check(key, resume="auto", required=True) is None
    second = begin(online, key)
    assert (second.run_key, second.continued) == (first.run_key, True)


def test_ended_run_does_not_go_on_by_its_card(key: str, tmp_path: Path, dead: str) -> None:
    offline = open_runs(dead, tmp_path)
    first = begin(offline, key)
    offline.cards.keep(replace(first, outcome="finished"))
    assert offline.unfinished(key) is None
    assert begin(offline, key).run_key != first.run_key


def test_card_is_found_beside_the_checkpoints_too(
    key: str, tmp_path: Path, dead: str, bucket: str
) -> None:
    """A pod that comes back has nothing of its disk."""

    def places(node: str) -> Runs:
        uris = (str(tmp_path / node), f"s3://{bucket}/checkpoints")
        return Runs(dead, "tests", None, [open_place(uri, "test") for uri in uris], say=print)

    first = begin(places("one"), key)
    assert begin(places("another"), key).run_key == first.run_key


def test_card_that_is_damaged_or_cannot_be_kept_is_no_obstacle(
    key: str, tmp_path: Path, dead: str
) -> None:
    offline = open_runs(dead, tmp_path)
    begin(offline, key)
    [card] = (tmp_path / "cards").rglob("*.json")
    card.write_text('{"name": ')
    assert offline.unfinished(key) is None
    card.unlink()
    card.parent.rmdir()
    card.parent.write_text("")
    said: list[str] = []
    offline.cards.say = said.append
    begin(offline, key)
    assert "card was not kept" in said[0]


def test_newer_run_that_is_not_sent_yet_goes_on(
    tracker: Tracker, runs: Runs, key: str, tmp_path: Path, dead: str
) -> None:
    """--fresh while MLflow was away: not the older unfinished run that it knows."""
    begin(runs, key)
    time.sleep(0.005)
    fresh = begin(open_runs(dead, tmp_path), key, "never")
    assert begin(open_runs(tracker.uri, tmp_path), key).run_key == fresh.run_key


def test_run_that_ended_while_the_tracker_was_away_does_not_go_on(runs: Runs, key: str) -> None:
    """MLflow still calls it running."""
    run = begin(runs, key)
    runs.cards.keep(replace(run, outcome="diverged"))
    assert runs.unfinished(key) is None


def test_tracker_that_stops_answering_is_as_one_that_never_did(
    runs: Runs, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(runs, key)
    assert runs.tracker is not None

    def away(key: str) -> None:
        raise ConnectionError("lost")

    monkeypatch.setattr(runs.tracker, "find_unfinished", away)
    second = runs.unfinished(key)
    assert second is not None
    assert second.run_key == first.run_key
    assert runs.tracker is None
    assert runs.trouble is not None
    assert runs.artifact_location() == ""
    assert runs.check_artifacts(required=True) is None


def test_artifacts_that_cannot_be_written_are_said_or_refused(
    tracker: Tracker, key: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    root = (tmp_path / "file" / "artifacts").as_uri()
    closed = Runs(tracker.uri, f"closed-{key}", root, [], say=print)
    said = closed.check_artifacts(required=False)
    assert said is not None
    assert "they wait" in said
    with pytest.raises(TrackingError, match=r"^tracking\.experiment: "):
        closed.check_artifacts(required=True)
