"""What a sweep found: leaderboard, Pareto front, the winner, and what early stopping saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from orchestrator.config.schema import TrainJob
from orchestrator.search.comparison import Arm, arms, compare
from orchestrator.search.importance import importance
from orchestrator.search.sample import apply, changed, public
from orchestrator.search.trial import Objective, TrialRecord, Unit, describe_sample, varied

FEW_VALUES = 8


@dataclass(frozen=True)
class Row:
    """rank: 1 is best, None for a trial without a value, which wins nothing."""

    rank: int | None
    value: float | None
    record: TrialRecord


def leaderboard(records: Iterable[TrialRecord], objective: Objective) -> list[Row]:
    """Best first; of equal values the one that trained longer, then the cheaper network."""
    valued = [(record, record.value(objective)) for record in records]
    scored = [(record, value) for record, value in valued if value is not None]
    scored.sort(
        key=lambda pair: (
            -objective.sign * pair[1], -pair[0].step, pair[0].gmacs, pair[0].trial_id
        )
    )  # fmt: skip
    ranked = [Row(place + 1, value, record) for place, (record, value) in enumerate(scored)]
    return ranked + [Row(None, None, record) for record, value in valued if value is None]


def pareto_front(
    records: Iterable[TrialRecord], objectives: Sequence[Objective]
) -> list[TrialRecord]:
    """Trials that no other beats in one objective without losing in another; equal ones all stay.

    Best in the first objective first.
    """
    candidates, rows = [], []
    for record in records:
        values = [record.value(objective) for objective in objectives]
        known = [o.sign * v for o, v in zip(objectives, values, strict=True) if v is not None]
        if len(known) == len(objectives):
            candidates.append(record)
            rows.append(known)
    points = np.array(rows).reshape(len(rows), len(objectives))
    kept = [
        place for place, point in enumerate(points)
        if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
    ]  # fmt: skip
    kept.sort(key=lambda place: (tuple(-points[place]), candidates[place].trial_id))
    return [candidates[place] for place in kept]


@dataclass(frozen=True)
class Savings:
    """Worker-hours: spent on all trials; saved on the `stopped` ones, which would have gone on.

    unknown: stopped trials of which nothing can be said, as they had not begun.
    """

    spent: float
    saved: float
    stopped: int
    unknown: int

    def describe(self) -> str:
        if not self.stopped:
            return f"{self.spent:.2f} worker-hours spent; no trial was stopped early"
        share = self.saved / (self.spent + self.saved) if self.saved else 0.0
        text = (
            f"{self.spent:.2f} worker-hours spent; stopping {self.stopped} trials early "
            f"saved {self.saved:.2f} ({share:.0%} of what all to the end would take)"
        )
        return text + (f"; {self.unknown} more stopped before they began" if self.unknown else "")


def savings(records: Iterable[TrialRecord], unit: Unit, longest: float) -> Savings:
    """longest: what a trial that is not stopped trains, in `unit`; a trial's speed is its own."""
    spent = saved = 0.0
    stopped = unknown = 0
    for record in records:
        spent += record.worker_hours
        if record.state != "stopped":
            continue
        reached = record.reached(unit)
        if reached <= 0:
            unknown += 1
            continue
        stopped += 1
        saved += record.worker_hours * max(0.0, longest / reached - 1)
    return Savings(spent, saved, stopped, unknown)


@dataclass(frozen=True)
class Winner:
    """record: the trial whose configuration is kept. notes: what a reader should know beside it."""

    record: TrialRecord
    value: float
    notes: tuple[str, ...] = ()


def winner(records: Iterable[TrialRecord], objective: Objective) -> Winner | None:
    """The leaderboard's first; with several seeds an arm the best trial of the best mean.

    Of arms with seeds, one whose seeds failed wins only where all have failures: what diverges now
    and then is no recommendation. None where no trial has a value.
    """
    records = list(records)
    rows = leaderboard(records, objective)
    if not rows or rows[0].value is None:
        return None
    top = Winner(rows[0].record, rows[0].value)
    if len({record.arm for record in records}) == len(records):
        return top
    ranked = [arm for arm in arms(records, objective) if arm.values]
    if not ranked:
        return Winner(top.record, top.value, ("no trial ran to its end: the best so far",))
    best = next((arm for arm in ranked if not arm.failed), ranked[0])
    notes = tuple(
        f"{arm.describe(objective)} has a better mean, but not every seed survived"
        for arm in ranked[: ranked.index(best)]
    )
    for row in rows:
        if row.record.arm == best.key and row.record.state == "finished" and row.value is not None:
            return Winner(row.record, row.value, notes)
    raise AssertionError("an arm with values has a finished trial")


def train_mapping(base: TrainJob, record: TrialRecord) -> dict[str, Any]:
    """The trial's job as a train YAML's mapping: only what differs from the defaults."""
    return changed(apply(base, {**record.sample, "train.seed": record.seed}))


def winner_yaml(base: TrainJob, won: Winner, objective: Objective, sweep: str) -> str:
    """A file that `jobs/train.py --config` trains unchanged, and where it comes from."""
    record = won.record
    reached = f"step {record.step} (epoch {record.epoch:.4g})"
    if record.state != "finished":
        reached += f", where it was {record.state}: longer training may rank it otherwise"
    lines = [
        f"# The winner of the sweep {sweep}: trial {record.trial_id}, seed {record.seed}, with",
        f"# {objective.metric} {won.value:.4f} at {reached}.",
        f"# {record.num_params:,} parameters, {record.gmacs:.4g} GMACs an image.",
        *(f"# {note}" for note in won.notes),
    ]
    base = replace(public(base), run=replace(base.run, name=f"{sweep}-winner"))
    body = yaml.safe_dump(train_mapping(base, record), sort_keys=False, allow_unicode=True)
    return "\n".join(" ".join(line.splitlines()) for line in lines) + "\n" + body


def findings(
    records: Iterable[TrialRecord], objectives: Sequence[Objective], *, unit: Unit, longest: float
) -> list[str]:
    """The answer in sentences: who won, who differs from whom, what matters, what it took."""
    records = list(records)
    objective, knobs = objectives[0], varied(records)
    won = winner(records, objective)
    lines = ["no trial has a value: nothing won"]
    if won is not None:
        what = describe_sample(won.record.sample, knobs)
        lines = [f"best: {what} (trial {won.record.trial_id}), {objective.name} {won.value:.4f}"]
        lines += won.notes
    found = arms(records, objective)
    if any(len(arm.values) > 1 for arm in found):
        lines += [arm.describe(objective) for arm in found]
        lines += [one.describe(objective) for one in compare(found, objective)] or _alone(found)
    lines += speeds(records, knobs)
    if len(objectives) > 1:
        front = pareto_front(records, objectives)
        lines.append(f"Pareto front: {', '.join(record.trial_id for record in front) or 'empty'}")
    lines += [one.describe() for one in importance(records, objective)]
    failed = [record for record in records if record.state == "failed"]
    lines += [
        f"trial {record.trial_id} failed: {record.reason or 'no reason'}" for record in failed
    ]
    return [*lines, savings(records, unit, longest).describe()]


def speeds(records: Sequence[TrialRecord], knobs: Sequence[str]) -> list[str]:
    """How fast each value of the only knob trained, if there is one and it has few."""
    if len(knobs) != 1:
        return []
    found: dict[str, list[float]] = {}
    for record in records:
        if record.img_per_s and knobs[0] in record.sample:
            found.setdefault(describe_sample(record.sample, knobs), []).append(record.img_per_s)
    if not 1 < len(found) <= FEW_VALUES:
        return []
    medians = sorted(((float(np.median(v)), name) for name, v in found.items()), reverse=True)
    best = medians[0][0]
    parts = [f"{name} {value:.1f} ({value / best:.2f})" for value, name in medians]
    return [
        f"images a second while training, medians, and share of the fastest: {', '.join(parts)}"
    ]


def _alone(found: Sequence[Arm]) -> list[str]:
    several = sum(len(arm.values) > 1 for arm in found)
    return [f"{several} arm has two seeds and more: nothing to compare it with"]
