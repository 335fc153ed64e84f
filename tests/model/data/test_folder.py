from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from model.data.folder import FolderReader, find_split, missing_images
from model.data.index import parse_coco
from model.errors import DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            first = {"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}
            document = {
                "images": [first],
                "annotations": [],
                "categories": [{"id": 1, "name": "x"}],
            }
            path.write_text(json.dumps(document))
        else:
            path.write_bytes(b"pixels")


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "images"),
        ("annotations/train.json", "train"),
        ("annotations/train.json", "train/images"),
        ("annotations/train.json", "annotations"),
        ("train.json", "images"),
        ("train.json", "JPEGImages"),
        ("train_annotations.json", "."),
    ],
)
def test_usual_layouts(tmp_path: Path, annotations: str, images: str) -> None:
    touch(tmp_path, annotations, f"{images}/a.jpg")
    found = find_split(tmp_path, "train")
    assert found is not None
    assert found.annotations == tmp_path / annotations
    assert found.images == tmp_path / images


def test_instances_win_over_other_annotations(tmp_path: Path) -> None:
    names = ("instances_val2017", "captions_val2017", "person_keypoints_val2017")
    touch(tmp_path, *(f"annotations/{name}.json" for name in names), "val2017/a.jpg")
    found = find_split(tmp_path, "val")
    assert found is not None
    assert found.annotations.name == "instances_val2017.json"


def test_the_folder_that_has_the_first_image_wins(tmp_path: Path) -> None:
    touch(tmp_path, "train.json", "images/other.jpg", "train/a.jpg")
    found = find_split(tmp_path, "train")
    assert found is not None
    assert found.images == tmp_path / "train"


def test_test_serves_as_val_where_there_is_no_val(tmp_path: Path) -> None:
    touch(tmp_path, "annotations/test.json", "test/a.jpg")
    found = find_split(tmp_path, "val")
    assert found is not None
    assert found.annotations.name == "test.json"
    assert find_split(tmp_path, "train") is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train_a.json", "train_b.json"],
            "train_a.json, train_b.json; choose one: --set data.train",
        ),
        (
            ["train.json"],
            "a.jpg of train.json in one of .*images/.* --set data.train.images=FOLDER",
        ),
    ],
)
def test_errors_say_what_to_set(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_split(tmp_path, "train")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: expected a folder, got none at"):
        find_split(tmp_path / "nowhere", "train")


def test_a_broken_json_is_left_to_the_parser(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(b"{broken")
    assert find_split(tmp_path, "train") is not None


@pytest.mark.parametrize("prefix", ["", "part/"])
def test_missing_images(tmp_path: Path, prefix: str) -> None:
    images = [{"id": i, "file_name": f"{prefix}{i}.jpg", "width": 4, "height": 4} for i in range(4)]
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    index = parse_coco(json.dumps(document).encode(), "x.json")
    touch(tmp_path, f"{prefix}0.jpg", f"{prefix}3.jpg")
    assert missing_images(index, tmp_path) == [f"{prefix}1.jpg", f"{prefix}2.jpg"]


def test_the_reader_survives_pickling(tmp_path: Path) -> None:
    touch(tmp_path, "deep/a.jpg")
    reader = pickle.loads(pickle.dumps(FolderReader(tmp_path)))
    assert reader("deep/a.jpg") == b"pixels"
    with pytest.raises(OSError, match=r"b\.jpg"):
        reader("b.jpg")


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [{"id": 1, "file_name": "a \\\\u00e9\\"{.jpg"}, {"file_name": "b.jpg"}]}',
        '{"annotations": [{"file_name": "c.png"}], "images" : [ {"file_name":"a \\u00e9\\"{.jpg"}]}',
        '{"images": [{"of": {"file_name": "c.png"}, "file_name": "a \\u00e9\\"{.jpg"}]}',
        '{"images": [{"note": "file_name}", "file_name": "a \\u00e9\\"{.jpg"}]}',
    ],
)
def test_the_first_name_is_the_first_images(tmp_path: Path, text: str) -> None:
    touch(tmp_path, 'train/a \u00e9"{.jpg', "images/c.png")
    (tmp_path / "train.json").write_text(text.replace("\\\\u", "\\u"))
    found = find_split(tmp_path, "train")
    assert found is not None
    assert found.images == tmp_path / "train"
