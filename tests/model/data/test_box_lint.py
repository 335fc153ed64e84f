"""Mistakes in annotations: each is made, and named; what is right raises nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model.data.annotations import RawAnnotations, read_raw
from model.data.box_lint import lint_boxes, lint_empty, lint_ids
from model.data.findings import Finding, has_errors
from model.data.index import parse_coco
from model.errors import DataError

WIDTH, HEIGHT = 200, 100
Document = dict[str, list[dict[str, Any]]]


def document(number: int = 40, seed: int = 0) -> Document:
    """A good set: images of 200 x 100, two boxes each, anywhere."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT}
        for i in range(1, number + 1)
    ]
    boxes = []
    for n in range(2 * number):
        w, h = rng.uniform(20, 60), rng.uniform(20, 50)
        x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
        boxes.append({
            "id": n + 1, "image_id": n // 2 + 1, "category_id": 5, "bbox": [x, y, w, h], "area": w * h / 2,
        })  # fmt: skip
    return {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "thing"}]}


def lint(doc: Any, **options: Any) -> list[Finding]:
    raw, findings = read_raw(json.dumps(doc).encode(), "train", "x.json")
    if raw is None:
        return findings
    options = {"image_size_px": 512, "tiny_px": 8.0} | options
    return findings + lint_ids(raw, "train") + lint_empty(raw, "train") + lint_boxes(raw, "train", **options)  # fmt: skip


def kinds(findings: list[Finding]) -> dict[str, int]:
    return {one.kind: one.count for one in findings}


def test_a_good_set_has_nothing_wrong() -> None:
    assert lint(document()) == []


def change(key: str, value: Any) -> Callable[[Document], None]:
    """Of the first three boxes."""

    def do(doc: Document) -> None:
        for row in doc["annotations"][:3]:
            row[key] = value

    return do


def drop(key: str, part: str = "annotations") -> Callable[[Document], None]:
    def do(doc: Document) -> None:
        del doc[part][4][key]

    return do


def each_box(
    new: Callable[[float, float, float, float], list[float]],
) -> Callable[[Document], None]:
    def do(doc: Document) -> None:
        for row in doc["annotations"]:
            row["bbox"] = new(*row["bbox"])

    return do


def repeat(part: str) -> Callable[[Document], None]:
    return lambda doc: doc[part].append(dict(doc[part][0]))


def rename(name: str) -> Callable[[Document], None]:
    return lambda doc: doc["images"][2].update(file_name=name)


REFUSED = [
    ("xyxy", 80, each_box(lambda x, y, w, h: [x, y, x + w, y + h])),
    ("not-finite", 3, change("bbox", [1, float("nan"), 3, 4])),
    ("annotation-row", 3, change("bbox", [1, 2, 3])),
    ("annotation-row", 3, change("bbox", None)),
    ("annotation-row", 3, change("bbox", [1, 2, "x", 4])),
    ("annotation-row", 1, drop("bbox")),
    ("annotation-row", 1, drop("image_id")),
    ("image-row", 1, drop("width", "images")),
    ("image-row", 1, drop("file_name", "images")),
    ("unknown-image", 3, change("image_id", 4711)),
    ("unknown-category", 3, change("category_id", 4711)),
    ("repeated-image-id", 1, repeat("images")),
    ("repeated-category-id", 1, repeat("categories")),
    ("no-categories", 1, lambda doc: doc["categories"].clear()),
]


@pytest.mark.parametrize(("kind", "count", "spoil"), REFUSED)
def test_what_training_refuses_is_an_error(
    kind: str, count: int, spoil: Callable[[Document], None]
) -> None:
    doc = document()
    spoil(doc)
    found = lint(doc)
    assert kinds(found)[kind] == count
    assert has_errors(found)
    assert all(one.remedy for one in found)
    with pytest.raises(DataError):
        parse_coco(json.dumps(doc).encode(), "x.json")


@pytest.mark.parametrize(
    ("severity", "kind", "count", "spoil"),
    [
        ("error", "normalised", 80, each_box(lambda x, y, w, h: [x / 200, y / 100, w / 200, h / 100])),
        ("error", "file-name-leaves", 1, rename("../7.jpg")),
        ("error", "file-name-leaves", 1, rename("/etc/passwd")),
        ("error", "image-size", 1, lambda doc: doc["images"][2].update(width=0)),
        ("error", "no-boxes", 40, lambda doc: doc["annotations"].clear()),
        ("warning", "degenerate", 3, change("bbox", [10, 10, 0, 5])),
        ("warning", "degenerate", 3, change("bbox", [10, 10, -3, 5])),
        ("warning", "outside", 3, change("bbox", [250, 10, 30, 30])),
        ("note", "leaves-image", 3, change("bbox", [-5, 10, 30, 30])),
        ("note", "tiny", 3, change("bbox", [10, 10, 7, 30])),
        ("warning", "repeated-box", 2, change("bbox", [10, 10, 30, 30])),
        ("warning", "repeated-annotation-id", 1, change("id", 1)),
        ("warning", "repeated-file-name", 1, rename("1.jpg")),
        ("warning", "repeated-class-name", 1,
         lambda doc: doc["categories"].append({"id": 6, "name": "thing"})),
        ("note", "empty", 1, lambda doc: doc["images"].append(
            {"id": 99, "file_name": "99.jpg", "width": 10, "height": 10})),
        ("warning", "centred", None, each_box(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h])),
    ],
)  # fmt: skip
def test_what_costs_accuracy_is_named(
    severity: str, kind: str, count: int | None, spoil: Callable[[Document], None]
) -> None:
    doc = document()
    spoil(doc)
    if kind == "repeated-box":  # two of the three are of one image
        count = 1
    (found,) = [one for one in lint(doc) if one.kind == kind]
    assert found.count == count or count is None
    assert found.severity == severity or kind == "centred"
    assert found.examples


def test_boxes_below_the_limit_only_once_scaled() -> None:
    doc = document()
    for row in doc["annotations"][:3]:
        row["bbox"] = [10, 10, 10, 30]
    assert kinds(lint(doc, image_size_px=128)).get("tiny-scaled") == 3
    assert "tiny" not in kinds(lint(doc, image_size_px=128))
    assert "tiny-scaled" not in kinds(lint(doc, image_size_px=512))


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"images": []}'])
def test_what_is_no_coco_json_is_one_error(text: bytes) -> None:
    raw, findings = read_raw(text, "train", "x.json")
    assert raw is None
    (found,) = findings
    assert found.severity == "error"
    assert "\n" not in found.what


def read(doc: Document) -> RawAnnotations:
    raw, findings = read_raw(json.dumps(doc).encode(), "train", "x.json")
    assert raw is not None
    assert findings == []
    return raw


def test_a_part_in_another_format_is_suspected() -> None:
    doc = document(100)
    for row in doc["annotations"][:40]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, x + w, y + h]
    doc["images"][0]["width"] = 40  # an image of the wrong size does not hide it
    (found,) = [one for one in lint(doc) if one.kind == "xyxy"]
    assert found.severity == "warning"
    assert 10 <= found.count <= 40
    assert "leaves-image" in kinds(lint(doc)), "the rest is still looked at"


def test_areas_tell_corners_that_stay_inside() -> None:
    """All objects in the upper left: nothing leaves the image, but the areas are of corners."""
    doc = document()
    for row in doc["annotations"]:
        x, y, w, h = (value / 4 for value in row["bbox"])
        row |= {"bbox": [x, y, x + w, y + h], "area": w * h}
    assert kinds(lint(doc))["xyxy"] == 80


def test_large_objects_are_not_taken_for_corners() -> None:
    """Objects that fill their image have w > x, and are well."""
    doc = document()
    for number, row in enumerate(doc["annotations"]):
        row["bbox"] = [number % 9, number % 7, WIDTH - 20, HEIGHT - 20]
    assert not {"xyxy", "centred"} & set(kinds(lint(doc)))


def test_small_objects_are_not_taken_for_centres() -> None:
    doc = document()
    for row in doc["annotations"]:
        row["bbox"][2:] = [9.0, 9.0]
    assert not {"xyxy", "centred"} & set(kinds(lint(doc)))


def test_overhanging_boxes_are_not_taken_for_another_format() -> None:
    """A tool that does not clip lets boxes leave on all sides."""
    doc = document()
    rng = np.random.default_rng(1)
    for row in doc["annotations"]:
        row["bbox"][:2] = [rng.uniform(-10, WIDTH - 15), rng.uniform(-10, HEIGHT - 15)]
    assert not {"xyxy", "centred"} & set(kinds(lint(doc)))


def test_subsets_keep_what_belongs_to_them() -> None:
    doc = document()
    doc["categories"].append({"id": 9, "name": "other"})
    for row in doc["annotations"][::2]:
        row["category_id"] = 9
    raw = read(doc)
    first, other = raw.first(10), raw.only(["other"])
    assert (len(first), len(first.owners)) == (10, 20)
    assert other.category_names == ("other",)
    assert (len(other), len(other.labels)) == (40, 40)
    assert set(other.labels.tolist()) == {0}


def test_examples_name_file_id_and_values() -> None:
    doc = document()
    change("bbox", [10, 10, 0, 5])(doc)
    (found,) = [one for one in lint(doc) if one.kind == "degenerate"]
    assert found.examples[0] == "1.jpg, box 1: 10, 10, 0, 5"
    assert len(found.examples) == 3


@pytest.mark.parametrize(
    ("list_of", "kind"),
    [("images", "image-row"), ("annotations", "annotation-row"), ("categories", "category-row")],
)
def test_ids_beyond_64_bits_are_counted(list_of: str, kind: str) -> None:
    doc = document()
    doc[list_of][0]["id"] = 2**127
    wrong = {one.kind: one for one in lint(doc)}[kind]
    assert (wrong.count, wrong.examples) == (1, (f"id {2**127}",))
    assert "an id beyond 64 bits" in wrong.what
