from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.data.folder import FolderReader, find_split
from model.data.index import CocoIndex, parse_coco
from model.data.lint import check_images
from model.data.shapes import CATEGORIES, ShapesConfig, draw_image, ensure_shapes

CONFIG = ShapesConfig(num_train=40, num_val=5, size_px=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("demo") / "shapes"
    assert ensure_shapes(made, CONFIG)
    return made


def load(folder: Path, split: str) -> tuple[CocoIndex, FolderReader]:
    found = find_split(folder, split)
    assert found is not None
    index = parse_coco(found.annotations.read_bytes(), found.annotations.name)
    return index, FolderReader(found.images)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    ensure_shapes(tmp_path / "again", CONFIG)
    assert files(tmp_path / "again") == files(folder)
    ensure_shapes(tmp_path / "other", replace(CONFIG, seed=1))
    name = "images/train/train_00000.jpg"
    assert files(tmp_path / "other")[name] != files(folder)[name]


def test_more_images_keep_the_first_ones(folder: Path, tmp_path: Path) -> None:
    ensure_shapes(tmp_path / "few", replace(CONFIG, num_train=3, num_val=1))
    few, many = files(tmp_path / "few"), files(folder)
    assert all(many[name] == data for name, data in few.items() if name.endswith(".jpg"))


@pytest.mark.parametrize(("split", "number"), [("train", 40), ("val", 5)])
def test_it_is_a_sound_coco_dataset(folder: Path, split: str, number: int) -> None:
    index, read = load(folder, split)
    assert check_images(index, read) == len(index) == number
    assert index.classes.category_ids == tuple(CATEGORIES)
    assert index.classes.category_ids == (1, 3, 7, 18, 44, 90), "sparse"
    assert (np.diff(index.image_ids) == 10).all()
    dropped = {"boxes without area, dropped", "boxes clipped to the image"}
    assert not dropped & set(index.counts)


def test_no_image_is_in_both_splits(folder: Path) -> None:
    pictures = {
        split: {data for name, data in files(folder).items() if f"images/{split}/" in name}
        for split in ("train", "val")
    }
    assert not pictures["train"] & pictures["val"]


def test_it_is_small_but_not_trivial() -> None:
    config = ShapesConfig(size_px=64)
    shares, numbers, kinds = [], [], set()
    for index in range(300):
        picture, objects = draw_image(np.random.default_rng((0, 0, index)), config)
        numbers.append(len(objects))
        for kind, (x0, y0, x1, y1) in objects:
            assert 0 <= x0 < x1 <= picture.width
            assert 0 <= y0 < y1 <= picture.height
            shares.append(max(x1 - x0, y1 - y0) / min(picture.size))
            kinds.add(kind)
    assert kinds == set(CATEGORIES)
    assert min(shares) < 0.12
    assert max(shares) > 0.5
    assert 0.04 < np.mean(np.array(numbers) == 0) < 0.13, "negatives"
    assert max(numbers) == config.max_objects


def test_boxes_are_tight_around_their_shapes() -> None:
    """The colour jumps where a circle meets the middle of each side of its box, nowhere inside."""
    config = ShapesConfig(size_px=160, max_objects=1)
    crossing, inside = [], []
    for index in range(300):
        picture, objects = draw_image(np.random.default_rng((0, 0, index)), config)
        if not objects or CATEGORIES[objects[0][0]] != "circle":
            continue
        x0, y0, x1, y1 = objects[0][1]
        if min(x1 - x0, y1 - y0) < 30 or min(x0, y0, picture.width - x1, picture.height - y1) < 5:
            continue
        pixels = np.asarray(picture, dtype=np.float64)
        x, y = int((x0 + x1) / 2), int((y0 + y1) / 2)
        for column, row, dx, dy in ((x0, y, 1, 0), (x1, y, -1, 0), (x, y0, 0, 1), (x, y1, 0, -1)):
            out, edge, deep = (
                pixels[int(row + step * dy), int(column + step * dx)] for step in (-3, 4, 10)
            )
            crossing.append(np.abs(out - edge).sum())
            inside.append(np.abs(edge - deep).sum())
    assert len(crossing) > 40
    assert np.median(crossing) > 100
    assert np.median(inside) < 40


def test_what_is_there_is_used_and_what_is_foreign_refused(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    assert ensure_shapes(folder, CONFIG) is False
    with pytest.raises(FileExistsError, match="holds something else"):
        ensure_shapes(folder, replace(CONFIG, num_train=41))
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        ensure_shapes(tmp_path, CONFIG)
    assert files(folder) == before
    assert files(tmp_path) == {"holiday.jpg": b"mine"}


def test_nothing_half_made_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="low >= high"):
        ensure_shapes(tmp_path / "shapes", replace(CONFIG, max_objects=0))
    assert list(tmp_path.iterdir()) == []
