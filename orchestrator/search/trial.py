"""What is known of a trial when it is over, and what trials are compared by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["finished", "stopped", "failed", "interrupted"]
Unit = Literal["epoch", "step"]


@dataclass(frozen=True)
class Objective:
    """metric: a name in MLflow, val/… or model/…; mode: whether more or less of it is better."""

    metric: str
    mode: Literal["max", "min"] = "max"

    @property
    def name(self) -> str:
        """AP of val/AP."""
        return self.metric.rpartition("/")[2]

    @property
    def sign(self) -> int:
        return 1 if self.mode == "max" else -1


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep.

    arm: key of what was trained, the seed aside; sample: its knobs by path. stopped: ended early by
    the scheduler; interrupted: by anything else, its values count as far as it came.
    best, last: metrics of the evaluation with the best objective, and of the last.
    num_params, gmacs: of the network. img_per_s: while it trained. worker_hours: over all its workers and restarts.
    """

    trial_id: str
    arm: str
    sample: Mapping[str, Any]
    seed: int
    state: State
    reason: str = ""
    best: Mapping[str, float] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    epoch: float = 0.0
    num_params: int = 0
    gmacs: float = 0.0
    seconds: float = 0.0
    worker_hours: float = 0.0
    img_per_s: float = 0.0

    def value(self, objective: Objective) -> float | None:
        """None where the trial failed, never reported it, or it is not a finite number."""
        if self.state == "failed":
            return None
        model = {"model/gmacs": self.gmacs, "model/params_m": self.num_params / 1e6}
        value = self.best.get(objective.metric, model.get(objective.metric))
        return value if value is not None and math.isfinite(value) else None

    def reached(self, unit: Unit) -> float:
        return self.epoch if unit == "epoch" else float(self.step)


def varied(records: Iterable[TrialRecord]) -> list[str]:
    """Paths of the knobs that differ between trials, in the order they are first met."""
    seen: dict[str, list[Any]] = {}
    absent = object()
    records = list(records)
    for path in dict.fromkeys(path for record in records for path in record.sample):
        values = seen.setdefault(path, [])
        for record in records:
            value = record.sample.get(path, absent)
            if value not in values:
                values.append(value)
    return [path for path, values in seen.items() if len(values) > 1]


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, and as many before it as tell it from the others."""
    found = {}
    for path in paths:
        parts = path.split(".")
        for kept in range(1, len(parts) + 1):
            name = ".".join(parts[-kept:])
            if sum(other == name or other.endswith("." + name) for other in paths) == 1:
                break
        found[path] = name
    return found


def show_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{v} {k}" for k, v in value.items() if v is not None)
    return "default" if value is None else str(value)


def describe_sample(sample: Mapping[str, Any], knobs: Sequence[str]) -> str:
    """ "fusion fast, width 1.35"; the bare value where there is one knob."""
    if len(knobs) == 1 and knobs[0] in sample:
        return show_value(sample[knobs[0]])
    names = short_names(knobs)
    parts = [f"{names[path]} {show_value(sample[path])}" for path in knobs if path in sample]
    return ", ".join(parts) or "the base configuration"
