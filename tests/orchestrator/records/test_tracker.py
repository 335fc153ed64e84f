from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator.errors import TrackingError
from orchestrator.records.tracker import Tracker


def test_experiment_is_found_again(tracker: Tracker, tmp_path: Path) -> None:
    assert Tracker(tracker.uri, "tests", None).experiment_id == tracker.experiment_id


def test_deleted_experiment_is_a_user_error(tracker: Tracker, tmp_path: Path) -> None:
    deleted = Tracker(tracker.uri, "deleted", tmp_path.as_uri())
    deleted.client.delete_experiment(deleted.experiment_id)
    with pytest.raises(TrackingError, match=r"^tracking\.experiment: .*'deleted', deleted"):
        Tracker(tracker.uri, "deleted", tmp_path.as_uri())


@pytest.mark.parametrize("user", ["", "user:secret@", "user:se@cret@"])
def test_server_that_is_down_is_told_soon_and_without_secrets(
    tmp_path: Path, closed_port: int, user: str
) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker(f"http://{user}127.0.0.1:{closed_port}", "tests", None)
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
        Tracker(uri, "tests", None)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_database_in_an_impossible_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"^tracking\.uri: "):
        Tracker(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", "tests", None)


def test_artifacts_that_cannot_be_written_are_found(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    closed = Tracker(tracker.uri, "nowhere", (tmp_path / "file" / "artifacts").as_uri())
    with pytest.raises(TrackingError, match=r"^tracking\.experiment: .*/file/artifacts"):
        closed.check_artifacts()


def test_probe_of_artifacts_leaves_nothing(tracker: Tracker, tmp_path: Path) -> None:
    opened = Tracker(tracker.uri, "somewhere", (tmp_path / "artifacts").as_uri())
    opened.check_artifacts()
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.parametrize("bucket_is", ["missing", "there"])
def test_bucket_of_artifacts_is_tried(tracker: Tracker, bucket: str, bucket_is: str) -> None:
    name = bucket if bucket_is == "there" else "no-such-bucket"
    on_s3 = Tracker(tracker.uri, f"s3-{bucket}-{bucket_is}", f"s3://{name}/artifacts")
    if bucket_is == "there":
        on_s3.check_artifacts()
        return
    with pytest.raises(TrackingError, match=r"^tracking\.experiment: .*no-such-bucket"):
        on_s3.check_artifacts()
