"""How well a network's anchors can cover boxes, without listing the anchors.

Shape legend: M boxes, S shapes of anchors at a level.

Of one shape the anchor that overlaps a box most is the one whose centre is nearest to the box's: the
overlap is a product of two factors that only shrink with the distance along x and along y. The
centres are a grid, so the nearest is a rounding. D7x's 442,260 anchors become 54 shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.network.scaling import NetworkSpec

COVERED_IOU = 0.5  # what matching asks of a positive anchor
BOXES_AT_ONCE = 2**16
SIZE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
ANCHOR_SCALES = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
MOST_IMAGE_SIZE_PX = 2048
LONG_RATIOS = ((1.7, 0.57), (0.57, 1.7))  # 3:1 and 1:3 beside the published three


@dataclass(frozen=True)
class Trial:
    """Another choice of anchors. share: of the boxes that some anchor covers at IoU 0.5.

    setting: how it is asked for, "" where no setting does. cost: pixels or anchors, of now.
    """

    what: str
    setting: str
    share: float
    cost: float = 1.0


def best_cover(boxes_xyxy: NDArray[np.floating], spec: NetworkSpec) -> NDArray[np.float32]:
    """Boxes [M, 4] in network pixels -> IoU [M] with the best anchor of the network."""
    best = np.zeros(len(boxes_xyxy), dtype=np.float32)
    for start in range(0, len(boxes_xyxy), BOXES_AT_ONCE):
        rows = slice(start, start + BOXES_AT_ONCE)
        best[rows] = _best(boxes_xyxy[rows].astype(np.float64), spec)
    return best


def _best(boxes: NDArray[np.float64], spec: NetworkSpec) -> NDArray[np.float64]:
    sides, best = spec.level_sizes_px(), np.zeros(len(boxes))
    size = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    area = size.prod(axis=1)
    for level in range(spec.min_level, spec.max_level + 1):
        stride = spec.image_size_px / sides[level]
        cell = np.clip(np.round(centre / stride - 0.5), 0, sides[level] - 1)
        away = np.abs(centre - (cell + 0.5) * stride)
        for octave in range(spec.anchor_octaves):
            base = spec.anchor_scale * stride * 2 ** (octave / spec.anchor_octaves)
            for ratio in spec.aspect_ratios:
                anchor = base * np.array(ratio)
                shared = np.minimum(np.minimum(size, anchor), (size + anchor) / 2 - away)
                overlap = np.maximum(shared, 0.0).prod(axis=1)
                union = area + anchor.prod() - overlap
                np.maximum(best, overlap / union, out=best)
    return best


def covered_share(boxes_xyxy: NDArray[np.floating], spec: NetworkSpec) -> float:
    """Share of boxes [M, 4] that some anchor covers by half or more; 0 where there are none."""
    return float((best_cover(boxes_xyxy, spec) >= COVERED_IOU).mean()) if len(boxes_xyxy) else 0.0


def try_anchors(boxes_unit: NDArray[np.floating], spec: NetworkSpec) -> list[Trial]:
    """A handful of other choices. boxes_unit [M, 4]: xyxy, in sides of the network's input."""

    def share(tried: NetworkSpec) -> float:
        return covered_share(boxes_unit * tried.image_size_px, tried)

    trials = [Trial("as it is", "", share(spec))]
    for size in _sizes(spec):
        cost = (size / spec.image_size_px) ** 2
        trials.append(
            Trial(
                f"{size} px", f"--image-size {size}", share(replace(spec, image_size_px=size)), cost
            )
        )
    for scale in ANCHOR_SCALES:
        if not math.isclose(scale, spec.anchor_scale):
            tried = replace(spec, anchor_scale=scale)
            trials.append(Trial(f"anchor scale {scale:g}", f"--set model.anchor_scale={scale:g}", share(tried)))  # fmt: skip
    if spec.anchor_octaves < 4:
        more = spec.anchor_octaves + 1
        tried = replace(spec, anchor_octaves=more)
        trials.append(Trial(f"{more} anchor sizes a level", f"--set model.anchor_octaves={more}",
                            share(tried), more / spec.anchor_octaves))  # fmt: skip
    if spec.min_level == 3:
        tried = replace(spec, min_level=2)
        cost = _cells(tried) / _cells(spec)
        trials.append(Trial("levels from P2", "--set model.min_level=2", share(tried), cost))
    long = (*spec.aspect_ratios, *LONG_RATIOS)
    tried = replace(spec, aspect_ratios=long)
    trials.append(
        Trial("ratios 1:3 and 3:1 too", "", share(tried), len(long) / len(spec.aspect_ratios))
    )
    return trials


def _sizes(spec: NetworkSpec) -> Sequence[int]:
    """Other sizes that the network can have, around its own."""
    multiple = 2**spec.max_level
    sizes = {max(1, round(spec.image_size_px * f / multiple)) * multiple for f in SIZE_FACTORS}
    return sorted(
        size for size in sizes if size != spec.image_size_px and size <= MOST_IMAGE_SIZE_PX
    )


def _cells(spec: NetworkSpec) -> int:
    sides = spec.level_sizes_px()
    return sum(sides[level] ** 2 for level in range(spec.min_level, spec.max_level + 1))
