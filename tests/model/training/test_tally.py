"""Average precision of chosen images against pycocotools on exactly those images."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.data.index import CocoIndex, parse_coco
from model.training import tally
from model.training.evaluation import COLUMNS
from model.training.tally import METRICS, Tally

from .test_evaluation import by_pycocotools, make_index, noisy, perfect


def chosen(index: CocoIndex, rows: NDArray[np.float64], images: NDArray[np.int64]) -> Any:
    """A dataset of these images, one that is named twice being there twice; and its detections."""
    document: dict[str, Any] = index.ground_truth()
    document["categories"] = [
        {"id": i, "name": n} for i, n in zip(index.classes.category_ids, index.classes.names, strict=True)
    ]  # fmt: skip
    new, boxes, found = [], [], []
    for position, image in enumerate(images):
        (old,) = (one for one in document["images"] if one["id"] == index.image_ids[image])
        new.append(old | {"id": position})
        for box in document["annotations"]:
            if box["image_id"] == old["id"]:
                category = index.classes.category_ids[box["category_id"]]
                boxes.append(
                    box | {"id": len(boxes) + 1, "image_id": position, "category_id": category}
                )
        mine = rows[rows[:, 0] == image].copy()
        mine[:, 0] = position
        found.append(mine)
    text = json.dumps(document | {"images": new, "annotations": boxes}).encode()
    return parse_coco(text, "chosen.json"), np.concatenate([np.empty((0, COLUMNS)), *found])


def assert_as_pycocotools(
    index: CocoIndex, rows: NDArray[np.float64], weights: NDArray[np.int64]
) -> None:
    found = Tally(index, rows).averages(weights).metrics
    for row, weighting in zip(found, weights, strict=True):
        expected = by_pycocotools(*chosen(index, rows, np.repeat(np.arange(len(index)), weighting)))
        for name, value in zip(METRICS, row, strict=True):
            if expected[name] < 0:
                assert np.isnan(value), name
            else:
                assert value == pytest.approx(expected[name], abs=1e-9), name


@pytest.mark.parametrize("seed", range(6))
def test_all_images_once(seed: int) -> None:
    index = make_index(seed, num_images=30)
    rows = noisy(index, seed)
    assert 0.05 < float(Tally(index, rows).averages(np.ones((1, 30), int)).metrics[0, 0]) < 0.95
    assert_as_pycocotools(index, rows, np.ones((1, 30), dtype=np.int64))


@pytest.mark.parametrize("seed", range(3))
def test_some_left_out_some_several_times(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "AT_ONCE", 500)  # in several turns
    index = make_index(seed, num_images=14)
    weights = np.random.default_rng(seed).integers(0, 4, (5, 14))
    assert_as_pycocotools(index, noisy(index, seed), weights)


def test_equal_scores_and_more_than_a_hundred_of_a_class() -> None:
    index = make_index(3, num_images=8)
    rows = np.repeat(noisy(index, 3), 30, axis=0)
    rng = np.random.default_rng(0)
    rows[:, 1:5] += rng.normal(0, 3, rows[:, 1:5].shape)
    rows[:, 3:5] = rows[:, 3:5].clip(min=1)
    rows[:, 5] = rng.integers(1, 12, len(rows)) / 12
    per_class = np.unique(rows[:, 0] * 3 + rows[:, 6], return_counts=True)[1]
    assert per_class.max() > 100
    assert_as_pycocotools(index, rows, np.ones((1, 8), dtype=np.int64))


def test_counts_stay_exact_however_often_images_count() -> None:
    """Where all is found, a box too many in the sum would cost the last recall."""
    index = make_index(0, num_images=60)
    weights = np.concatenate([[1], np.arange(2**20 + 1, 2**20 + 65, 2)])
    assert np.bincount(index.labels).max() > 2**24 / 2**20
    found = Tally(index, perfect(index)).averages(np.repeat(weights[:, None], 60, axis=1))
    for kind in (found.metrics, found.classes):
        np.testing.assert_array_equal(kind, np.repeat(kind[:1], len(weights), axis=0))


def test_each_class_as_evaluation_has_it() -> None:
    from model.training.evaluation import score

    index = make_index(1, used=(2, 77))
    rows = noisy(index, 1)
    (found,) = Tally(index, rows).averages(np.ones((1, len(index)), dtype=np.int64)).classes
    expected = score(index, rows)
    assert found[0] == pytest.approx(expected["val_class/a"], abs=1e-9)
    assert np.isnan(found[1])
    assert found[2] == pytest.approx(expected["val_class/c"], abs=1e-9)


@pytest.mark.parametrize("kind", ["nothing found", "nothing to find", "perfect"])
def test_limits(kind: str) -> None:
    index = make_index(2)
    rows = perfect(index)
    if kind == "nothing found":
        rows = np.empty((0, COLUMNS))
    elif kind == "nothing to find":
        index = make_index(2).first(0)
        rows = np.empty((0, COLUMNS))
    (found,) = Tally(index, rows).averages(np.ones((1, len(index)), dtype=np.int64)).metrics
    expected = {"nothing found": 0.0, "nothing to find": np.nan, "perfect": 1.0}[kind]
    np.testing.assert_allclose(found, np.full(6, expected), atol=1e-12)
