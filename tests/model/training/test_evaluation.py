"""COCO metrics against pycocotools, and what a missing number is."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.data.index import CocoIndex, parse_coco
from model.training.evaluation import COLUMNS, METRICS, score


def make_index(
    seed: int = 0, num_images: int = 12, used: tuple[int, ...] = (2, 5, 77), smallest_px: float = 8
) -> CocoIndex:
    """Random boxes of all sizes in three classes, some of them crowds, some images empty."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(num_images):
        for _ in range(int(rng.integers(0, 7))):
            w, h = np.exp(rng.uniform(np.log(smallest_px), np.log(220), 2))
            x, y = rng.uniform(0, 400 - w), rng.uniform(0, 400 - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image * 3 + 1,
                    "category_id": int(rng.choice(used)),
                    "bbox": [x, y, w, h],
                    "area": w * h * rng.uniform(0.5, 1.0),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    document = {
        "images": [
            {"id": image * 3 + 1, "file_name": f"{image}.jpg", "height": 400, "width": 400}
            for image in range(num_images)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in ((2, "a"), (5, "b"), (77, "c"))],
    }
    return parse_coco(json.dumps(document).encode(), "random.json")


def perfect(index: CocoIndex) -> NDArray[np.float64]:
    rows = []
    for image in range(len(index)):
        boxes, labels = index.training_boxes(image)
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
            rows.append([image, x0, y0, x1 - x0, y1 - y0, 0.9, label])
    return np.array(rows, dtype=np.float64)


def noisy(index: CocoIndex, seed: int) -> NDArray[np.float64]:
    """Moved boxes, wrong classes, duplicates and inventions with random scores."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(perfect(index), 2, axis=0)
    rows[:, 1:5] += rng.normal(0, 6, rows[:, 1:5].shape)
    rows[:, 3:5] = rows[:, 3:5].clip(min=1)
    rows[:, 6] = np.where(rng.random(len(rows)) < 0.2, rng.integers(0, 3, len(rows)), rows[:, 6])
    rows[:, 5] = rng.random(len(rows))
    return rows[np.argsort(rows[:, 0], kind="stable")]


def by_pycocotools(index: CocoIndex, rows: NDArray[np.float64]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(index.ground_truth())
        truth.createIndex()
        results = rows.copy()
        results[:, 0] = index.image_ids[rows[:, 0].astype(int)]
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(METRICS, (float(v) for v in evaluator.stats), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools(seed: int) -> None:
    index = make_index(seed)
    rows = noisy(index, seed)
    ours = score(index, rows)
    theirs = by_pycocotools(index, rows)
    assert 0.05 < theirs["AP"] < 0.95
    for name, value in theirs.items():
        if value >= 0:
            assert ours[f"val/{name}"] == pytest.approx(value, abs=1e-9)
        else:
            assert f"val/{name}" not in ours


def test_perfect_predictions_score_one() -> None:
    index = make_index()
    metrics = score(index, perfect(index))
    assert metrics["val/AP"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["val/AP50"] == pytest.approx(1.0, abs=1e-12)
    assert {key for key in metrics if key.startswith("val_class/")} == {
        "val_class/a", "val_class/b", "val_class/c",
    }  # fmt: skip


def test_nothing_found_is_zero_where_there_was_something() -> None:
    metrics = score(make_index(), np.empty((0, COLUMNS)))
    assert metrics["val/AP"] == 0.0


def test_no_ground_truth_is_no_number() -> None:
    index = make_index().first(0)
    assert score(index, np.empty((0, COLUMNS))) == {}


def test_a_class_or_size_without_boxes_is_left_out() -> None:
    index = make_index(used=(2, 77), smallest_px=60)
    metrics = score(index, perfect(index))
    assert "val_class/b" not in metrics
    assert "val/APs" not in metrics
    assert metrics["val_class/a"] == pytest.approx(1.0)
