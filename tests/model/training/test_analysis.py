"""Kinds of mistakes: hand-made cases, a naive twin, and COCO's AP50."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.data.index import CocoIndex, parse_coco
from model.training import analysis
from model.training.analysis import ERRORS, Kind
from model.training.evaluation import COLUMNS, score

Box = tuple[float, float, float, float]  # x, y, w, h
EMPTY = np.empty((0, COLUMNS))


def index_of(
    images: list[list[tuple[Box, int]]], crowds: tuple[int, ...] = (), num_classes: int = 3
) -> CocoIndex:
    """Ground truth as (box, label) for each image; crowds: which boxes, counted over all images."""
    annotations = [
        {"image_id": image + 1, "bbox": list(box), "category_id": label, "area": box[2] * box[3]}
        for image, boxes in enumerate(images)
        for box, label in boxes
    ]
    for number, annotation in enumerate(annotations):
        annotation |= {"id": number + 1, "iscrowd": int(number in crowds)}
    document = {
        "images": [
            {"id": i + 1, "file_name": f"{i}.jpg", "height": 400, "width": 400}
            for i in range(len(images))
        ],
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class {k}"} for k in range(num_classes)],
    }
    return parse_coco(json.dumps(document).encode(), "made.json")


def detections(*rows: tuple[int, Box, float, int]) -> NDArray[np.float64]:
    """(image, box, score, label) each."""
    return np.array([[image, *box, value, label] for image, box, value, label in rows], float)


def random_case(
    seed: int, *, num_images: int = 15, per_box: float = 2.0
) -> tuple[CocoIndex, NDArray[np.float64]]:
    """Boxes that overlap, crowds, empty images; detections near and far, in any order, with ties."""
    rng = np.random.default_rng(seed)
    images: list[list[tuple[Box, int]]] = []
    rows = []
    for image in range(num_images):
        boxes: list[tuple[Box, int]] = []
        for _ in range(int(rng.integers(0, 6))):
            w, h = rng.uniform(20, 160, 2)
            x, y = rng.uniform(0, 400 - w), rng.uniform(0, 400 - h)
            boxes.append(((x, y, w, h), int(rng.integers(3))))
        for (x, y, w, h), label in boxes:
            for _ in range(rng.poisson(per_box)):
                moved = np.array([x, y, w, h]) + rng.normal(0, 0.18, 4) * [w, h, w, h]
                wrong = rng.random() < 0.3
                rows.append([image, *moved, 0, int(rng.integers(3)) if wrong else label])
        for _ in range(rng.poisson(2)):
            rows.append(
                [image, *rng.uniform(0, 300, 2), *rng.uniform(10, 99, 2), 0, rng.integers(3)]
            )
        images.append(boxes)
    found = np.array(rows, dtype=float)
    found[:, 3:5] = found[:, 3:5].clip(min=1)
    found[:, 5] = rng.random(len(found)).round(2)
    number = sum(map(len, images))
    crowds = tuple(np.flatnonzero(rng.random(number) < 0.12).tolist())
    return index_of(images, crowds), rng.permutation(found)


def naive_iou(a: Box, b: Box, *, crowd: bool) -> float:
    width = max(0.0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - shared)


def naive_match(index: CocoIndex, rows: NDArray[np.float64]) -> list[tuple[int, int]]:
    """(kind, truth) of every detection, one after the other, by the words of the paper."""
    truth = [
        (image, (x0, y0, x1 - x0, y1 - y0), int(index.labels[row]), bool(index.crowd[row]), row)
        for image in range(len(index))
        for row in range(index.offsets[image], index.offsets[image + 1])
        for x0, y0, x1, y1 in [index.boxes_xyxy[row].astype(float)]
    ]
    result = [(-1, -1)] * len(rows)
    used: set[int] = set()
    for d in sorted(range(len(rows)), key=lambda d: (-rows[d, 5], rows[d, 0], d)):
        image, label, box = int(rows[d, 0]), int(rows[d, 6]), tuple(rows[d, 1:5])
        here = [
            (naive_iou(box, b, crowd=crowd), row, k == label, crowd)
            for owner, b, k, crowd, row in truth
            if owner == image
        ]
        own = sorted((iou, row) for iou, row, same, crowd in here if same and not crowd)
        other = sorted((iou, row) for iou, row, same, crowd in here if not same and not crowd)
        crowds = sorted((iou, row) for iou, row, same, crowd in here if same and crowd)
        free = [(iou, row) for iou, row in own if iou >= 0.5 and row not in used]
        if free:
            used.add(free[-1][1])
            result[d] = (Kind.CORRECT, free[-1][1])
        elif crowds and crowds[-1][0] >= 0.5:
            result[d] = (Kind.IGNORED, crowds[-1][1])
        elif own and 0.1 <= own[-1][0] < 0.5:
            result[d] = (Kind.LOCALISATION, own[-1][1])
        elif other and other[-1][0] >= 0.5:
            result[d] = (Kind.CLASSIFICATION, other[-1][1])
        elif own and own[-1][0] >= 0.5:
            result[d] = (Kind.DUPLICATE, own[-1][1])
        elif other and other[-1][0] > 0.1:
            result[d] = (Kind.BOTH, other[-1][1])
        else:
            result[d] = (Kind.BACKGROUND, -1)
    return result


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_the_naive_twin(seed: int) -> None:
    index, rows = random_case(seed)
    matches = analysis.match(index, rows)
    twin = naive_match(index, rows)
    assert [(int(k), int(t)) for k, t in zip(matches.kind, matches.truth, strict=True)] == twin
    assert set(matches.kind.tolist()) >= {k for k in Kind if k not in (Kind.BOTH, Kind.IGNORED)}
    for d, (kind, truth) in enumerate(twin):
        expected = 0.0
        if truth >= 0:
            x0, y0, x1, y1 = index.boxes_xyxy[truth].astype(float)
            box = (x0, y0, x1 - x0, y1 - y0)
            expected = naive_iou(tuple(rows[d, 1:5]), box, crowd=kind == Kind.IGNORED)
        assert matches.iou[d] == pytest.approx(expected)


def test_all_kinds_occur_in_the_random_cases() -> None:
    seen = set()
    for seed in range(6):
        seen |= set(analysis.match(*random_case(seed)).kind.tolist())
    assert seen == set(Kind)


def test_pairs_taken_in_turns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index, rows = random_case(1)
    whole = analysis.match(index, rows)
    monkeypatch.setattr(analysis, "PAIRS_AT_ONCE", 7)
    parts = analysis.match(index, rows)
    assert (parts.kind == whole.kind).all()
    assert (parts.truth == whole.truth).all()


TRUE: Box = (100, 100, 100, 100)
HALF_OFF: Box = (150, 100, 100, 100)  # IoU 1/3
FAR: Box = (290, 290, 50, 50)


@pytest.mark.parametrize(
    ("box", "label", "kind", "truth"),
    [
        (TRUE, 0, Kind.CORRECT, 0),
        ((100, 100, 100, 50), 0, Kind.CORRECT, 0),  # IoU exactly 0.5 is found
        (TRUE, 1, Kind.CLASSIFICATION, 0),
        (HALF_OFF, 0, Kind.LOCALISATION, 0),
        ((100, 100, 100, 10), 0, Kind.LOCALISATION, 0),  # exactly 0.1
        ((100, 100, 100, 10), 1, Kind.BACKGROUND, -1),
        (HALF_OFF, 1, Kind.BOTH, 0),
        (FAR, 0, Kind.BACKGROUND, -1),
    ],
)
def test_one_detection_of_each_kind(box: Box, label: int, kind: Kind, truth: int) -> None:
    matches = analysis.match(index_of([[(TRUE, 0)]]), detections((0, box, 0.9, label)))
    assert (matches.kind[0], matches.truth[0]) == (kind, truth)
    assert matches.found[0] == (kind == Kind.CORRECT)
    assert matches.missed[0] == (kind in (Kind.BOTH, Kind.BACKGROUND))


def test_the_second_of_two_is_a_duplicate_and_scores_decide() -> None:
    rows = detections((0, TRUE, 0.4, 0), (0, (105, 100, 100, 100), 0.8, 0))
    matches = analysis.match(index_of([[(TRUE, 0)]]), rows)
    assert matches.kind.tolist() == [Kind.DUPLICATE, Kind.CORRECT]
    assert matches.truth.tolist() == [0, 0]
    assert matches.iou == pytest.approx([1.0, 95 / 105])
    half: Box = (100, 100, 100, 50)
    matches = analysis.match(
        index_of([[(TRUE, 0)]]), detections((0, TRUE, 0.9, 0), (0, half, 0.8, 0))
    )
    assert matches.kind.tolist() == [Kind.CORRECT, Kind.DUPLICATE]


def test_an_image_does_not_see_its_neighbours_boxes() -> None:
    matches = analysis.match(index_of([[(TRUE, 0)], []]), detections((1, TRUE, 0.9, 0)))
    assert matches.kind.tolist() == [Kind.BACKGROUND]
    assert matches.missed.tolist() == [True]


def test_a_crowd_takes_any_number_and_is_never_missed() -> None:
    index = index_of([[((0, 0, 200, 200), 0), (FAR, 0)]], crowds=(0,))
    inside: Box = (20, 20, 30, 30)
    rows = detections((0, inside, 0.9, 0), (0, inside, 0.8, 0), (0, inside, 0.7, 1))
    matches = analysis.match(index, rows)
    assert matches.kind.tolist() == [Kind.IGNORED, Kind.IGNORED, Kind.BACKGROUND]
    assert matches.iou.tolist() == [1.0, 1.0, 0.0]
    assert matches.found.tolist() == [False, False]
    assert matches.missed.tolist() == [False, True]
    assert analysis.error_kinds(index, matches, threshold=0).counts["missed"] == 1
    table = analysis.confusion(index, matches, threshold=0)
    assert table.sum() == 2  # the missed box, the invention of class 1
    assert (table[0, 3], table[3, 1]) == (1, 1)


def test_a_real_box_in_a_crowd_is_found_first() -> None:
    index = index_of([[((0, 0, 200, 200), 0), ((20, 20, 30, 30), 0)]], crowds=(0,))
    matches = analysis.match(index, detections((0, (20, 20, 30, 30), 0.9, 0)))
    assert (matches.kind[0], matches.truth[0]) == (Kind.CORRECT, 1)


@pytest.mark.parametrize("seed", range(8))
def test_ap50_equals_the_evaluators(seed: int) -> None:
    index, rows = random_case(seed)
    expected = score(index, rows[np.argsort(rows[:, 0], kind="stable")])["val/AP50"]
    assert 0.05 < expected < 0.95
    assert analysis.ap50(index, analysis.match(index, rows)) == pytest.approx(expected, abs=1e-9)


def test_ap50_counts_a_hundred_detections_of_an_image_and_class() -> None:
    index = index_of([[(TRUE, 0)], [(TRUE, 0)]])
    noise = [(0, FAR, 0.9 - k / 1000, 0) for k in range(100)]
    rows = detections(*noise, (0, TRUE, 0.1, 0), (1, TRUE, 0.95, 0))
    matches = analysis.match(index, rows)
    assert matches.kind[100] == Kind.IGNORED
    assert analysis.ap50(index, matches) == pytest.approx(score(index, rows)["val/AP50"], abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (((0, TRUE, 0.9, 1), (1, TRUE, 0.8, 0)), "classification"),
        (((0, HALF_OFF, 0.9, 0), (1, TRUE, 0.8, 0)), "localisation"),
        (((0, TRUE, 0.9, 0), (1, TRUE, 0.7, 0), (0, TRUE, 0.8, 0)), "duplicate"),
        (((0, TRUE, 0.8, 0), (1, TRUE, 0.7, 0), (0, FAR, 0.9, 0)), "background"),
        (((0, TRUE, 0.8, 0), (1, TRUE, 0.7, 0), (1, (220, 220, 100, 100), 0.9, 0)), "both"),
        (((0, TRUE, 0.8, 0),), "missed"),
    ],
)
def test_repairing_the_only_mistake_makes_ap50_one(
    rows: tuple[tuple[int, Box, float, int], ...], error: str
) -> None:
    extra: list[tuple[Box, int]] = [((220, 270, 100, 100), 2)] if error == "both" else []
    index = index_of([[(TRUE, 0)], [(TRUE, 0), *extra]])
    found = [*rows, (1, (220, 270, 100, 100), 0.95, 2)] if error == "both" else rows
    kinds = analysis.error_kinds(index, analysis.match(index, detections(*found)), threshold=0)
    assert {name for name, number in kinds.counts.items() if number} == {error}
    assert kinds.ap50 < 1
    assert kinds.ap50 + kinds.delta_ap50[error] == pytest.approx(1)
    assert all(kinds.delta_ap50[name] == 0 for name in ERRORS if name != error)


def test_of_two_repairs_for_one_box_the_better_score_counts() -> None:
    """Else a box would be found twice, and AP pass what it can be."""
    index = index_of([[(TRUE, 0)], [(TRUE, 0)]])
    rows = detections(
        (0, HALF_OFF, 0.9, 0), (0, HALF_OFF, 0.8, 0), (1, FAR, 0.7, 0), (1, TRUE, 0.6, 0)
    )
    kinds = analysis.error_kinds(index, analysis.match(index, rows), threshold=0)
    # Left: correct, background, correct: precision 1 up to recall 0.5, then 2/3.
    repaired = (51 + 50 * 2 / 3) / 101
    assert kinds.ap50 + kinds.delta_ap50["localisation"] == pytest.approx(repaired)


def test_a_repair_takes_the_box_from_a_correct_detection_of_lower_score() -> None:
    index = index_of([[(TRUE, 0)], [(TRUE, 0)]])
    rows = detections((0, HALF_OFF, 0.9, 0), (0, TRUE, 0.6, 0), (1, TRUE, 0.3, 0))
    kinds = analysis.error_kinds(index, analysis.match(index, rows), threshold=0)
    assert kinds.ap50 + kinds.delta_ap50["localisation"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(6))
def test_no_repair_makes_it_worse_and_none_passes_one(seed: int) -> None:
    index, rows = random_case(seed, per_box=0.7)
    kinds = analysis.error_kinds(index, analysis.match(index, rows))
    assert min(kinds.delta_ap50.values()) >= -1e-12
    assert all(kinds.ap50 + gain <= 1 + 1e-12 for gain in kinds.delta_ap50.values())
    assert sum(gain > 0.001 for gain in kinds.delta_ap50.values()) >= 4


@pytest.mark.parametrize("seed", range(4))
def test_counts_at_a_threshold_are_those_of_the_kept_detections(seed: int) -> None:
    index, rows = random_case(seed)
    kept = rows[rows[:, 5] >= 0.4]
    ours = analysis.error_kinds(index, analysis.match(index, rows), threshold=0.4)
    alone = analysis.match(index, kept)
    for name in ERRORS[:-1]:
        assert ours.counts[name] == (alone.kind == Kind[name.upper()]).sum()
    assert ours.correct == alone.found.sum()
    assert ours.counts["missed"] == alone.missed.sum() > 0


@pytest.mark.parametrize("seed", range(6))
def test_confusion_equals_a_naive_twin(seed: int) -> None:
    index, rows = random_case(seed)
    matches = analysis.match(index, rows)
    table = analysis.confusion(index, matches, threshold=0.3)
    twin = np.zeros((4, 4), dtype=int)
    used = set()
    kept = [d for d in range(len(rows)) if rows[d, 5] >= 0.3 and matches.kind[d] != Kind.IGNORED]
    for d in sorted(kept, key=lambda d: (-rows[d, 5], rows[d, 0], d)):
        image = int(rows[d, 0])
        found = []
        for row in range(index.offsets[image], index.offsets[image + 1]):
            x0, y0, x1, y1 = index.boxes_xyxy[row].astype(float)
            iou = naive_iou(tuple(rows[d, 1:5]), (x0, y0, x1 - x0, y1 - y0), crowd=False)
            if iou >= 0.5 and row not in used and not index.crowd[row]:
                found.append((iou, row))
        true = 3
        if found:
            used.add(max(found)[1])
            true = index.labels[max(found)[1]]
        twin[true, int(rows[d, 6])] += 1
    for row in np.flatnonzero(~index.crowd):
        twin[index.labels[row], 3] += row not in used
    assert table.tolist() == twin.tolist()
    assert table[:3].sum() == (~index.crowd).sum()
    assert table[:3, :3].sum() > np.trace(table[:3, :3]) > 0


def test_confusion_takes_the_right_class_where_two_boxes_coincide() -> None:
    index = index_of([[(TRUE, 0), (TRUE, 1), (TRUE, 2)]])
    matches = analysis.match(index, detections((0, TRUE, 0.9, 1), (0, TRUE, 0.8, 0)))
    table = analysis.confusion(index, matches, threshold=0)
    assert (table[0, 0], table[1, 1], table[2, 3]) == (1, 1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_best_f1_is_the_best_of_all_thresholds(seed: int) -> None:
    index, rows = random_case(seed)
    matches = analysis.match(index, rows)
    counted = matches.kind != Kind.IGNORED
    total = int((~index.crowd).sum())

    def f1(threshold: float) -> float:
        kept = counted & (rows[:, 5] >= threshold)
        return float(2 * (kept & (matches.kind == Kind.CORRECT)).sum() / (kept.sum() + total))

    every = sorted(set(rows[:, 5]))
    threshold, value = analysis.best_f1(index, matches)
    assert value == pytest.approx(max(map(f1, every)))
    assert threshold == max(t for t in every if f1(t) == max(map(f1, every)))


def test_calibration_by_hand() -> None:
    index = index_of([[(TRUE, 0)], [(TRUE, 0)]])
    rows = detections((0, TRUE, 0.9, 0), (1, FAR, 0.8, 0), (1, TRUE, 0.3, 0), (0, FAR, 0.5, 0))
    found = analysis.calibration(analysis.match(index, rows), num_bins=2)
    assert found.count.tolist() == [1, 3]
    assert found.mean_score == pytest.approx([0.3, 2.2 / 3])
    assert found.precision == pytest.approx([1.0, 1 / 3])
    assert found.error == pytest.approx((1 * 0.7 + 3 * (2.2 / 3 - 1 / 3)) / 4)
    one = analysis.calibration(analysis.match(index, detections((0, TRUE, 1.0, 0))))
    assert one.count.tolist() == [0] * 9 + [1]


def test_quality_and_the_choice_of_images() -> None:
    two = [(TRUE, 0), (FAR, 1)]
    index = index_of([two, [(TRUE, 0)], [], [], [(TRUE, 0)], two])
    rows = detections(
        (0, TRUE, 0.9, 0), (1, TRUE, 0.9, 0), (3, TRUE, 0.9, 0), (5, TRUE, 0.9, 0), (5, FAR, 0.9, 1),
        (2, TRUE, 0.1, 0),
    )  # fmt: skip
    matches = analysis.match(index, rows)
    quality = analysis.image_quality(index, matches, threshold=0.5)
    assert quality == pytest.approx([2 / 3, 1, 1, 0, 0, 1])
    best, worst = analysis.best_and_worst(index, quality, num=2)
    assert best.tolist() == [5, 1]  # of three perfect ones those with most boxes
    assert worst.tolist() == [4, 3]
    best, worst = analysis.best_and_worst(index, quality, num=4)
    assert sorted([*best, *worst]) == list(range(6))


def test_fixed_images_have_boxes_and_are_spread() -> None:
    boxes: list[tuple[Box, int]] = [(TRUE, 0)]
    index = index_of([boxes if i % 2 else [] for i in range(40)])
    chosen = analysis.fixed_images(index, 4)
    assert (chosen % 2 == 1).all()
    assert chosen.tolist() == [5, 15, 25, 35]
    assert analysis.fixed_images(index, 99).tolist() == list(range(1, 40, 2))
    assert analysis.fixed_images(index, 0).tolist() == []
    assert analysis.fixed_images(index.first(1), 3).tolist() == []


def test_best_anchor_iou_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 300, (30, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 200, (30, 2))], axis=1).astype(np.float32)
    anchors, truth = torch.from_numpy(boxes[:20]), torch.from_numpy(boxes[20:])
    monkeypatch.setattr(analysis, "PAIRS_AT_ONCE", 45)  # two boxes a turn
    found = analysis.best_anchor_iou(truth, anchors)

    def xywh(box: NDArray[np.float32]) -> Box:
        x0, y0, x1, y1 = (float(v) for v in box)
        return x0, y0, x1 - x0, y1 - y0

    best = np.zeros(10)
    for (i, box), anchor in itertools.product(enumerate(boxes[20:]), boxes[:20]):
        best[i] = max(best[i], naive_iou(xywh(box), xywh(anchor), crowd=False))
    assert found == pytest.approx(best, abs=1e-5)
    assert analysis.best_anchor_iou(truth[:0], anchors).shape == (0,)


@pytest.mark.parametrize("images", [[], [[]], [[(TRUE, 0)]]])
@pytest.mark.parametrize("rows", [EMPTY, detections((0, FAR, 0.9, 1))])
def test_nothing_there_or_nothing_found(
    images: list[list[tuple[Box, int]]], rows: NDArray[np.float64]
) -> None:
    index = index_of(images)
    rows = rows if images else EMPTY
    matches = analysis.match(index, rows)
    kinds = analysis.error_kinds(index, matches)
    boxes = len(index.labels)
    assert analysis.best_f1(index, matches) == (analysis.FALLBACK_THRESHOLD, 0.0)
    assert kinds.counts == dict.fromkeys(ERRORS, 0) | {"background": len(rows), "missed": boxes}
    assert math.isnan(kinds.ap50) == (boxes == 0)
    if boxes:
        assert kinds.delta_ap50["missed"] == 1
    assert analysis.confusion(index, matches).sum() == boxes + len(rows)
    assert math.isnan(analysis.calibration(matches).error) == (len(rows) == 0)
    assert analysis.image_quality(index, matches).tolist() == [float(boxes + len(rows) == 0)] * len(
        images
    )
