from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from model.data import lint
from model.data.folder import FolderReader
from model.data.index import CocoIndex, parse_coco
from model.data.lint import check_images
from model.errors import DataError


def jpeg(width: int, height: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[CocoIndex, Path]:
    """Eight good images of 40 x 30."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(8)]
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(40, 30))
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    return parse_coco(json.dumps(document).encode(), "x.json"), tmp_path


def test_a_good_set_passes(dataset: tuple[CocoIndex, Path]) -> None:
    index, folder = dataset
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright: the shown size is what is annotated
    (folder / "5.jpg").write_bytes(jpeg(30, 40, exif=exif))
    assert check_images(index, FolderReader(folder)) == 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "image 5.jpg: expected a file, got no such file"),
        (jpeg(40, 30)[:400], "image 5.jpg: expected a readable image, got .*truncated"),
        (b"<html>", "image 5.jpg: expected a readable image"),
        (b"", "image 5.jpg: expected a readable image"),
        (jpeg(30, 40), "image 5.jpg: expected 40 x 30 pixels as annotated, got 30 x 40"),
        (jpeg(20, 15), "image 5.jpg: expected 40 x 30 pixels as annotated, got 20 x 15"),
    ],
)
def test_what_is_wrong_is_named(
    dataset: tuple[CocoIndex, Path], data: bytes | None, message: str
) -> None:
    index, folder = dataset
    (folder / "5.jpg").unlink()
    if data is not None:
        (folder / "5.jpg").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        check_images(index, FolderReader(folder))
    assert "\n" not in str(caught.value)


def test_the_first_by_id_is_named(dataset: tuple[CocoIndex, Path]) -> None:
    index, folder = dataset
    for number in (6, 2, 7):
        (folder / f"{number}.jpg").unlink()
    with pytest.raises(DataError, match=r"image 2\.jpg"):
        check_images(index, FolderReader(folder))


def test_large_sets_are_sampled_from_end_to_end(
    dataset: tuple[CocoIndex, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, folder = dataset
    monkeypatch.setattr(lint, "SAMPLE", 3)
    seen: list[str] = []
    reader = FolderReader(folder)

    def read(name: str) -> bytes:
        seen.append(name)
        return reader(name)

    assert check_images(index, read) == 3
    assert {"0.jpg", "7.jpg"} < set(seen)
    assert check_images(index, read, everything=True) == 8
