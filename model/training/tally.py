"""COCO average precision of any choice of images, from matches that are made once.

Shape legend: N images, n detections, M ground-truth boxes, K classes, T IoU thresholds, b weightings.
A weighting says how often each image counts: ones give pycocotools' numbers (a test holds it to
them), the counts of a draw with replacement give one resample of a bootstrap.

Precision only has to be known at correct detections. Of the others it matters how many come before,
which one running sum over all detections of a size tells for every threshold; what a threshold
changes (a detection that is matched to a box which does not count) is corrected at its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.index import CocoIndex
from model.training.analysis import beyond_limit, pairs

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}  # fmt: skip
"""Bounds in square pixels, both inclusive."""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
AT_ONCE = 2**21  # elements of one temporary
MOST_EXACT = 2**24  # up to which single precision holds every whole number


@dataclass(frozen=True)
class Averages:
    """metrics [b, 6] as METRICS names them; classes [b, K]: AP of each. nan without ground truth."""

    metrics: NDArray[np.float64]
    classes: NDArray[np.float64]


class Tally:
    """One model's detections, matched; `averages` weighs the images."""

    def __init__(self, index: CocoIndex, rows: NDArray[np.float64]) -> None:
        """rows: detections [n, evaluation.COLUMNS], those of an image in the order of the detector."""
        self.num_images, self.num_classes = len(index), index.classes.num_classes
        rows = rows[np.lexsort((rows[:, 0], -rows[:, 5]))]
        rows = rows[~beyond_limit(index, rows, np.arange(len(rows)))]
        rows = rows[np.argsort(rows[:, 6], kind="stable")]  # by class, best first
        detection, truth, iou = pairs(index, rows, THRESHOLDS[0])
        same = index.labels[truth] == rows[detection, 6]
        near = detection[same], truth[same], iou[same]
        image_of_box = np.repeat(np.arange(len(index)), np.diff(index.offsets))
        self.areas = [
            _Area.of(index, rows, image_of_box, near, bounds) for bounds in AREAS.values()
        ]

    def num_images_with_truth(self) -> NDArray[np.int64]:
        """Of each metric, then of each class [6 + K]."""
        every, *sizes = (int(area.boxes.any(axis=1).sum()) for area in self.areas)
        by_class = (self.areas[0].boxes > 0).sum(axis=0)
        return np.array([every, every, every, *sizes, *by_class], dtype=np.int64)

    def averages(self, weights: NDArray[np.integer]) -> Averages:
        """weights [b, N], how often each image counts."""
        largest = max(self.num_images, *(area.size for area in self.areas))
        turn = max(1, AT_ONCE // largest)
        parts = [
            self._averages(weights[start : start + turn].astype(np.int32))
            for start in range(0, len(weights), turn)
        ]
        return Averages(
            np.concatenate([part.metrics for part in parts]),
            np.concatenate([part.classes for part in parts]),
        )

    def _averages(self, weights: NDArray[np.int32]) -> Averages:
        every, *sizes = (area.precision(weights, self.num_classes) for area in self.areas)
        columns = [
            every.mean(axis=1),
            every[:, 0],
            every[:, 5],
            *(one.mean(axis=1) for one in sizes),
        ]
        metrics = np.stack([_mean_of_known(column) for column in columns], axis=1)
        return Averages(metrics, columns[0])


@dataclass(frozen=True)
class _Count:
    """Images [m] in some order, and which stretch of them each of e events counts: first to last."""

    image: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    sign: NDArray[np.int32] | None = None

    def at_events(self, weights: NDArray[np.int32]) -> NDArray[np.int32]:
        """weights [b, N] -> sums [b, e]."""
        values = np.take(weights, self.image, axis=1)
        if self.sign is not None:
            values *= self.sign
        sums = np.zeros((len(weights), len(self.image) + 1), dtype=np.int32)
        np.cumsum(values, axis=1, out=sums[:, 1:])
        counted: NDArray[np.int32] = np.take(sums, self.last, axis=1)
        counted -= np.take(sums, self.first, axis=1)
        return counted


@dataclass(frozen=True)
class _Area:
    """Detections and boxes of one range of sizes, as its events see them.

    An event is a correct detection at one threshold; events [e] go by threshold, class and rank, and
    those of one threshold and class are a segment. hits: events; inside: detections of the class
    whose size is in the range; changes: matched ones that count although they are not inside (+1),
    or do not although they are (-1). starts [s]: first event of each segment; segments [s]: its
    number, threshold * K + class; lift, label [e]: see `_fill`. boxes [N, K]: boxes to be
    found; most_boxes: of a class.
    """

    hits: _Count
    inside: _Count
    changes: _Count
    starts: NDArray[np.int64]
    segments: NDArray[np.int64]
    lift: NDArray[np.float64]
    label: NDArray[np.int64]
    boxes: NDArray[np.float32]
    most_boxes: int

    @property
    def size(self) -> int:
        """Of the largest temporary, per weighting."""
        return max(len(self.inside.image), len(self.label)) + 1

    @classmethod
    def of(
        cls,
        index: CocoIndex,
        rows: NDArray[np.float64],
        image_of_box: NDArray[np.int64],
        near: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
        bounds: tuple[float, float],
    ) -> _Area:
        """rows by class, best first; near: see `_assign`."""
        num_classes = index.classes.num_classes
        ignored = index.crowd | (index.area < bounds[0]) | (index.area > bounds[1])
        owner = _assign(index, near, ignored, len(rows))
        image, label = rows[:, 0].astype(np.int64), rows[:, 6].astype(np.int64)
        area = rows[:, 3] * rows[:, 4]
        inside = (area >= bounds[0]) & (area <= bounds[1])

        threshold, place = np.nonzero(owner >= 0)
        matched = image[place]
        correct = ~ignored[owner[threshold, place]]
        change = correct.astype(np.int32) - inside[place]
        order = threshold * len(rows) + place  # ascending
        segment = threshold * num_classes + label[place]  # ascending too: rows are by class
        events, changed = np.flatnonzero(correct), np.flatnonzero(change)
        place, mine = place[events], segment[events]
        begin, so_far = np.searchsorted(mine, mine), np.concatenate([[0], np.cumsum(inside)])
        starts, number = np.unique(begin, return_inverse=True)
        boxes = np.zeros((len(index), num_classes), dtype=np.float32)
        np.add.at(boxes, (image_of_box[~ignored], index.labels[~ignored]), 1.0)
        most_boxes = int(np.bincount(index.labels[~ignored], minlength=1).max())
        return cls(
            hits=_Count(matched[events], begin, np.arange(len(events)) + 1),
            inside=_Count(
                image[inside], so_far[np.searchsorted(label, label[place])], so_far[place + 1]
            ),
            changes=_Count(
                matched[changed],
                np.searchsorted(segment[changed], mine),
                np.searchsorted(order[changed], order[events], side="right"),
                change[changed],
            ),
            starts=starts,
            segments=mine[starts],
            lift=2.0 * (len(starts) - number.astype(np.float64)),
            label=label[place],
            boxes=boxes,
            most_boxes=most_boxes,
        )

    def precision(self, weights: NDArray[np.int32], num_classes: int) -> NDArray[np.float64]:
        """Interpolated average precision [b, T, K], nan without ground truth."""
        found = np.zeros((len(weights), len(THRESHOLDS) * num_classes))
        # [b, K], whole numbers that single precision holds while they are small enough.
        exact = self.most_boxes * int(weights.max(initial=0)) <= MOST_EXACT
        kind = np.float32 if exact else np.float64
        asked = (weights.astype(kind) @ self.boxes.astype(kind, copy=False)).astype(np.float64)
        if len(self.label):
            found[:, self.segments] = self._areas(weights, np.maximum(asked, 1.0))
        by_threshold = found.reshape(len(weights), len(THRESHOLDS), num_classes)
        return np.where(asked[:, None] > 0, by_threshold, np.nan)

    def _areas(self, weights: NDArray[np.int32], asked: NDArray[np.float64]) -> NDArray[np.float64]:
        """Below the interpolated curve of each segment [b, s]; asked [b, K]: boxes to be found."""
        hits = self.hits.at_events(weights)
        counted = self.inside.at_events(weights)
        if len(self.changes.image):
            counted += self.changes.at_events(weights)
        # The best precision from here on. Each segment is lifted above those behind it, so that one
        # pass from behind does for all.
        ceiling = hits / np.maximum(counted, 1) + self.lift
        ceiling = np.maximum.accumulate(ceiling[:, ::-1], axis=1)[:, ::-1] - self.lift

        # Of RECALLS, those up to hits / asked. Where it is one of them, its last digit decides, as in
        # pycocotools; elsewhere the next one is farther than any rounding.
        recall = hits / np.take(asked, self.label, axis=1)
        reached = (recall * (len(RECALLS) - 1) + 1e-9).astype(np.int32)
        reached += np.take(RECALLS, reached) <= recall
        gained = reached.copy()
        gained[:, 1:] -= reached[:, :-1]
        gained[:, self.starts] = reached[:, self.starts]
        return np.add.reduceat(ceiling * gained, self.starts, axis=1) / len(RECALLS)


def _assign(
    index: CocoIndex,
    near: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
    ignored: NDArray[np.bool_],
    num_detections: int,
) -> NDArray[np.int64]:
    """Box that each detection takes at each threshold [T, n], -1 for none.

    near: detection, box and IoU of the pairs of one image and class that reach the first threshold.
    The best score takes the free box it overlaps most, one that does not count only where there is
    no other; a crowd is never taken away. Of equals the later box, as pycocotools has it.
    Images and classes do not meet, so all of them go forward together, one pair each a round.
    """
    detection, truth, iou = near
    owner = np.full((len(THRESHOLDS), num_detections), -1, dtype=np.int64)
    taken = np.zeros((len(THRESHOLDS), len(ignored)), dtype=np.bool_)
    image = np.searchsorted(index.offsets, truth, side="right") - 1
    group = image * index.classes.num_classes + index.labels[truth]
    turn = np.lexsort((-truth, -iou, ignored[truth], detection, group))
    group, detection, truth, iou = group[turn], detection[turn], truth[turn], iou[turn]
    place = np.arange(len(group)) - np.searchsorted(group, group)
    by_place = np.argsort(place, kind="stable")
    for chosen in np.split(by_place, np.cumsum(np.bincount(place))[:-1]):
        mine, box = detection[chosen], truth[chosen]
        takes = (iou[chosen] >= THRESHOLDS[:, None]) & (owner[:, mine] < 0) & ~taken[:, box]
        owner[:, mine] = np.where(takes, box, owner[:, mine])
        taken[:, box] |= takes & ~index.crowd[box]
    return owner


def _mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis, nan where nothing is known."""
    known = ~np.isnan(values)
    number = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
