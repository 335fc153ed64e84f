from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem
from helpers import ROOT

from orchestrator.config.predict_cli import ResultFormat
from orchestrator.errors import ConfigError
from orchestrator.storage.filesystems import Place, open_place
from orchestrator.storage.merging import merge
from orchestrator.storage.predictions import Failure, Part, PredictionFolder, rows_name

PLAN = {"images": 9, "images_sha256": "abc", "score": 0.3, "every_s": None}


def row(image_id: int, **more: Any) -> dict[str, Any]:
    return {
        "image_id": image_id, "category_id": 3, "bbox": [1.5, 0.1, 1 / 3, 4.0], "score": 0.1,
        "category": 'a "b"\n', "file_name": "é\\udce9.jpg", **more,
    }  # fmt: skip


def folder_at(uri: Path | str) -> PredictionFolder:
    folder = PredictionFolder(open_place(str(uri), "--output"))
    with folder.alone():
        folder.begin(PLAN, fresh=False)
    return folder


def put(folder: PredictionFolder, number: int, *rows: dict[str, Any], failed: int = 0) -> Part:
    content = "".join(json.dumps(one) + "\n" for one in rows).encode()
    folder.write(f"parts/{rows_name(number)}", content)
    why = tuple(Failure(f"{number}-{k}.jpg", "broken") for k in range(failed))
    part = Part(number, len(rows), len(rows), len(content), "cpu", why)
    folder.commit(part)
    return part


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> PredictionFolder:
    if request.param == "s3":
        return folder_at(f"s3://{request.getfixturevalue('bucket')}/found/here")
    return folder_at(tmp_path / "found" / "here")


def test_a_plan_is_taken_up_again_and_no_other(folder: PredictionFolder) -> None:
    folder.begin(dict(PLAN), fresh=False)
    folder.check_reached(PLAN)
    put(folder, 0, row(1))
    with pytest.raises(ConfigError, match=r"--output: expected a new folder.*--fresh") as refused:
        folder.begin(PLAN | {"images_sha256": "def", "score": 0.5}, fresh=False)
    assert "with another: other images, score 0.3 (now 0.5);" in str(refused.value)
    assert folder.plan() == PLAN
    with pytest.raises(ConfigError, match="a folder that every node reaches"):
        folder.check_reached(PLAN | {"score": 0.5})


def test_fresh_replaces_what_a_prediction_wrote_and_nothing_else(folder: PredictionFolder) -> None:
    put(folder, 0, row(1))
    for name in ("drawn/a/b.jpg", "detections.json", "report.json", "mine.txt"):
        folder.write(name, b"{}")
    other = PLAN | {"score": 0.5}
    folder.begin(other, fresh=True)
    assert folder.plan() == other
    assert folder.done() == {}
    assert folder.report() is None
    there = {name: folder.has(name) for name in ("drawn/a/b.jpg", "detections.json", "mine.txt")}
    assert there == {"drawn/a/b.jpg": False, "detections.json": False, "mine.txt": True}


def test_a_fresh_start_that_breaks_off_leaves_no_part_without_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, left = PredictionFolder._remove, 0

    def breaking(self: PredictionFolder, name: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        remove(self, name)

    monkeypatch.setattr(PredictionFolder, "_remove", breaking)
    for steps in range(7):
        folder = folder_at(tmp_path / str(steps))
        put(folder, 0, row(1))
        folder.write("drawn/b.jpg", b"")
        left = steps
        with pytest.raises(KeyboardInterrupt):
            folder.begin(PLAN, fresh=True)
        assert folder.plan() == PLAN
        assert folder.has("drawn/b.jpg") or folder.done() == {}


@pytest.mark.parametrize("content", [b"", b'{"images": 9, "ima', b"[]", b"\xff"])
def test_a_plan_or_report_that_was_cut(tmp_path: Path, content: bytes) -> None:
    folder = folder_at(tmp_path)
    folder.write("report.json", content)
    assert folder.report() is None
    folder.write("plan.json", content)
    for ask in (folder.plan, lambda: folder.begin(PLAN, fresh=False)):
        with pytest.raises(
            ConfigError, match=r"--output: expected a plan\.json that is whole.*--fr"
        ):
            ask()
    folder.begin(PLAN, fresh=True)
    assert folder.plan() == PLAN


class Faulty(LocalFileSystem):  # type: ignore[misc]
    """Every first call of a kind fails."""

    protocol = "faulty"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def _fail(self, name: str) -> None:
        if name not in self.called:
            self.called.add(name)
            raise OSError("the link is down")

    def exists(self, path: str, **more: Any) -> bool:
        self._fail("exists")
        return bool(super().exists(path, **more))

    def find(self, path: str, *more: Any, **options: Any) -> Any:
        self._fail("find")
        return super().find(path, *more, **options)

    def rm(self, path: str, *more: Any, **options: Any) -> None:
        self._fail("rm")
        super().rm(path, *more, **options)


def test_a_storage_that_fails_for_a_moment(tmp_path: Path) -> None:
    part = put(folder_at(tmp_path), 0, row(1))
    filesystem = Faulty()
    folder = PredictionFolder(Place(str(tmp_path), filesystem, str(tmp_path)))
    assert folder.done() == {0: part}
    folder.remove_parts()
    assert not folder.has("parts")
    assert filesystem.called == {"exists", "find", "rm"}


def test_only_what_is_committed_is_done(folder: PredictionFolder) -> None:
    assert folder.done() == {}
    first = put(folder, 0, row(1), row(2))
    second = put(folder, 7, failed=2)
    folder.write(f"parts/{rows_name(3)}", b"{}\n")  # without its summary
    cut = put(folder, 4, row(1))
    folder.write(f"parts/{rows_name(4)}", b"")  # a name that outlived its content
    assert cut.rows_bytes > 0
    folder.write("parts/00000005.json", b'{"number": 5, "ima')
    assert folder.done() == {0: first, 7: Part(7, 0, 0, 0, "cpu")}
    assert [part.number for part in folder.summaries([7, 0]) if part] == [7, 0]
    assert next(folder.summaries([7])) == second
    assert folder.write_failed(8) == 2
    failed = json.loads(folder.place.filesystem.cat_file(f"{folder.place.path}/failed.json"))
    assert failed == [{"file_name": f"7-{k}.jpg", "problem": "broken"} for k in range(2)]


def test_the_end_removes_the_parts(folder: PredictionFolder) -> None:
    put(folder, 0, row(1))
    assert folder.write_failed(1) == 0
    folder.finish({"status": "finished"})
    left = folder.place.filesystem.find(folder.place.path)
    assert sorted(path.rpartition("/")[2] for path in left) == ["plan.json", "report.json"]
    assert folder.report() == {"status": "finished"}


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_rows_are_merged_in_order(
    folder: PredictionFolder, form: ResultFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.storage.merging.CHUNK_BYTES", 300)
    expected = []
    for number in range(12):
        rows = [row(k, frame=k, time_s=k / 10) for k in range(number % 4)]
        put(folder, number, *rows)
        expected += [one | {"image_id": one["image_id"] + 100 * number} for one in rows]
    target = tmp_path / f"merged.{form}"
    merge(folder.all_rows((number, 100 * number) for number in range(12)), target, form)
    if form == "json":
        assert json.loads(target.read_text()) == expected
    else:
        found = pyarrow.parquet.read_table(target).to_pylist()
        assert [one.pop("frame") for one in found] == [one.pop("frame") for one in expected]
        sides = [[one.pop(side) for side in ("x", "y", "width", "height")] for one in found]
        assert sides == [one.pop("bbox") for one in expected]
        assert found == expected


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_no_rows_are_an_empty_file(tmp_path: Path, form: ResultFormat) -> None:
    folder = folder_at(tmp_path / "out")
    put(folder, 0)
    target = tmp_path / "merged"
    merge(folder.all_rows([(0, 0)]), target, form)
    if form == "json":
        assert target.read_text() == "[\n]\n"
    else:
        assert pyarrow.parquet.read_table(target).num_rows == 0


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "out")
    folder.write("results", b"before")

    def break_off() -> None:
        with folder.writing("results") as draft:
            draft.write_bytes(b"half of it")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert (tmp_path / "out" / "results").read_bytes() == b"before"
    assert list((tmp_path / "out" / "parts").iterdir()) == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "out")
    code = (
        "from orchestrator.storage.predictions import PredictionFolder\n"
        "from orchestrator.storage.filesystems import open_place\n"
        f"with PredictionFolder(open_place({str(tmp_path / 'out')!r}, '')).alone():\n"
        "    print('there', flush=True)\n    input()"
    )
    with (
        other_process(code) as pid,
        pytest.raises(ConfigError, match=f"written by process {pid}; wait for it"),
        folder.alone(),
    ):
        pass
    with folder.alone():  # it was killed
        pass
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_lock_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who held it ended between our opening the file and locking it."""
    folder, locked, lock = folder_at(tmp_path), [], fcntl.flock

    def late(file: Any, how: int) -> None:
        if not locked:
            (tmp_path / ".lock").unlink()
        lock(file, how)
        locked.append(os.fstat(file.fileno()).st_ino)

    monkeypatch.setattr("fcntl.flock", late)
    with folder.alone():
        assert len(locked) == 2
        assert (tmp_path / ".lock").stat().st_ino == locked[-1]
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_share_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unknown(file: Any, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", unknown)
    put(folder_at(tmp_path), 0, row(1))
    assert not (tmp_path / ".lock").exists()


@contextmanager
def other_process(code: str) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()
