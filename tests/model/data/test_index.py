from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.peek import Peek
from numpy.typing import NDArray

from model.data.index import ClassMap, CocoIndex, parse_coco
from model.errors import DataError

ARRAYS = ("image_ids", "file_names", "sizes_hw", "offsets", "boxes_xyxy", "labels", "crowd", "area")


def box(image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox} | more


def document() -> dict[str, Any]:
    """Three images of 100 x 80 in no order, sparse class ids in no order."""
    sizes = {"width": 100, "height": 80}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} | sizes for i in (42, 7, 19)],
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 1, "name": "person"},
            {"id": 18, "name": "dog"},
        ],
        "annotations": [
            box(42, 18, [10, 20, 30, 40], id=5, area=600.5),
            box(7, 90, [0, 0, 100, 80], id=9),
            box(42, 1, [50.5, 10.25, 20, 5], id=3),
            box(42, 1, [0, 0, 60, 60], id=4, iscrowd=1),
        ],
    }


def parse(doc: Any, keep: list[str] | None = None) -> CocoIndex:
    return parse_coco(json.dumps(doc).encode(), "train.json", keep)


def test_images_boxes_and_sparse_class_ids() -> None:
    index = parse(document())
    assert index.image_ids.tolist() == [7, 19, 42]
    assert index.file_names.tolist() == ["7.jpg", "19.jpg", "42.jpg"]
    assert index.sizes_hw.tolist() == [[80, 100]] * 3
    assert index.offsets.tolist() == [0, 1, 1, 4]
    assert index.classes == ClassMap((1, 18, 90), ("person", "dog", "toothbrush"))
    assert index.labels.tolist() == [2, 1, 0, 0]
    assert index.boxes_xyxy[1:3].tolist() == [[10, 20, 40, 60], [50.5, 10.25, 70.5, 15.25]]
    assert index.area.tolist() == [8000, 600.5, 100, 3600]
    assert index.annotation_ids.tolist() == [9, 5, 3, 4]
    assert (len(index), index.classes.num_classes) == (3, 3)


def test_crowds_are_for_evaluation_only() -> None:
    index = parse(document())
    boxes, labels = index.training_boxes(2)
    assert labels.tolist() == [1, 0]
    assert len(boxes) == 2
    assert index.crowd.tolist() == [False, False, False, True]
    assert index.counts == {
        "images": 3,
        "boxes": 3,
        "crowds, for evaluation only": 1,
        "images without boxes": 1,
    }


def test_images_without_boxes_are_kept() -> None:
    boxes, labels = parse(document()).training_boxes(1)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)
    empty = parse(document() | {"annotations": []})
    assert empty.offsets.tolist() == [0, 0, 0, 0]
    assert empty.counts["images without boxes"] == 3


def test_boxes_are_clipped_or_dropped_and_counted() -> None:
    doc = document()
    doc["annotations"] += [
        box(19, 1, [-10, -10, 30, 30]),  # two sides outside
        box(19, 1, [10, 10, 0, 20]),  # no width
        box(19, 1, [10, 10, -5, 20]),
        box(19, 1, [120, 10, 5, 5]),  # outside
        box(19, 1, [90.4, 70, 10, 10]),  # by less than half a pixel: not worth a word
    ]
    index = parse(doc)
    boxes, _ = index.training_boxes(1)
    np.testing.assert_allclose(boxes, [[0, 0, 20, 20], [90.4, 70, 100, 80]], rtol=1e-6)
    assert index.counts["boxes without area, dropped"] == 3
    assert index.counts["boxes clipped to the image"] == 1
    assert index.counts["boxes"] == 5


def test_class_filter() -> None:
    index = parse(document(), ["toothbrush", "person"])
    assert index.classes == ClassMap((1, 90), ("person", "toothbrush"))
    assert index.labels.tolist() == [1, 0, 0]
    assert index.counts["boxes of other classes, dropped"] == 1
    assert len(index) == 3, "images of other classes stay, as negatives"


def test_an_unknown_class_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'person'") as caught:
        parse(document(), ["persn"])
    assert caught.value.where == "data.classes"


def test_first_takes_the_lowest_ids() -> None:
    whole = parse(document())
    first = whole.first(2)
    assert first.image_ids.tolist() == [7, 19]
    assert first.offsets.tolist() == [0, 1, 1]
    assert first.labels.tolist() == [2]
    assert first.counts["boxes"] == 1
    assert first.counts["crowds, for evaluation only"] == 0
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(whole.first(99), name), getattr(whole, name))


def test_ground_truth_round_trip() -> None:
    index = parse(document())
    again = parse(index.ground_truth())
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name), err_msg=name)
    assert again.classes.names == index.classes.names
    assert again.classes.category_ids == (0, 1, 2)
    assert min(row["id"] for row in index.ground_truth()["annotations"]) == 1


def test_class_map_round_trip_in_any_order() -> None:
    classes = parse(document()).classes
    rows = json.loads(json.dumps(classes.to_json()))
    assert ClassMap.from_json(rows[::-1]) == classes
    assert rows[1] == {"label": 1, "category_id": 18, "name": "dog"}


def changed(key: str, value: Any) -> dict[str, Any]:
    return document() | {key: value}


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        ([1, 2], "lists images, annotations and categories, got list"),
        ({"shapes": [], "version": 1}, "got shapes, version"),
        ({}, "an empty object"),
        (changed("images", {"id": 1}), "lists images, annotations and categories"),
        (changed("images", document()["images"] * 2), "unique image ids, got id 7 twice"),
        (changed("categories", document()["categories"] * 2), "unique category ids"),
        (changed("categories", []) | {"annotations": []}, "at least one category"),
        (changed("annotations", [box(8, 1, [0, 0, 5, 5], id=6)]), "annotation 6: .* image id"),
        (changed("annotations", [box(7, 2, [0, 0, 5, 5], id=6)]), "annotation 6: .* category id"),
        (changed("annotations", [{"image_id": 7, "category_id": 1}]), "no 'bbox'"),
        (changed("annotations", [box(7, 1, [0, 0, 5])]), "COCO's fields"),
        (changed("annotations", [box(7, 1, [0, 0, float("nan"), 5], id=6)]), "6: .*finite"),
        (changed("images", [{"id": 7, "file_name": "a.jpg"}]), "no 'height'"),
        (changed("images", ["a.jpg"]), "COCO's fields"),
        (
            changed("images", [document()["images"][0] | {"id": 2**127}]) | {"annotations": []},
            "COCO's fields",
        ),
        (changed("annotations", [box(7, 1, [0, 0, 5, 5], id=2**127)]), "COCO's fields"),
        (changed("annotations", [box(7, 1, [0, 0, 10**400, 5], id=6)]), "COCO's fields"),
    ],
)
def test_broken_files_are_named_in_one_line(doc: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse(doc)
    assert str(caught.value).startswith("train.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{'images': []}", b'{"images": [', b"\xff\xfe\x00bad"])
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(DataError, match="a json file"):
        parse_coco(text, "train.json")


def many_boxes(seed: int) -> NDArray[np.float64]:
    """xyxy boxes anywhere in an image of 100 x 80, of any size."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, [90, 70], (200, 2))
    high = rng.uniform(low + 2, [100, 80])
    return np.concatenate([low, high], axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_given_as_two_corners_are_refused(seed: int) -> None:
    rows = [box(7, 1, [round(v, 2) for v in row]) for row in many_boxes(seed).tolist()]
    with pytest.raises(DataError, match="what looks like"):
        parse(changed("annotations", rows))


@pytest.mark.parametrize("excess", [0.0, 0.9])
def test_genuine_boxes_that_touch_the_borders_pass(excess: float) -> None:
    """Large boxes that all reach the far corner, some exporters' by almost a pixel too much."""
    corners = [(i % 40, i % 30) for i in range(200)]
    rows = [box(7, 1, [x, y, 100 - x + excess, 80 - y + excess]) for x, y in corners]
    assert parse(changed("annotations", rows)).counts["boxes"] == 200


def test_boxes_of_an_image_keep_the_order_of_the_file() -> None:
    rows = [box((42, 7, 19)[i % 3], 1, [1, 2, 30, 40], id=i) for i in range(600)]
    index = parse(changed("annotations", rows))
    assert index.annotation_ids.tolist() == [
        i for image in (7, 19, 42) for i in range(600) if (42, 7, 19)[i % 3] == image
    ]


def test_genuine_boxes_of_which_many_leave_the_image_pass() -> None:
    """Objects cut by the left border have x < 0: that is no corner."""
    rows = [box(7, 1, [90 - i % 30, 60, 30, 25]) for i in range(100)]
    index = parse(changed("annotations", rows))
    assert index.counts["boxes clipped to the image"] == 100


def test_real_images_annotations() -> None:
    path = Path(__file__).parents[4] / "shared/data/tiny_coco/annotations/instances_train2017.json"
    if not path.is_file():
        pytest.skip("no ../shared/data/tiny_coco beside the repository")
    raw = json.loads(path.read_bytes())
    index = parse_coco(path.read_bytes(), path.name)
    assert len(index) == len(raw["images"])
    assert index.classes.num_classes == 80
    assert index.classes.category_ids[-1] == 90
    assert len(index.labels) == len(raw["annotations"])
    by_id = {row["id"]: row for row in raw["annotations"]}
    for row, number in enumerate(index.annotation_ids.tolist()):
        x, y, w, h = by_id[number]["bbox"]
        np.testing.assert_allclose(index.boxes_xyxy[row], [x, y, x + w, y + h], atol=0.5)
        category = index.classes.category_ids[index.labels[row]]
        assert category == by_id[number]["category_id"]


@pytest.mark.integration
def test_loader_processes_share_the_arrays() -> None:
    small = parse(document())
    loader = torch.utils.data.DataLoader(
        Peek(small), num_workers=2, multiprocessing_context="forkserver", batch_size=None
    )
    assert list(loader) == [True] * 4
    first = small.__dict__["_tensors"]["boxes_xyxy"].data_ptr()
    list(loader)
    assert small.__dict__["_tensors"]["boxes_xyxy"].data_ptr() == first, "shared once, not anew"


def test_any_pickler_keeps_an_index() -> None:
    small = parse(document())
    again = pickle.loads(pickle.dumps(small))
    assert again.classes == small.classes
    for name in ("image_ids", "file_names", "sizes_hw", "offsets", "boxes_xyxy", "labels", "crowd"):
        np.testing.assert_array_equal(getattr(again, name), getattr(small, name))
        assert getattr(again, name).dtype == getattr(small, name).dtype


def test_digest_is_of_the_content() -> None:
    def text(x: float = 1.0, name: str = "thing", file: str = "1.jpg") -> bytes:
        return json.dumps(
            {
                "images": [{"id": 1, "file_name": file, "width": 9, "height": 9}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, 1, 4, 4], "area": 16}
                ],
                "categories": [{"id": 1, "name": name}],
            }
        ).encode()

    one = parse_coco(text(), "one").digest()
    assert one == parse_coco(text(), "another name").digest()
    others = [text(x=2.0), text(name="other"), text(file="2.jpg")]
    digests = {parse_coco(other, "one").digest() for other in others} | {one}
    assert len(digests) == 4
