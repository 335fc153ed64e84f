"""Parallel coordinates: a line a trial over all its knobs to the objective.

The colour is the objective's, a viridis scale on which yellow is always the better end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from orchestrator.records.figures import BLACK, GREY
from orchestrator.search.domains import Steps, Uniform
from orchestrator.search.plots import blank, nothing
from orchestrator.search.space import Space
from orchestrator.search.trial import Objective, TrialRecord, short_names, show_value, varied
from orchestrator.search.verdict import leaderboard

MAP, WORST, BEST = "viridis", 0.06, 0.94
NAMED_VALUES = 12  # of a knob, each with its label


@dataclass(frozen=True)
class _Scale:
    """Where the values of one knob stand on its axis, 0..1; `absent`: where it does not exist."""

    places: dict[str, float]
    low: float
    high: float
    log: bool
    absent: float | None

    @classmethod
    def of(cls, path: str, values: Sequence[Any], space: Space, *, absent: bool) -> _Scale:
        bottom = 0.12 if absent else 0.0
        gap = 0.0 if absent else None
        domain = next((d.domain for d in space.dimensions if d.path == path), None)
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if isinstance(domain, Uniform):
            return cls({}, domain.low, domain.high, domain.log, gap)
        if isinstance(domain, Steps) and domain.size > NAMED_VALUES:
            return cls({}, domain.low, domain.high, False, gap)
        distinct: list[Any] = []
        for value in sorted(values) if numbers else values:
            if value not in distinct:
                distinct.append(value)
        if domain is not None and domain.size is not None and domain.size <= NAMED_VALUES:
            distinct = [v for v in domain.values() if v in distinct]
        step = (1 - bottom) / max(len(distinct) - 1, 1)
        middle = bottom + (1 - bottom) / 2
        places = {
            show_value(v): middle if len(distinct) == 1 else bottom + i * step
            for i, v in enumerate(distinct)
        }
        return cls(places, 0.0, 1.0, False, gap)

    def at(self, value: Any) -> float:
        if self.places:
            return self.places[show_value(value)]
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        bottom = 0.0 if self.absent is None else 0.12
        return bottom + (1 - bottom) * share

    def ticks(self) -> dict[str, float]:
        """Label -> place."""
        found = dict(self.places)
        if len(found) > NAMED_VALUES:
            found = {text: found[text] for text in list(found)[:: math.ceil(len(found) / 8)]}
        if not found:
            inner = self._round_values()
            found = {show_value(v): self.at(v) for v in (self.low, *inner, self.high)}
        if self.absent is not None:
            found["not used"] = self.absent
        return found

    def _round_values(self) -> list[float]:
        locator = LogLocator(subs=(1, 2, 5)) if self.log else MaxNLocator(5)
        values = [float(v) for v in locator.tick_values(self.low, self.high)]
        low, high = self.at(self.low), self.at(self.high)
        inside = [v for v in values if self.low < v < self.high]
        return [v for v in inside if min(self.at(v) - low, high - self.at(v)) > 0.06]


def parallel_coordinates(
    records: Sequence[TrialRecord], space: Space, objective: Objective
) -> Figure:
    """A line a trial over its knobs to the objective; the best are drawn last and thick.

    Trials without a value are dashed and end below the objective's axis. Equal values of a choice
    are spread a little, so that lines do not hide one another.
    """
    rows = leaderboard(records, objective)
    knobs = [d.path for d in space.dimensions if d.path in varied(records)]
    figure = blank(f"{objective.name} of {len(records)} trials by their knobs",
                     (3.2 + 1.75 * len(knobs), 5.4))  # fmt: skip
    scored = [row for row in rows if row.value is not None]
    if not scored or not knobs:
        return nothing(figure, "no trial has a value" if knobs else "no knob varies")
    axes = figure.add_subplot()
    numbers = [row.value for row in scored if row.value is not None]
    low, high = min(numbers), max(numbers)
    spread = high - low or 1.0
    scales = [_scale(path, records, space) for path in knobs]
    names = short_names(knobs)
    for place, row in reversed(list(enumerate(rows))):
        points = [
            scale.at(row.record.sample[path]) + _shift(scale, row.record.trial_id, path)
            if path in row.record.sample else (scale.absent or 0.0)
            for path, scale in zip(knobs, scales, strict=True)
        ]  # fmt: skip
        end = -0.09 if row.value is None else (row.value - low) / spread
        best = row.rank is not None and row.rank <= 3
        axes.plot(
            range(len(knobs) + 1), [*points, end],
            color=GREY if row.value is None else _colour(row.value, low, high, objective),
            ls=(0, (2, 2)) if row.value is None else "-", lw=3.2 if best else 1.1,
            alpha=1.0 if best else 0.75, zorder=3 + (len(rows) - place) / len(rows),
            solid_capstyle="round",
        )  # fmt: skip
    for place, scale in enumerate(scales):
        _axis(axes, place, scale.ticks())
    inner = [v for v in MaxNLocator(6).tick_values(low, high) if low <= v <= high and high > low]
    _axis(axes, len(knobs), {f"{v:.4g}": (v - low) / spread for v in inner or [low]})
    failed = len(rows) - len(scored)
    if failed:
        axes.text(len(knobs) + 0.05, -0.09, f"{failed} without value", va="center", fontsize=9)
    axes.set_xticks(range(len(knobs) + 1), [*(names[path] for path in knobs), objective.name])
    axes.tick_params(axis="x", length=0, pad=2, labelsize=11)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set(xlim=(-0.45, len(knobs) + (0.75 if failed else 0.15)), ylim=(-0.13, 1.05))
    axes.spines[:].set_visible(False)
    _objective_bar(figure, axes, low, high, objective)
    return figure


def _scale(path: str, records: Sequence[TrialRecord], space: Space) -> _Scale:
    values = [record.sample[path] for record in records if path in record.sample]
    return _Scale.of(path, values, space, absent=len(values) < len(records))


def _shift(scale: _Scale, trial_id: str, path: str) -> float:
    """Up to a tenth of the distance between two values of a choice, the same for the same trial."""
    if len(scale.places) < 2:
        return 0.0
    gap = 1 / (len(scale.places) - 1)
    seeded = np.random.default_rng(list(f"{trial_id}/{path}".encode()))
    return float(min(0.18 * gap, 0.04) * (seeded.random() - 0.5))


def _axis(axes: Axes, place: int, ticks: Mapping[str, float]) -> None:
    axes.axvline(place, ymin=0.11, ymax=0.958, color=BLACK, lw=1.2, zorder=5)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}
    for text, height in ticks.items():
        axes.plot([place - 0.03, place], [height, height], color=BLACK, lw=1.2, zorder=5)
        axes.text(
            place - 0.06, height, text, ha="right", va="center", fontsize=9, bbox=box, zorder=6
        )


def _colour(value: float, low: float, high: float, objective: Objective) -> tuple[float, ...]:
    share = (value - low) / (high - low) if high > low else 1.0
    share = share if objective.mode == "max" else 1 - share
    place = np.array([WORST + (BEST - WORST) * share])
    return tuple(ScalarMappable(Normalize(0, 1), MAP).to_rgba(place)[0].tolist())


def _objective_bar(
    figure: Figure, axes: Axes, low: float, high: float, objective: Objective
) -> None:
    span = (high - low or 1.0) / (BEST - WORST)
    name = MAP if objective.mode == "max" else f"{MAP}_r"
    start = low - WORST * span
    bar = figure.colorbar(
        ScalarMappable(Normalize(start, start + span), name), ax=axes, shrink=0.85, pad=0.01
    )
    bar.ax.set_ylim(low, high if high > low else low + 1)
    better = "higher" if objective.mode == "max" else "lower"
    bar.set_label(f"{objective.metric} ({better} is better)")
