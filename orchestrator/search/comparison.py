"""Whether arms differ: means over seeds, Student's intervals, Welch's test, Holm's correction.

Sources: Student 1908; Welch 1947 (unequal variances, Satterthwaite's degrees of freedom); Holm
1979. An interval is of one mean or one difference; p of a family of comparisons is corrected.
Only trials that ran to their end are compared: a mean over rungs compares budgets, not arms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from orchestrator.search.trial import Objective, TrialRecord, describe_sample, varied

CONFIDENCE = 0.95
ALL_PAIRS = 6  # arms of which every pair is compared; of more the best with each other


@dataclass(frozen=True)
class Arm:
    """One configuration over its seeds.

    values: the objective of each seed that ran to its end. failed, unfinished: seeds that did not.
    """

    key: str
    name: str
    sample: dict[str, Any]
    values: tuple[float, ...]
    failed: int
    unfinished: int

    @property
    def mean(self) -> float:
        """NaN without a value."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval of the mean; None with fewer than two values."""
        return half_width(self.values)

    def describe(self, objective: Objective) -> str:
        text = f"{self.name}: no value"
        if self.values:
            text = f"{self.name}: {objective.name} {self.mean:.4f}"
        if self.half_width is not None:
            text += f" ± {self.half_width:.4f}"
        lost = [
            f"{number} {word}" for number, word in
            ((self.failed, "failed"), (self.unfinished, "ended early")) if number
        ]  # fmt: skip
        return f"{text} (n = {len(self.values)}{''.join(f', {part}' for part in lost)})"


def arms(records: Iterable[TrialRecord], objective: Objective) -> list[Arm]:
    """Best mean first, those without a value last."""
    records = list(records)
    knobs = varied(records)
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        groups.setdefault(record.arm, []).append(record)
    found = []
    for key, group in groups.items():
        ended = [r.value(objective) for r in group if r.state == "finished"]
        values = tuple(value for value in ended if value is not None)
        # A trial that ended without the objective, or with NaN, is a failure whatever it is called.
        failed = sum(r.state == "failed" for r in group) + len(ended) - len(values)
        name = describe_sample(group[0].sample, knobs)
        unfinished = len(group) - len(values) - failed
        found.append(Arm(key, name, dict(group[0].sample), values, failed, unfinished))
    return sorted(
        found, key=lambda arm: (not arm.values, -objective.sign * arm.mean if arm.values else 0.0)
    )


def half_width(values: Sequence[float], confidence: float = CONFIDENCE) -> float | None:
    """Of Student's interval of a mean; None with fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    return _quantile(n - 1, confidence) * float(np.std(values, ddof=1)) / math.sqrt(n)


@dataclass(frozen=True)
class Comparison:
    """Two arms. delta: difference of means, first - second, ± half_width at 95 %.

    p: Welch's, two-sided; p_corrected: Holm's in a family of so many comparisons.
    """

    first: Arm
    second: Arm
    delta: float
    half_width: float
    p: float
    p_corrected: float
    family: int

    @property
    def differ(self) -> bool:
        return self.p_corrected < 1 - CONFIDENCE

    def describe(self, objective: Objective) -> str:
        """One sentence."""
        first, second = self.first, self.second
        digits = max(3, 1 - math.floor(math.log10(self.half_width))) if self.half_width else 3
        numbers = (
            f"Δ{objective.name} {self.delta:.{digits}f} ± {self.half_width:.{digits}f}, "
            f"n = {len(first.values)} and {len(second.values)}"
        )
        if self.family > 1:
            numbers += f"; p {self.p_corrected:.2g}, corrected for {self.family} comparisons"
        level = f"at {CONFIDENCE:.0%}".replace("%", " %")
        if not self.differ:
            return f"{first.name} and {second.name} do not differ {level} ({numbers})"
        better, worse = first, second
        if objective.sign * self.delta < 0:
            better, worse = second, first
        return f"{better.name} is better than {worse.name} {level} ({numbers})"


def compare(found: Sequence[Arm], objective: Objective) -> list[Comparison]:
    """Every pair of few arms, the best with each other of many; arms with two values and more.

    found: as `arms` sorts them.
    """
    able = [arm for arm in found if len(arm.values) >= 2]
    if len(able) <= ALL_PAIRS:
        pairs = list(itertools.combinations(able, 2))
    else:
        pairs = [(able[0], other) for other in able[1:]]
    tests = [welch(first.values, second.values) for first, second in pairs]
    corrected = holm([p for _, _, p in tests])
    return [
        Comparison(first, second, delta, half, p, p_corrected, len(pairs))
        for (first, second), (delta, half, p), p_corrected in zip(
            pairs, tests, corrected, strict=True
        )
    ]


def welch(
    a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Difference of means a - b, half-width of its interval, two-sided p.

    Without any spread there is no chance: p is 1 for equal means and 0 for others.
    """
    delta = float(np.mean(a) - np.mean(b))
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return delta, 0.0, float(delta == 0)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True)
    )
    p = 2 * float(stats.t.sf(abs(delta) / error, freedom))
    return delta, _quantile(freedom, confidence) * error, p


def holm(p: Sequence[float]) -> list[float]:
    """Corrected p of each: the smallest times n, the next times n - 1, …, never falling."""
    corrected, least = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = least
    return corrected


def _quantile(freedom: float, confidence: float) -> float:
    return float(stats.t.ppf(0.5 + confidence / 2, freedom))
