from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from model.training.state import META, WEIGHTS, read_metrics, read_progress
from orchestrator.config.schema import CheckpointConfig
from orchestrator.errors import CheckpointError
from orchestrator.storage.checkpoints import CheckpointStore, Kept, to_keep
from orchestrator.storage.filesystems import open_place

Write = Callable[..., Callable[[Path], None]]


@pytest.mark.parametrize(
    ("values", "latest", "best", "kept"),
    [
        ({}, 2, 1, set()),
        ({1: 0.1}, 2, 1, {1}),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 2, 0, {2, 3}),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 2, 1, {2, 3}),
        ({1: 0.9, 2: 0.2, 3: 0.3}, 1, 1, {1, 3}),
        ({1: 0.9, 2: 0.8, 3: 0.3, 4: 0.1}, 1, 2, {1, 2, 4}),
        ({1: 0.5, 2: 0.5, 3: 0.1}, 1, 1, {2, 3}),  # the later of a tie
        ({1: None, 2: None, 3: None}, 1, 2, {3}),  # nothing is best before an evaluation
        ({1: 0.0, 2: None, 3: None}, 1, 1, {1, 3}),  # zero is a value
        # Saved by time, between evaluations: they push no evaluated one out.
        ({1: 0.3, 2: 0.2, 3: 0.1, 4: None, 5: None, 6: None}, 2, 1, {1, 2, 3, 5, 6}),
        ({1: -2.0, 2: -1.0, 3: -3.0}, 1, 1, {2, 3}),
        ({1: 0.1, 2: 0.2}, 0, 0, {2}),  # never without any
        ({1: 0.1, 2: 0.2}, 9, 9, {1, 2}),
    ],
)
def test_retention(values: dict[int, float | None], latest: int, best: int, kept: set[int]) -> None:
    found = [Kept(step, value) for step, value in values.items()]
    assert to_keep(found, latest=latest, best=best) == kept
    assert to_keep(found[::-1], latest=latest, best=best) == kept


class Shelf:
    """A store in one place, with what it said and what lies there."""

    def __init__(self, uri: str) -> None:
        self.said: list[str] = []
        self.place = open_place(uri, "checkpoint.uri")
        self.store = CheckpointStore(
            self.place, CheckpointConfig(keep_latest=2, keep_best=1), say=self.said.append
        )

    def path(self, step: int, file: str) -> str:
        return f"{self.place.path}/step_{step:08d}/{file}"

    def change(self, step: int, file: str, how: Callable[[bytes], bytes]) -> None:
        path = self.path(step, file)
        self.place.filesystem.pipe_file(path, how(self.place.filesystem.cat_file(path)))

    def entries(self) -> list[str]:
        if not self.place.filesystem.exists(self.place.path):
            return []
        found = self.place.filesystem.ls(self.place.path, detail=False)
        return sorted(str(entry).rsplit("/", 1)[-1] for entry in found)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    if request.param == "local":
        return Shelf(str(tmp_path / "checkpoints"))
    return Shelf(f"s3://{request.getfixturevalue('bucket')}/run/checkpoints")


def save(shelf: Shelf, write: Write, values: dict[int, float | None]) -> None:
    for step, value in values.items():
        metrics = {} if value is None else {"val/AP": value}
        shelf.store.save(step, metrics, write(step, value))


def opened_step(shelf: Shelf, step: int) -> int:
    with shelf.store.open(step) as folder:
        return read_progress(folder).step


def refused(shelf: Shelf, steps: Iterable[int]) -> None:
    for step in steps:
        with pytest.raises(CheckpointError), shelf.store.open(step):
            pytest.fail("a checkpoint that is not there was opened")


def test_empty_place_has_no_checkpoints(shelf: Shelf) -> None:
    assert shelf.store.steps() == []
    assert shelf.store.newest_valid() is None
    assert shelf.store.best() is None


def test_saved_checkpoint_is_there_whole(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {5: 0.25})
    assert shelf.store.steps() == [5]
    assert shelf.store.newest_valid() == 5
    assert shelf.store.uri(5) == f"{shelf.place.uri}/step_00000005"
    with shelf.store.open(5) as folder:
        assert read_progress(folder).step == 5
        assert read_metrics(folder) == {"val/AP": 0.25}
    assert shelf.said == []


def test_newest_and_best_are_kept(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {1: None, 2: 0.9, 3: 0.1, 4: None, 5: 0.3})
    assert shelf.store.steps() == [2, 3, 4, 5]
    assert shelf.entries() == [f"step_{step:08d}" for step in (2, 3, 4, 5)]
    assert shelf.store.best() == 2
    assert opened_step(shelf, 2) == 2


def test_folder_without_marker_does_not_exist(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {1: 0.1, 2: 0.2})
    shelf.place.filesystem.rm_file(shelf.path(2, META))
    assert shelf.store.steps() == [1]
    assert shelf.store.newest_valid() == 1
    assert shelf.store.best() == 1
    refused(shelf, [2])


def test_missing_step_is_refused(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {1: 0.1})
    refused(shelf, [2])


def test_marker_is_uploaded_last(bucket: str, s3_client: Any, write: Write) -> None:
    shelf = Shelf(f"s3://{bucket}/run")
    uploaded: list[str] = []
    put_file = shelf.place.filesystem.put_file

    def watch(source: str, target: str, **more: Any) -> None:
        there = s3_client.list_objects_v2(Bucket=bucket).get("Contents", [])
        assert not any(found["Key"].endswith(META) for found in there)
        uploaded.append(target.rsplit("/", 1)[-1])
        put_file(source, target, **more)

    shelf.place.filesystem.put_file = watch
    try:
        save(shelf, write, {1: 0.1})
    finally:
        del shelf.place.filesystem.put_file
    assert uploaded[-1] == META
    assert len(uploaded) == 6
    assert opened_step(shelf, 1) == 1


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "truncated": (WEIGHTS, lambda data: data[:-1]),
    "flipped": (WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "emptied": ("train_state.pt", lambda data: b""),
    "torn marker": (META, lambda data: data[: len(data) // 2]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_said_and_the_one_before_used(
    shelf: Shelf, write: Write, damage: str
) -> None:
    save(shelf, write, {1: 0.1, 2: 0.2})
    shelf.change(2, *DAMAGE[damage])
    assert shelf.store.newest_valid() == 1
    (said,) = shelf.said
    assert "step_00000002" in said
    assert "\n" not in said
    refused(shelf, [2])
    assert opened_step(shelf, 1) == 1


def test_only_damaged_checkpoints_are_none(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {1: 0.1})
    shelf.change(1, *DAMAGE["truncated"])
    assert shelf.store.newest_valid() is None


def test_saving_a_step_again_replaces_it(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {1: 0.1, 2: 0.2})
    shelf.change(2, *DAMAGE["flipped"])
    save(shelf, write, {2: 0.7})
    assert shelf.store.steps() == [1, 2]
    assert shelf.store.newest_valid() == 2
    with shelf.store.open(2) as folder:
        assert read_metrics(folder) == {"val/AP": 0.7}


def test_failing_write_leaves_nothing_behind(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {1: 0.1})

    def fail(folder: Path) -> None:
        write(2)(folder)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        shelf.store.save(2, {}, fail)
    assert shelf.entries() == ["step_00000001"]
    assert shelf.store.newest_valid() == 1


def test_other_things_in_the_place_are_left_alone(shelf: Shelf, write: Write) -> None:
    save(shelf, write, {1: 0.1})
    for name in ("notes.txt", "step_1", "step_00000099.old"):
        shelf.place.filesystem.pipe_file(f"{shelf.place.path}/{name}", b"mine")
    save(shelf, write, {2: 0.2, 3: 0.3, 4: 0.4})
    assert shelf.store.steps() == [3, 4]
    assert {"notes.txt", "step_1", "step_00000099.old"} <= set(shelf.entries())


def test_what_a_killed_process_left_is_taken_away(
    bucket: str, s3_client: Any, write: Write, tmp_path: Path
) -> None:
    """Parts of an upload nobody will finish, and a folder without its marker."""
    shelf = Shelf(f"s3://{bucket}/run/checkpoints")
    shelf.store.save(1, {}, write(1))
    shelf.place.filesystem.pipe_file(shelf.path(2, "model.safetensors"), b"half of it")
    other = s3_client.create_multipart_upload(Bucket=bucket, Key="run/other")["UploadId"]
    mine = s3_client.create_multipart_upload(
        Bucket=bucket, Key="run/checkpoints/step_00000002/ema.safetensors"
    )
    s3_client.upload_part(
        Bucket=bucket, Key=mine["Key"], UploadId=mine["UploadId"], PartNumber=1, Body=b"x" * 6
    )
    again = Shelf(f"s3://{bucket}/run/checkpoints")
    again.store.clean()
    assert again.said == [
        "removed what an earlier process had not finished: 1 checkpoint(s), 1 upload(s)"
    ]
    assert again.entries() == ["step_00000001"]
    left = s3_client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["UploadId"] for upload in left] == [other], "nobody else's"
    again.store.clean()
    assert len(again.said) == 1


def test_a_download_that_breaks_off_is_begun_anew(
    bucket: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first attempt left behind must not make a whole checkpoint look damaged."""
    shelf = Shelf(f"s3://{bucket}/run")
    shelf.store.save(1, {}, write(1))
    get, attempts = shelf.place.filesystem.get, []

    def breaking(remote: str, local: str, **more: Any) -> None:
        attempts.append(remote)
        get(remote, local, **more)
        if len(attempts) == 1:
            raise OSError("connection reset")

    monkeypatch.setattr(shelf.place.filesystem, "get", breaking)
    assert opened_step(shelf, 1) == 1
    assert len(attempts) == 2


def test_damaged_newer_checkpoints_push_out_nothing(shelf: Shelf, write: Write) -> None:
    """45 and 50 are damaged, training went on from 20: what it saves then is what is good."""
    save(shelf, write, {20: None, 45: None, 50: None})
    for step in (45, 50):
        shelf.change(step, WEIGHTS, lambda data: data[:-1])
    save(shelf, write, {25: None, 30: None})
    assert shelf.store.steps() == [25, 30, 45, 50]
    assert shelf.store.newest_valid() == 30


class Witnessed:
    """Writes down what it is told, and whether the checkpoint was there by then."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self.seen = shelf, list[tuple[object, ...]]()
        self.broken = False

    def carry(self) -> None:
        if self.broken:
            raise OSError("no room for records")
        self.seen.append(("carry", self.shelf.store.steps()))

    def committed(self, step: int, uri: str, metrics: Mapping[str, float]) -> None:
        assert uri.endswith(f"step_{step:08d}")
        self.seen.append(("committed", step, dict(metrics), self.shelf.store.steps()))

    def dropped(self, step: int) -> None:
        self.seen.append(("dropped", step))


def test_witness_is_told_before_and_after_each_commit(shelf: Shelf, write: Write) -> None:
    """Records are safe before the checkpoint exists that nobody goes back behind."""
    witness = shelf.store.witness = Witnessed(shelf)
    metric = CheckpointConfig().metric
    for step, value in ((1, 0.5), (2, None), (3, 0.1), (4, 0.2)):
        metrics = {} if value is None else {metric: value}
        shelf.store.save(step, metrics, write(step, value))
    assert [entry for entry in witness.seen if entry[0] == "carry"] == [
        ("carry", []), ("carry", [1]), ("carry", [1, 2]), ("carry", [1, 2, 3]),
    ]  # fmt: skip
    assert ("committed", 3, {metric: 0.1}, [1, 2, 3]) in witness.seen
    assert shelf.store.steps() == [1, 3, 4]
    assert [entry for entry in witness.seen if entry[0] == "dropped"] == []  # 2 was never a model
    shelf.store.save(5, {metric: 0.3}, write(5, 0.3))
    assert witness.seen[-1] == ("dropped", 3)


def test_checkpoint_whose_records_cannot_be_carried_is_not_committed(
    shelf: Shelf, write: Write
) -> None:
    witness = shelf.store.witness = Witnessed(shelf)
    witness.broken = True
    with pytest.raises(OSError, match="no room for records"):
        shelf.store.save(1, {}, write(1))
    assert shelf.store.steps() == []
    witness.broken = False
    shelf.store.save(1, {}, write(1))
    assert shelf.store.steps() == [1]
