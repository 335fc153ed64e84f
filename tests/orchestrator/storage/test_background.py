from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.config.schema import CheckpointConfig
from orchestrator.errors import StorageError
from orchestrator.storage.background import PATIENCE_S, BackgroundStore
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import open_place

FOR_EVER = int(PATIENCE_S)

Write = Callable[[Path], None]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> BackgroundStore:
    place = open_place(str(tmp_path / "run"), "test")
    plain = CheckpointStore(place, CheckpointConfig(keep_latest=10), say=said.append)
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return BackgroundStore(plain, sleep=sleep, clock=lambda: now[0])


def failing(write: Write, times: int) -> Write:
    left = [times]

    def fill(folder: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError("503 slow down")
        write(folder)

    return fill


def test_training_does_not_wait_for_the_disk(
    store: BackgroundStore, write: Callable[..., Write]
) -> None:
    disk = threading.Event()

    def slow(folder: Path) -> None:
        assert disk.wait(10)
        write(1)(folder)

    store.save(1, {}, slow)  # returns although nothing is written
    assert store.store.steps() == []
    disk.set()
    store.close()
    assert store.store.steps() == [1]


def test_steps_are_committed_in_order_and_restore_sees_the_last(
    store: BackgroundStore, write: Callable[..., Write]
) -> None:
    for step in (1, 2, 3):
        store.save(step, {}, write(step))
        store.wait()
    assert store.newest_valid() == 3
    with store.open(3) as folder:
        assert (folder / "meta.json").is_file()
    assert store.store.steps() == [1, 2, 3]


def test_the_newest_and_the_newest_scored_wait_for_a_slow_storage(
    store: BackgroundStore, write: Callable[..., Write], said: list[str]
) -> None:
    disk, begun = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        begun.set()
        assert disk.wait(10)
        write(1)(folder)

    store.save(1, {}, slow)
    assert begun.wait(10)
    for step, metrics in (
        (2, {}),
        (3, {"val/AP": 0.1}),
        (4, {}),
        (5, {"val/AP": 0.2}),
        (6, {}),
        (7, {}),
    ):
        store.save(step, metrics, write(step, metrics.get("val/AP")))
    disk.set()
    store.close()
    # What was evaluated is not pushed out by what was not; never more than two wait.
    assert store.store.steps() == [1, 5, 7]
    assert store.figures()["perf/checkpoints_skipped"] == 4
    assert said == [
        "the storage is slower than training: the checkpoint of step 2 gave way to that of step 3"
    ]


def test_a_failing_storage_is_tried_again(
    store: BackgroundStore, write: Callable[..., Write], said: list[str]
) -> None:
    store.save(1, {}, failing(write(1), 20))
    store.close()
    assert store.store.steps() == [1]
    assert said == [
        "the checkpoint of step 1 is tried again: 503 slow down",
        "the checkpoint of step 1 is saved after all",
    ]


def test_a_lost_checkpoint_does_not_stop_training_and_a_later_one_heals(
    store: BackgroundStore, write: Callable[..., Write], said: list[str]
) -> None:
    store.save(1, {}, failing(write(1), FOR_EVER))
    store.wait()
    store.save(2, {}, write(2))
    store.close()
    assert store.failures == 1
    assert store.store.steps() == [2]
    assert "the checkpoint of step 1 was given up: 503 slow down" in said


def test_a_run_whose_last_checkpoint_was_lost_is_no_success(
    store: BackgroundStore, write: Callable[..., Write]
) -> None:
    store.save(1, {}, write(1))
    store.wait()
    store.save(2, {}, failing(write(2), FOR_EVER))
    with pytest.raises(StorageError, match=r"checkpoint of step 2.*503 slow down"):
        store.close()
    assert store.store.steps() == [1]


@pytest.mark.integration
def test_a_full_disk_is_waited_for(
    tmp_path: Path, write: Callable[..., Write], said: list[str]
) -> None:
    """A real one: what was there stays whole, and what is saved later is saved."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = _mount("-t", "tmpfs", "-o", "size=64k", "none", str(disk))
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        plain = CheckpointStore(open_place(str(disk), "test"), CheckpointConfig(), say=said.append)
        store = BackgroundStore(plain, sleep=lambda seconds: time.sleep(0.02))
        store.save(1, {}, write(1))
        store.wait()
        ballast = disk / "ballast"
        with suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        store.save(2, {}, write(2))
        while not said:
            time.sleep(0.02)
        assert said[0].startswith("the checkpoint of step 2 is tried again: ")
        assert "No space left on device" in said[0]
        assert plain.newest_valid() == 1
        ballast.unlink()
        store.close()
        assert plain.steps() == [1, 2]
        assert not list(disk.glob(".writing-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(arguments, 1, "", str(error))
