"""Whether two models differ on the same images: a paired bootstrap over the images.

Images are drawn with replacement, the same ones for both models, and average precision is computed
for each draw. What both find hard cancels in the difference, so its interval is narrower than what
the intervals of the two models would suggest.
Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.index import CocoIndex
from model.training.tally import METRICS, Tally

LEVEL = 0.95
FEWEST_IMAGES = 10  # the draws of fewer say little of what other images would have shown
DRAWS_AT_ONCE = 64
WORKERS = 8  # threads; numpy leaves the lock while it counts


@dataclass(frozen=True)
class Difference:
    """Of one metric, a minus b, all in 0..1. low, high: ends of the 95 % interval. images: how many
    have ground truth for it; from fewer than FEWEST_IMAGES nothing is concluded.
    """

    a: float
    b: float
    low: float
    high: float
    images: int

    @property
    def value(self) -> float:
        return self.a - self.b

    @property
    def better(self) -> str | None:
        """Which one, "a" or "b"; None where the interval holds 0, or images are too few."""
        if self.images < FEWEST_IMAGES:
            return None
        if self.low > 0:
            return "a"
        return "b" if self.high < 0 else None


@dataclass(frozen=True)
class Comparison:
    """metrics by "AP", "AP50", …; classes by name. What has no ground truth is left out."""

    metrics: dict[str, Difference]
    classes: dict[str, Difference]
    resamples: int
    seed: int


def compare(
    index: CocoIndex,
    rows_a: NDArray[np.float64],
    rows_b: NDArray[np.float64],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Detections [n, evaluation.COLUMNS] of two models on all images of the index."""
    tallies = [Tally(index, rows) for rows in (rows_a, rows_b)]

    def of_both(weights: NDArray[np.int32]) -> NDArray[np.float64]:
        """[b, N] -> metrics and classes of each model [2, b, 6 + K]."""
        found = [tally.averages(weights) for tally in tallies]
        return np.stack([np.concatenate([one.metrics, one.classes], axis=1) for one in found])

    full = of_both(np.ones((1, len(index)), dtype=np.int32))[:, 0]
    with ThreadPoolExecutor(min(WORKERS, len(os.sched_getaffinity(0)))) as pool:
        starts = range(0, resamples, DRAWS_AT_ONCE)
        draws = (range(start, min(start + DRAWS_AT_ONCE, resamples)) for start in starts)
        parts = list(pool.map(lambda numbers: of_both(draw(len(index), numbers, seed)), draws))
    drawn = np.concatenate([full[:, None][:, :0], *parts], axis=1)
    found = _differences(full, drawn[0] - drawn[1], tallies[0].num_images_with_truth())
    names = (*METRICS, *index.classes.names)
    known = [(name, one) for name, one in zip(names, found, strict=True)]
    kept = [{name: one for name, one in part if one is not None} for part in (known[:6], known[6:])]
    return Comparison(kept[0], kept[1], resamples, seed)


def draw(num_images: int, numbers: Sequence[int], seed: int) -> NDArray[np.int32]:
    """How often each image is in the resamples of these numbers [b, N]: f(seed, number)."""
    counts = np.empty((len(numbers), num_images), dtype=np.int32)
    for row, number in enumerate(numbers):
        chosen = np.random.default_rng((seed, number)).integers(num_images, size=num_images)
        counts[row] = np.bincount(chosen, minlength=num_images)
    return counts


def _differences(
    full: NDArray[np.float64], drawn: NDArray[np.float64], images: NDArray[np.int64]
) -> list[Difference | None]:
    """full [2, c], drawn differences [b, c], images with ground truth [c] -> one for each column.

    None where nothing is known. A draw without ground truth of a kind (or class) says nothing about it.
    """
    found: list[Difference | None] = []
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    for column in range(full.shape[1]):
        a, b = (float(value) for value in full[:, column])
        known = drawn[~np.isnan(drawn[:, column]), column]
        if np.isnan(a) or not len(known):
            found.append(None)
            continue
        low, high = (float(value) for value in np.quantile(known, tails))
        found.append(Difference(a, b, low, high, int(images[column])))
    return found
