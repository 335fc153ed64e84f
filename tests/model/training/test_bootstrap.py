from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from model.data.index import CocoIndex, parse_coco
from model.training import bootstrap
from model.training.bootstrap import Difference, compare, draw
from model.training.evaluation import score

from .test_evaluation import make_index, noisy, perfect


def test_a_model_against_itself_is_exactly_nothing() -> None:
    index = make_index(0, num_images=20)
    rows = noisy(index, 0)
    found = compare(index, rows, rows.copy(), resamples=50)
    assert set(found.metrics) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    for one in [*found.metrics.values(), *found.classes.values()]:
        assert (one.value, one.low, one.high, one.better) == (0.0, 0.0, 0.0, None)


def test_the_values_are_evaluations() -> None:
    index = make_index(1, num_images=20)
    a, b = noisy(index, 1), noisy(index, 2)
    found = compare(index, a, b, resamples=20)
    for rows, side in ((a, "a"), (b, "b")):
        expected = score(index, rows)
        for name, one in found.metrics.items():
            assert getattr(one, side) == pytest.approx(expected[f"val/{name}"], abs=1e-9)
        for name, one in found.classes.items():
            assert getattr(one, side) == pytest.approx(expected[f"val_class/{name}"], abs=1e-9)


def test_what_is_plainly_better_is_said_so_in_both_orders() -> None:
    index = make_index(4, num_images=30)
    good, bad = perfect(index), noisy(index, 4)
    there = compare(index, good, bad, resamples=100).metrics["AP"]
    back = compare(index, bad, good, resamples=100).metrics["AP"]
    assert (there.better, back.better) == ("a", "b")
    assert 0 < there.low < there.value < there.high
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_a_seed_gives_the_same_however_the_draws_are_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = make_index(5, num_images=15)
    a, b = noisy(index, 5), noisy(index, 6)
    expected = compare(index, a, b, resamples=30, seed=7)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 4)
    monkeypatch.setattr(bootstrap, "WORKERS", 1)
    assert compare(index, a, b, resamples=30, seed=7) == expected
    assert compare(index, a, b, resamples=30, seed=8) != expected


def test_draws_are_with_replacement() -> None:
    counts = draw(50, range(400), seed=3)
    assert (counts.sum(axis=1) == 50).all()
    assert counts.max() > 2
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)
    np.testing.assert_array_equal(counts[5:9], draw(50, range(5, 9), seed=3))


def test_without_ground_truth_there_is_no_difference_to_tell() -> None:
    index = make_index(2, used=(2, 77), smallest_px=60)
    found = compare(index, perfect(index), noisy(index, 2), resamples=20)
    assert set(found.classes) == {"a", "c"}
    assert "APs" not in found.metrics


def population(
    rng: np.random.Generator, num_images: int
) -> tuple[CocoIndex, list[NDArray[np.float64]]]:
    """Images with one or two boxes, and what two detectors find: one misses 30 %, one 40 %."""
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 400, "height": 400} for i in range(num_images)
    ]
    boxes, rows = [], ([], [])
    for image in range(num_images):
        hard = rng.normal(0, 0.15)  # what both find hard
        for k in range(int(rng.integers(1, 3))):
            box = [20 + 150 * k, 20.0, 100.0, 100.0]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": image,
                    "category_id": 1,
                    "bbox": box,
                    "area": 1e4,
                    "iscrowd": 0,
                }
            )
            for found, miss in zip(rows, (0.3, 0.4), strict=True):
                seen = rng.random() > miss + hard
                place = box[0] if seen else box[0] + 60
                found.append(
                    [image, place, *box[1:], rng.beta(4, 2) if seen else rng.beta(2, 4), 0]
                )
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "box"}]}
    index = parse_coco(json.dumps(document).encode(), "population")
    return index, [np.array(found) for found in rows]  # fmt: skip


def test_the_interval_covers_the_truth() -> None:
    """Most 95 % intervals from many samples hold the population's difference, but not all."""
    rng = np.random.default_rng(0)
    index, (a, b) = population(rng, 3000)
    truth = score(index, a)["val/AP50"] - score(index, b)["val/AP50"]
    trials, covered, decided = 50, 0, 0
    for trial in range(trials):
        sample, (mine, other) = population(np.random.default_rng((1, trial)), 80)
        one = compare(sample, mine, other, resamples=80, seed=trial).metrics["AP50"]
        covered += one.low <= truth <= one.high
        decided += one.better is not None
    assert 0.05 < truth < 0.2
    assert 42 <= covered < trials, covered
    assert decided > 10, "intervals so wide that nothing is ever told cover too"


@pytest.mark.parametrize(
    ("low", "high", "better"),
    [(0.1, 0.2, "a"), (-0.2, -0.1, "b"), (-0.1, 0.2, None), (0.0, 0.2, None), (-0.1, 0.0, None)],
)
def test_verdict(low: float, high: float, better: str | None) -> None:
    assert Difference(0.5, 0.4, low, high, 10).better == better
    assert Difference(0.5, 0.4, low, high, 9).better is None
