"""How much of the objective each knob decides: variance of ranks explained, above chance.

For one knob the arms are grouped by its value (numbers with many values into equally full bins) and
the share of the ranks' variance that lies between groups is taken: eta squared of Kruskal and
Wallis's test (1952). Shuffled objectives explain (k - 1) / (n - 1) on average for k groups of n
arms; what is left above that is Kelley's epsilon squared (1935): 0 by chance, 1 for a knob that
decides everything. Shuffling the ranks gives its p, as Altmann et al. do for forests (2010).

It sees each knob alone: what two do only together is not found. Values that a guided search prefers
are met with better values of other knobs, so shares of TPE's trials are biased; random ones are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from orchestrator.search.trial import Objective, TrialRecord, varied

LEAST_ARMS = 12
PER_GROUP = 3  # arms of each group on average, at least
MOST_BINS = 5
SHUFFLES = 2000


@dataclass(frozen=True)
class Importance:
    """share: epsilon squared, None with too few arms. chance: 95 % of shuffles stay below it.

    num_arms: where the knob was active and the objective known; needed: how many it takes.
    """

    path: str
    share: float | None
    chance: float | None
    p: float | None
    num_arms: int
    needed: int

    @property
    def shown(self) -> bool:
        """More than chance."""
        return self.p is not None and self.p < 0.05

    def describe(self) -> str:
        n = self.num_arms
        if self.share is None or self.p is None:
            return f"{self.path}: too few trials to say ({n}, at least {self.needed} wanted)"
        verdict = f"p {self.p:.2g}" if self.shown else "no more than chance"
        share = max(self.share, 0.0)
        return f"{self.path}: {share:.0%} of the ranks' variance ({verdict}, n = {n})"


def importance(
    records: Iterable[TrialRecord], objective: Objective, *, seed: int = 0
) -> list[Importance]:
    """Of each knob that varies, most important first; a point is an arm's mean over its seeds."""
    scored = [
        (record, value) for record in records if (value := record.value(objective)) is not None
    ]
    by_arm: dict[str, list[float]] = {}
    samples = {record.arm: record.sample for record, _ in scored}
    for record, value in scored:
        by_arm.setdefault(record.arm, []).append(value)
    found = []
    for path in varied(record for record, _ in scored):
        active = [arm for arm in by_arm if path in samples[arm]]
        values = [samples[arm][path] for arm in active]
        means = np.array([np.mean(by_arm[arm]) for arm in active])
        found.append(_of_one(path, values, means, np.random.default_rng(seed)))
    return sorted(found, key=lambda one: (one.share is None, -(one.share or 0.0)))


def _of_one(
    path: str, values: Sequence[Any], means: NDArray[np.float64], random: np.random.Generator
) -> Importance:
    n = len(means)
    groups = _groups(values)
    k = int(groups.max()) + 1 if n else 0
    needed = max(LEAST_ARMS, PER_GROUP * k)
    if n < needed or k < 2 or np.ptp(means) == 0:
        return Importance(path, None, None, None, n, needed)
    ranks = stats.rankdata(means)
    shuffled = random.permuted(np.tile(ranks, (SHUFFLES, 1)), axis=1)
    explained = _eta_squared(np.vstack([ranks, shuffled]), groups)
    by_chance = (k - 1) / (n - 1)
    shares = (explained - by_chance) / (1 - by_chance)
    # With the sample itself among them p is never 0 (Phipson and Smyth 2010); ties by rounding.
    p = float((shares[1:] >= shares[0] - 1e-12).sum() + 1) / (SHUFFLES + 1)
    return Importance(path, float(shares[0]), float(np.quantile(shares[1:], 0.95)), p, n, needed)


def _eta_squared(ranks: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of the variance of each row of ranks [S, n] that lies between groups [n]."""
    member = np.eye(int(groups.max()) + 1)[groups]  # [n, k]
    count = member.sum(axis=0)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    between = ((centred @ member) ** 2 / count).sum(axis=1)
    shares: NDArray[np.float64] = between / (centred**2).sum(axis=1)
    return shares


def _groups(values: Sequence[Any]) -> NDArray[np.int64]:
    """Group number of each value, 0..k-1 with none empty."""
    names = [json.dumps(value, sort_keys=True) for value in values]
    distinct = sorted(set(names))
    number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if number and len(distinct) > MOST_BINS:
        bins = max(2, min(MOST_BINS, len(values) // PER_GROUP))
        places = (stats.rankdata(np.asarray(values, float), "average") - 0.5) / len(values)
        raw = (places * bins).astype(np.int64)
        return np.unique(raw, return_inverse=True)[1].astype(np.int64)
    return np.array([distinct.index(name) for name in names], dtype=np.int64)
