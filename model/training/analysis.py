"""What kind of mistakes a detector makes: the numbers behind the figures of an evaluation.

Shape legend: N images, M ground-truth boxes, n detections (rows as in `evaluation.COLUMNS`),
K classes. A score threshold keeps the detections with score >= threshold.
Source: TIDE, Bolya et al. 2020, arXiv 2008.08115 (kinds and their repair); pycocotools (matching).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.index import CocoIndex
from model.detection.boxes import pairwise_iou

FOREGROUND_IOU = 0.5  # t_f: from here on a box is found
BACKGROUND_IOU = 0.1  # t_b: up to here a detection has nothing to do with a box
MAX_DETECTIONS = 100  # per image and class, COCO's
RECALLS = np.linspace(0.0, 1.0, 101)
FALLBACK_THRESHOLD = 0.5  # where no detection is correct, no threshold is the best
PAIRS_AT_ONCE = 2**19


class Kind(IntEnum):
    """What a detection is. IGNORED: most of it lies in a crowd of its class, or past the 100th."""

    CORRECT = 0
    CLASSIFICATION = 1
    LOCALISATION = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5
    IGNORED = 6


ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class Matches:
    """Detections beside ground truth.

    rows float64 [n, 7] as given; order int64 [n]: best score first; kind int8 [n]; truth int64
    [n]: row of the ground-truth box it belongs to, -1 for none; iou float64 [n] with that box (0
    for none; with a crowd the share of the detection inside); found bool [M]: some detection is
    correct for it; missed bool [M]: not found, nor tried by a detection of the wrong class or
    place (TIDE's missed). A crowd is neither.
    """

    rows: NDArray[np.float64]
    order: NDArray[np.int64]
    kind: NDArray[np.int8]
    truth: NDArray[np.int64]
    iou: NDArray[np.float64]
    found: NDArray[np.bool_]
    missed: NDArray[np.bool_]

    @property
    def scores(self) -> NDArray[np.float64]:
        return self.rows[:, 5]

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.rows[:, 6].astype(np.int64)


def match(
    index: CocoIndex,
    rows: NDArray[np.float64],
    *,
    foreground_iou: float = FOREGROUND_IOU,
    background_iou: float = BACKGROUND_IOU,
) -> Matches:
    """Detections [n, COLUMNS] of any order -> what each of them is.

    Where several kinds fit, the first of correct, ignored, localisation, classification,
    duplicate, background, both: the order of TIDE's implementation.
    """
    order = np.lexsort((rows[:, 0], -rows[:, 5]))
    detection, truth, iou = pairs(index, rows, background_iou)
    same = index.labels[truth] == rows[detection, 6]
    crowd, fits = index.crowd[truth], iou >= foreground_iou
    late = beyond_limit(index, rows, order)
    chosen = same & fits & ~crowd & ~late[detection]
    owner = _greedy(order, detection[chosen], truth[chosen], len(index.labels))

    def best(kept: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        box, overlap = np.full(len(rows), -1), np.zeros(len(rows))
        box[detection[kept]], overlap[detection[kept]] = truth[kept], iou[kept]
        return box, overlap  # pairs come by ascending IoU: the last one written stays

    own, own_iou = best(same & ~crowd)
    other, other_iou = best(~same & ~crowd)
    in_crowd, inside = best(same & crowd & fits)
    taken = owner[detection] == truth
    owner_iou = np.zeros(len(rows))
    owner_iou[detection[taken]] = iou[taken]
    kind = np.full(len(rows), Kind.BACKGROUND, dtype=np.int8)
    belongs, overlap = np.full(len(rows), -1), np.zeros(len(rows))
    for which, where, box, value in (  # a later line has the last word
        (Kind.BOTH, other_iou > background_iou, other, other_iou),
        (Kind.DUPLICATE, own_iou >= foreground_iou, own, own_iou),
        (Kind.CLASSIFICATION, other_iou >= foreground_iou, other, other_iou),
        (Kind.LOCALISATION, (own >= 0) & (own_iou < foreground_iou), own, own_iou),
        (Kind.IGNORED, late | (in_crowd >= 0), in_crowd, inside),
        (Kind.CORRECT, owner >= 0, owner, owner_iou),
    ):
        kind[where], belongs[where], overlap[where] = which, box[where], value[where]
    found, missed = _ground_truth(index, kind, belongs)
    return Matches(rows, order, kind, belongs, overlap, found, missed)


def _ground_truth(
    index: CocoIndex, kind: NDArray[np.int8], truth: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """found [M], missed [M] by these detections."""
    found, tried = np.zeros((2, len(index.labels)), dtype=np.bool_)
    found[truth[kind == Kind.CORRECT]] = True
    tried[truth[(kind == Kind.CLASSIFICATION) | (kind == Kind.LOCALISATION)]] = True
    return found, ~(found | tried | index.crowd)


def pairs(
    index: CocoIndex, rows: NDArray[np.float64], min_iou: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Detection, ground-truth box and IoU of all pairs that reach min_iou, by ascending IoU.

    The IoU with a crowd is the share of the detection that lies inside, as COCO has it.
    """
    image = rows[:, 0].astype(np.int64)
    num_boxes = np.diff(index.offsets)[image]
    ends = np.cumsum(num_boxes)
    shift = index.offsets[image] - (ends - num_boxes)  # pair number -> ground-truth row
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for start, stop in _slices(ends):
        detection = np.repeat(np.arange(start, stop), num_boxes[start:stop])
        first_pair = int(ends[start] - num_boxes[start])
        truth = np.arange(first_pair, first_pair + len(detection)) + shift[detection]
        iou = _overlap(rows[detection, 1:5], index.boxes_xyxy[truth], index.crowd[truth])
        near = iou >= min_iou
        parts.append((detection[near], truth[near], iou[near]))
    detection, truth, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    by_iou = np.lexsort((truth, iou))
    return detection[by_iou], truth[by_iou], iou[by_iou]


def _slices(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of detections with about PAIRS_AT_ONCE pairs each; ends [n]: pairs up to each."""
    start = 0
    while start < len(ends):
        limit = (ends[start - 1] if start else 0) + PAIRS_AT_ONCE
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield start, stop
        start = stop


def _overlap(
    xywh: NDArray[np.float64], boxes_xyxy: NDArray[np.float32], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """[P] in float64, in pycocotools' order of operations: a box at exactly 0.5 must not differ."""
    low, high = boxes_xyxy[:, :2].astype(np.float64), boxes_xyxy[:, 2:].astype(np.float64)
    sides = np.minimum(xywh[:, :2] + xywh[:, 2:], high) - np.maximum(xywh[:, :2], low)
    sides = sides.clip(min=0)
    shared = sides[:, 0] * sides[:, 1]
    area, truth_area = xywh[:, 2] * xywh[:, 3], np.prod(high - low, axis=1)
    whole = np.where(crowd, area, area + truth_area - shared)
    iou: NDArray[np.float64] = np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)
    return iou


def beyond_limit(
    index: CocoIndex, rows: NDArray[np.float64], order: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Detections [n] that COCO does not look at: past the hundredth of their image and class."""
    group = (rows[:, 0] * index.classes.num_classes + rows[:, 6]).astype(np.int64)[order]
    by_group = np.argsort(group, kind="stable")
    group = group[by_group]
    place = np.arange(len(group)) - np.searchsorted(group, group)
    late = np.zeros(len(rows), dtype=np.bool_)
    late[order[by_group]] = place >= MAX_DETECTIONS
    return late


def _greedy(
    order: NDArray[np.int64],
    detection: NDArray[np.int64],
    truth: NDArray[np.int64],
    num_truth: int,
) -> NDArray[np.int64]:
    """Ground-truth box of each detection [n], -1 for none: the best score takes the best free box.

    detection, truth: the allowed pairs, the preferred ones last.
    """
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    turn = np.lexsort((-np.arange(len(detection)), rank[detection]))
    owner, free = [-1] * len(order), [True] * num_truth
    for d, t in zip(detection[turn].tolist(), truth[turn].tolist(), strict=True):
        if owner[d] < 0 and free[t]:
            owner[d], free[t] = t, False
    return np.array(owner, dtype=np.int64)


def ap50(index: CocoIndex, matches: Matches) -> float:
    """COCO's AP at IoU 0.5, mean over the classes with ground truth; nan where there is none."""
    counted = matches.order[matches.kind[matches.order] != Kind.IGNORED]
    correct = matches.kind[counted] == Kind.CORRECT
    values = _class_ap(matches.labels[counted], correct, _num_truth(index))
    return _mean(values)


def _num_truth(index: CocoIndex) -> NDArray[np.int64]:
    """Boxes of each class [K], crowds not counted."""
    return np.bincount(index.labels[~index.crowd], minlength=index.classes.num_classes)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _class_ap(
    labels: NDArray[np.int64], correct: NDArray[np.bool_], num_truth: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Interpolated AP of each class [K], nan without ground truth; detections best score first."""
    found = np.full(len(num_truth), np.nan)
    by_class = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[by_class], np.arange(len(num_truth) + 1))
    for label in np.flatnonzero(num_truth > 0):
        hits = np.cumsum(correct[by_class[bounds[label] : bounds[label + 1]]])
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        place = np.searchsorted(hits / num_truth[label], RECALLS)
        found[label] = np.append(precision, 0.0)[place].mean()
    return found


@dataclass(frozen=True)
class ErrorKinds:
    """counts: mistakes of each kind at `threshold`; correct beside them; delta_ap50: AP50 gained
    if that kind alone were repaired, over all scores; ap50: as it is. nan without ground truth.
    """

    threshold: float
    correct: int
    counts: dict[str, int]
    ap50: float
    delta_ap50: dict[str, float]


def error_kinds(
    index: CocoIndex, matches: Matches, *, threshold: float | None = None
) -> ErrorKinds:
    """Counts and TIDE's dAP of ERRORS. threshold: of the counts, by default that of `best_f1`."""
    if threshold is None:
        threshold, _ = best_f1(index, matches)
    kept = matches.scores >= threshold
    _, missed = _ground_truth(index, matches.kind[kept], matches.truth[kept])
    number = np.bincount(matches.kind[kept], minlength=len(Kind))
    counts = {name: int(number[Kind[name.upper()]]) for name in ERRORS if name != "missed"}
    now = ap50(index, matches)
    return ErrorKinds(
        threshold,
        int(number[Kind.CORRECT]),
        counts | {"missed": int(missed.sum())},
        now,
        {name: _repaired_ap50(index, matches, name) - now for name in ERRORS},
    )


def _repaired_ap50(index: CocoIndex, matches: Matches, error: str) -> float:
    """AP50 after TIDE's repair of one kind (arXiv 2008.08115 §2.3).

    A wrong class or place becomes correct, and of several for one box only the best score stays;
    both, duplicate and background detections go; missed boxes are no longer asked for. A class
    left without any box to find has AP 1 if nothing was detected of it, else 0.
    """
    kind, labels, asked = (
        matches.kind[matches.order],
        matches.labels[matches.order],
        _num_truth(index),
    )
    correct, stays = kind == Kind.CORRECT, kind != Kind.IGNORED
    if error == "missed":
        left = asked - np.bincount(index.labels[matches.missed], minlength=len(asked))
        values = _class_ap(labels[stays], correct[stays], left)
        detected = np.bincount(labels[stays], minlength=len(asked)) > 0
        return _mean(np.where((asked > 0) & (left == 0), ~detected, values))
    wrong = kind == Kind[error.upper()]
    stays &= ~wrong
    if error in ("classification", "localisation"):
        claims = np.flatnonzero(correct | wrong)
        truth = matches.truth[matches.order[claims]]
        winners = claims[np.unique(truth, return_index=True)[1]]
        stays[claims], correct = False, np.zeros_like(correct)
        stays[winners] = correct[winners] = True
        labels[winners] = index.labels[matches.truth[matches.order[winners]]]
    return _mean(_class_ap(labels[stays], correct[stays], asked))


def best_f1(index: CocoIndex, matches: Matches) -> tuple[float, float]:
    """Score threshold of the best F1 over all classes together, and that F1.

    The higher threshold where two are as good; FALLBACK_THRESHOLD where nothing is correct.
    """
    counted = matches.order[matches.kind[matches.order] != Kind.IGNORED]
    scores = matches.scores[counted]
    hits = np.cumsum(matches.kind[counted] == Kind.CORRECT)
    if not len(hits) or not hits[-1]:
        return FALLBACK_THRESHOLD, 0.0
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + int((~index.crowd).sum()))
    f1[:-1][scores[:-1] == scores[1:]] = -1.0  # equal scores stay or go together
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best])


def confusion(
    index: CocoIndex, matches: Matches, *, threshold: float | None = None
) -> NDArray[np.int64]:
    """Counts [K + 1, K + 1]: row = true class, last = nothing there; column = predicted class,
    last = not found. Matched whatever the class, one to one by score; `Kind.IGNORED` left out.
    """
    if threshold is None:
        threshold, _ = best_f1(index, matches)
    rows = matches.rows[(matches.scores >= threshold) & (matches.kind != Kind.IGNORED)]
    detection, truth, iou = pairs(index, rows, FOREGROUND_IOU)
    same = index.labels[truth] == rows[detection, 6]
    turn = np.lexsort((truth, same, iou))
    turn = turn[~index.crowd[truth[turn]]]
    order = np.lexsort((rows[:, 0], -rows[:, 5]))
    owner = _greedy(order, detection[turn], truth[turn], len(index.labels))

    nothing = index.classes.num_classes
    table = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    true = np.append(index.labels, nothing)[owner]  # -1 reaches the appended one
    np.add.at(table, (true, rows[:, 6].astype(np.int64)), 1)
    left = ~index.crowd
    left[owner[owner >= 0]] = False
    table[:nothing, nothing] = np.bincount(index.labels[left], minlength=nothing)
    return table


@dataclass(frozen=True)
class Calibration:
    """Bins of equal width in the score: edges [b + 1], mean score and share correct at IoU 0.5 [b]
    (nan in an empty bin), count [b]; error: expected calibration error, nan without detections.
    """

    edges: NDArray[np.float64]
    mean_score: NDArray[np.float64]
    precision: NDArray[np.float64]
    count: NDArray[np.int64]
    error: float


def calibration(matches: Matches, *, num_bins: int = 10) -> Calibration:
    """How often a detection of some score is right. Source: Guo et al. 2017, arXiv 1706.04599."""
    counted = matches.kind != Kind.IGNORED
    scores, correct = matches.scores[counted], matches.kind[counted] == Kind.CORRECT
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    place = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    filled = np.where(count > 0, count, np.nan)
    mean_score = np.bincount(place, weights=scores, minlength=num_bins) / filled
    precision = np.bincount(place, weights=correct, minlength=num_bins) / filled
    gaps = np.nansum(count * np.abs(precision - mean_score))
    error = float(gaps / len(scores)) if len(scores) else float("nan")
    return Calibration(edges, mean_score, precision, count, error)


def image_quality(
    index: CocoIndex, matches: Matches, *, threshold: float | None = None
) -> NDArray[np.float64]:
    """F1 of each image [N] at the threshold; 1 without boxes and without detections."""
    if threshold is None:
        threshold, _ = best_f1(index, matches)
    image = matches.rows[:, 0].astype(np.int64)
    kept = (matches.scores >= threshold) & (matches.kind != Kind.IGNORED)
    detections = np.bincount(image[kept], minlength=len(index))
    hits = np.bincount(image[kept & (matches.kind == Kind.CORRECT)], minlength=len(index))
    total = detections + _boxes_per_image(index)
    return np.where(total > 0, 2.0 * hits / total.clip(min=1), 1.0)


def _boxes_per_image(index: CocoIndex) -> NDArray[np.int64]:
    """[N], crowds not counted."""
    before = np.concatenate([[0], np.cumsum(~index.crowd)])
    return np.diff(before[index.offsets])


def best_and_worst(
    index: CocoIndex, quality: NDArray[np.float64], *, num: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of up to `num` best images, then of up to `num` worst of the rest.

    Of equals the image with more boxes, then the earlier one.
    """
    boxes = _boxes_per_image(index)
    best = np.lexsort((np.arange(len(index)), -boxes, -quality))[:num]
    worst = np.lexsort((np.arange(len(index)), -boxes, quality))
    return best, worst[~np.isin(worst, best)][:num]


def fixed_images(index: CocoIndex, num: int) -> NDArray[np.int64]:
    """Positions of `num` images spread evenly over those with boxes (all, if there are fewer)."""
    having = np.flatnonzero(_boxes_per_image(index))
    num = min(num, len(having))
    return having[(np.arange(num) * 2 + 1) * len(having) // (2 * max(num, 1))]


@torch.no_grad()
def best_anchor_iou(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> NDArray[np.float32]:
    """Boxes [M, 4] and anchors [A, 4], both in network pixels -> best IoU of any anchor [M]."""
    if not len(boxes_xyxy) or not len(anchors_xyxy):
        return np.zeros(len(boxes_xyxy), dtype=np.float32)
    turn = max(1, PAIRS_AT_ONCE // len(anchors_xyxy))
    parts = [pairwise_iou(part, anchors_xyxy).amax(dim=1) for part in boxes_xyxy.split(turn)]
    best: NDArray[np.float32] = torch.cat(parts).float().cpu().numpy()
    return best
