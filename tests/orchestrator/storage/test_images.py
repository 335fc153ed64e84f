from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from orchestrator.errors import DataError, StorageError, UserError
from orchestrator.storage.filesystems import Place, open_place
from orchestrator.storage.images import (
    ImageFile,
    ImageList,
    fetch,
    image_ids,
    list_images,
    read_batches,
)
from orchestrator.storage.listing import match, walk
from orchestrator.storage.videos import Every, Video

TREE = ("b.jpg", "a/z.jpg", "a.jpg", "a/b/c.PNG", "a-b/x.jpg", "B.jpg", "a/film.mp4", "notes.txt")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "tree"


def names(*sources: str | Path) -> list[str]:
    return [image.name for image in list_images(map(str, sources))]


def test_a_folder_in_the_order_of_its_paths(tree: Path) -> None:
    known = sorted(name for name in TREE if not name.endswith(".txt"))
    assert names(tree) == known == [image.name for image in list_images([f"{tree}/"])]
    assert all(image.read() == image.name.encode() for image in list_images([str(tree)]))


def test_files_folders_and_globs_once_each_in_the_order_given(tree: Path) -> None:
    found = names(tree / "*.jpg", tree, tree / "notes.txt", tree / "a.jpg")
    assert found == [
        "B.jpg", "a.jpg", "b.jpg", "a-b/x.jpg", "a/b/c.PNG", "a/film.mp4", "a/z.jpg", "notes.txt",
    ]  # fmt: skip
    assert names(tree / "a" / "*" / "*") == ["c.PNG"]
    assert names(tree / "**" / "*.jpg") == ["B.jpg", "x.jpg", "a.jpg", "z.jpg", "b.jpg"]
    assert names(tree / "?.jpg") == ["B.jpg", "a.jpg", "b.jpg"]


def test_a_folder_that_is_left_out(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    everything = names(tree)
    for without, gone in (
        (tree / "a", "a/"), (tmp_path / "link" / "a", "a/"), (tree / "a" / "b", "a/b/"),
        (tree / "b", None), (tree / "a-", None), (tree / "b.jp", None),
    ):  # fmt: skip
        place = open_place(str(without), "")
        found = [image.name for image in list_images([str(tree)], without=place)]
        assert found == [n for n in everything if gone is None or not n.startswith(gone)]
        assert (len(found) < len(everything)) == (gone is not None)
    inside = open_place(str(tree / "a"), "")
    assert [one.name for one in list_images([str(tree / "**" / "*.jpg")], without=inside)] == [
        "B.jpg", "x.jpg", "a.jpg", "b.jpg",
    ]  # fmt: skip
    for source in (tree / "a" / "b", tree / "a" / "z.jpg"):
        with pytest.raises(DataError, match="none at"):
            list_images([str(source)], without=inside)
    elsewhere = Place(f"memory:/{tree}", fsspec.filesystem("memory"), str(tree / "a"))
    assert len(list_images([str(tree)], without=elsewhere)) == len(everything)


def test_relative_sources(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert names(".") == names(tree)
    assert names("a.jpg", "./b.jpg", "a") == ["a.jpg", "b.jpg", "b/c.PNG", "film.mp4", "z.jpg"]


def test_a_folder_whose_name_looks_like_a_pattern(tree: Path) -> None:
    odd = tree / "[1]"
    odd.mkdir()
    (odd / "x.jpg").write_bytes(b"")
    assert names(odd) == ["x.jpg"]


def test_links_are_files_but_no_folders(tree: Path) -> None:
    (tree / "gone.jpg").symlink_to(tree / "nowhere")
    (tree / "loop").symlink_to(tree)
    assert names(tree) == sorted([*(n for n in TREE if n != "notes.txt"), "gone.jpg"])
    with pytest.raises(DataError, match=r"gone\.jpg: expected a file that can be read"):
        list_images([str(tree / "gone.jpg*")])[0].read()


def test_every_filesystem_lists_alike(tree: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in TREE:
        memory.pipe_file(f"/images-test/{name}", name.encode())
    try:
        local = fsspec.filesystem("file")
        for depth in (None, 1, 2):
            assert list(walk(memory, "/images-test", depth)) == list(walk(local, str(tree), depth))
        for pattern in ("*", "*/*.jpg", "**/*.jpg"):
            assert list(match(memory, "/images-test", pattern)) == list(
                match(local, str(tree), pattern)
            )
        found = list_images(["memory://images-test/a"])
        assert [image.name for image in found] == ["b/c.PNG", "film.mp4", "z.jpg"]
        assert found[2].read() == b"a/z.jpg"
    finally:
        memory.rm("/images-test", recursive=True)


def test_the_digest_is_of_paths_and_sizes(tree: Path) -> None:
    before = list_images([str(tree)]).sha256
    assert before == list_images([str(tree)]).sha256
    assert before != list_images([str(tree / "a"), str(tree)]).sha256
    (tree / "b.jpg").write_bytes(b"other")
    os.utime(tree / "b.jpg", (0, 0))
    assert before == list_images([str(tree)]).sha256  # as long as it was
    (tree / "b.jpg").write_bytes(b"longer than before")
    assert before != list_images([str(tree)]).sha256


def test_the_list_is_a_sequence_of_files(tree: Path) -> None:
    images = list_images([str(tree)])
    assert isinstance(images, ImageList)
    assert [*images.names()] == [image.name for image in images]
    assert images[1:3] == [images[1], images[2]]
    assert images[-1].name == "b.jpg"
    assert images.local_folders() == [str(tree)]
    assert [image.name for image in images if image.is_video] == ["a/film.mp4"]


def test_how_many_were_found_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.storage.images.TELL_EVERY", 10)
    for number in range(25):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    told: list[int] = []
    assert len(list_images([str(tmp_path)], tell=told.append)) == 25
    assert told == [10, 20]


def test_bytes_in_order_and_what_was_wrong_in_its_place(tree: Path) -> None:
    images = list(list_images([str(tree)]))
    missing = ImageFile("m.jpg", images[0].place.join("missing"))
    batches = list(read_batches([*images, missing], 3))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    flat = [one for batch in batches for one in batch]
    assert [(image, data) for image, data in flat[:-1]] == [(i, i.name.encode()) for i in images]
    assert isinstance(flat[-1][1], DataError)


@pytest.mark.parametrize(
    ("files", "numbers", "by"),
    [
        (["000139.jpg", "a/7.png"], [139, 7], "the file name's number"),
        (["1.jpg", "a/01.jpg"], [1, 2], "a running number"),
        (["5.jpg", "b.jpg"], [1, 2], "a running number"),
        (["5.jpg", "\u00b2.jpg"], [1, 2], "a running number"),
        (["5.jpg", "6.mp4"], [1, 2], "a running number"),
        (["5.jpg", f"{10**19}.jpg"], [1, 2], "a running number"),
    ],
)
def test_image_ids(tmp_path: Path, files: list[str], numbers: list[int], by: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found, said = image_ids(list_images([str(tmp_path)]))
    assert (list(found), said) == (numbers, by)


@pytest.mark.integration
def test_s3_lists_page_by_page_what_a_folder_has(
    tree: Path, bucket: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.storage.listing.PAGE_KEYS", 3)
    for name in TREE:
        s3_client.upload_file(str(tree / name), bucket, f"in/{name}")
    for number in range(20):
        s3_client.put_object(Bucket=bucket, Key=f"many/{number:05d}.jpg", Body=b"")
    s3_client.put_object(
        Bucket=bucket, Key="in/a/", Body=b""
    )  # a folder, as some clients make them
    found = list_images([f"s3://{bucket}/in"])
    assert [image.name for image in found] == names(tree)
    assert found[0].read() == b"B.jpg"
    assert found[0].place.uri == f"s3://{bucket}/in/B.jpg"
    for pattern in ("*.jpg", "a/*", "*/*.jpg", "**/*.jpg"):
        assert names(f"s3://{bucket}/in/{pattern}") == names(tree / pattern)
    assert len(list_images([f"s3://{bucket}/many/"])) == 20
    assert names(f"s3://{bucket}/in/a.jpg") == ["a.jpg"]
    assert len(list_images([f"s3://{bucket}"])) == 27
    with pytest.raises(UserError, match="none at"):
        list_images([f"s3://{bucket}/other"])
    with pytest.raises(UserError, match="IMAGES: expected"):
        list_images(["s3://no-such-bucket-of-these-tests/x"])


@pytest.mark.integration
def test_an_archived_object_is_a_bad_image_and_a_locked_door_is_not(
    bucket: str, s3_client: Any
) -> None:
    for name in ("a.jpg", "a.mp4"):
        s3_client.put_object(Bucket=bucket, Key=f"cold/{name}", Body=b"x", StorageClass="GLACIER")
    image, video = list_images([f"s3://{bucket}/cold"])
    with pytest.raises(DataError, match=r"a\.jpg: expected an object that is not archived, got"):
        image.read()
    with pytest.raises(DataError, match=r"a\.mp4: expected an object that is not archived, got"):
        Video(video.place, Every())

    def closed() -> bytes:
        raise PermissionError("The provided token has expired.")

    with pytest.raises(StorageError, match="The provided token has expired"):
        fetch(image.place, "image", closed)


def test_what_has_no_image_is_refused(tree: Path) -> None:
    shutil.rmtree(tree / "a")
    for source in (tree / "a", tree / "*.png", tree / "missing.jpg", tree / "no" / "*.jpg"):
        with pytest.raises(DataError, match=r"IMAGES: expected image or video files.* got none at"):
            list_images([str(source)])
