from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.storage.cache import CachedReader, NodeCache
from orchestrator.storage.filesystems import open_path
from orchestrator.storage.retry import retrying

pytestmark = pytest.mark.integration  # an S3 server


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", limit_bytes=10_000)


def put(client: Any, bucket: str, key: str, body: bytes) -> None:
    client.put_object(Bucket=bucket, Key=key, Body=body)


def test_an_image_is_fetched_once(bucket: str, s3_client: Any, cache: NodeCache) -> None:
    put(s3_client, bucket, "set/images/a.jpg", b"first")
    reader = CachedReader(open_path(f"s3://{bucket}/set/images", "test"), cache)
    assert reader("a.jpg") == b"first"
    put(s3_client, bucket, "set/images/a.jpg", b"second")
    assert pickle.loads(pickle.dumps(reader))("a.jpg") == b"first"
    assert not list(cache.folder.rglob(".part-*"))


def test_places_do_not_mix(bucket: str, s3_client: Any, cache: NodeCache) -> None:
    for place in ("one", "two"):
        put(s3_client, bucket, f"{place}/sub/a.jpg", place.encode())
        reader = CachedReader(open_path(f"s3://{bucket}/{place}", "test"), cache)
        assert reader("sub/a.jpg") == place.encode()


def test_an_image_that_is_not_there_is_no_storage_failure(bucket: str, cache: NodeCache) -> None:
    reader = CachedReader(open_path(f"s3://{bucket}/set", "test"), cache)
    with pytest.raises(FileNotFoundError):
        reader("gone.jpg")


def test_changed_annotations_are_fetched_anew(
    bucket: str, s3_client: Any, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_client, bucket, "train.json", b"{1}")
    path = open_path(f"s3://{bucket}/train.json", "test")
    assert cache.whole(path) == b"{1}"
    fetched = []
    monkeypatch.setattr(
        "orchestrator.storage.cache.fetch", lambda p, *more: fetched.append(p) or b"{2}"
    )
    assert cache.whole(path) == b"{1}"
    assert not fetched
    put(s3_client, bucket, "train.json", b"{2}")  # the same size: the version tells
    assert cache.whole(path) == b"{2}"
    assert len(fetched) == 1


def test_a_damaged_copy_is_fetched_anew(bucket: str, s3_client: Any, cache: NodeCache) -> None:
    put(s3_client, bucket, "train.json", b"{1}")
    path = open_path(f"s3://{bucket}/train.json", "test")
    cache.whole(path)
    (copy,) = [p for p in (cache.folder / "whole").iterdir() if p.suffix != ".lock"]
    copy.write_bytes(b"{")
    assert cache.whole(path) == b"{1}"


def test_the_longest_unused_goes_first(cache: NodeCache) -> None:
    place = cache.folder / "place"
    place.mkdir(parents=True)
    for age, name in enumerate(("new", "middle", "old", "oldest")):
        (place / name).write_bytes(bytes(3_000))
        os.utime(place / name, (1_000_000 - age, 1_000_000 - age))
    cache.shrink()
    assert sorted(p.name for p in place.iterdir()) == ["middle", "new", "old"]
    cache.limit_bytes = 5_000
    cache.shrink()
    assert [p.name for p in place.iterdir()] == ["new"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    bucket: str, s3_client: Any, tmp_path: Path
) -> None:
    put(s3_client, bucket, "a.jpg", b"image")
    (tmp_path / "blocked").write_text("a file where the folder should be")
    cache = NodeCache(tmp_path / "blocked", 1000)
    reader = CachedReader(open_path(f"s3://{bucket}", "test"), cache)
    assert reader("a.jpg") == b"image"


def test_trouble_is_waited_for_and_then_named() -> None:
    pauses: list[float] = []
    left = [3]

    def work() -> str:
        if left[0]:
            left[0] -= 1
            raise OSError("SlowDown")
        return "done"

    assert retrying(work, "s3://b/k", sleep=pauses.append) == "done"
    assert len(pauses) == 3
    assert pauses[0] < 0.31
    assert pauses[2] > 0.39
    left[0] = 10**9
    with pytest.raises(StorageError, match=r"to read s3://b/k, got SlowDown"):
        retrying(work, "s3://b/k", retry_for_s=0.3, sleep=lambda seconds: None)


def test_denied_access_is_said_at_once() -> None:
    def work() -> None:
        raise PermissionError("AccessDenied")

    with pytest.raises(StorageError, match="AccessDenied"):
        retrying(work, "s3://b/k", sleep=lambda seconds: pytest.fail("no use in waiting"))


def test_a_name_cannot_leave_the_cache(bucket: str, s3_client: Any, cache: NodeCache) -> None:
    """An annotation file is somebody else's: its file names must not choose where we write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.storage.cache.fetch", lambda path, *more: b"content")
        reader = CachedReader(open_path(f"s3://{bucket}/set", "test"), cache)
        assert reader("../../../outside.jpg") == b"content"
    assert not list(cache.folder.parent.rglob("outside.jpg"))


def test_images_are_read_ahead(
    bucket: str, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes soon is fetched meanwhile, several at once, never more than there are readers."""
    from orchestrator.storage import cache as module

    names = [f"{number}.jpg" for number in range(40)]
    for name in names:
        put(s3_client, bucket, f"set/{name}", name.encode())
    reader = CachedReader(
        open_path(f"s3://{bucket}/set", "test"), NodeCache(tmp_path / "cache", 10**6)
    )
    busy, most, lock, real = 0, 0, threading.Lock(), module.fetch

    def slow(path: Path, retry_for_s: float) -> bytes:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)
        data = real(path, retry_for_s)
        with lock:
            busy -= 1
        return data

    monkeypatch.setattr(module, "fetch", slow)
    began = time.monotonic()
    reader.ahead([*names, "gone.jpg"])
    assert time.monotonic() - began < 1, "it does not wait"
    end = time.monotonic() + 30
    while not all(reader.cache.has(reader.place, name) for name in names):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert 1 < most <= module.READERS
    monkeypatch.setattr(
        module, "fetch", lambda path, *more: pytest.fail(f"{path} is fetched again")
    )
    assert [reader(name) for name in names] == [name.encode() for name in names]
