"""Which trials go on: Ray Tune's schedulers, told what a sweep counts.

A result carries the epoch and the step, never the number of results: a trial that was restarted
has reported fewer than it has trained.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from orchestrator.search.config import SweepConfig
from orchestrator.search.domains import Choice, Domain
from orchestrator.search.ledger import Entry
from orchestrator.search.space import Space

Result = Mapping[str, Any]
MEDIAN_OF = 3  # trials that must have come as far


@dataclass(frozen=True)
class Numbered:
    """A trial by its number in the ledger, and so the same one after a sweep was interrupted."""

    trial_id: str

    @classmethod
    def of(cls, trial: Any) -> Numbered:
        return trial if isinstance(trial, cls) else cls(trial.config["trial"])


class _AtEvaluations:
    """What all that stop trials early share: the end of a trial is no reason to stop it.

    kept: what of a result is looked at, its time and its value.
    """

    kept: tuple[str, str]

    def slim(self, result: Result) -> dict[str, Any]:
        return {key: result[key] for key in self.kept if key in result}


class Asha(_AtEvaluations, AsyncHyperBandScheduler):
    """Asynchronous successive halving."""

    def __init__(self, *, time_attr: str, metric: str, mode: str, grace: float, longest: float,
                 reduction: float) -> None:  # fmt: skip
        self.kept = (time_attr, metric)
        super().__init__(
            time_attr=time_attr, metric=metric, mode=mode,
            grace_period=cast(int, grace), max_t=cast(int, longest),  # any number serves
            reduction_factor=reduction, brackets=1, stop_last_trials=False,
        )  # fmt: skip
        self.longest = longest

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, cast(Trial, Numbered.of(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Result) -> str:
        if "state" in result or result.get(self.kept[0], 0) >= self.longest:
            return str(TrialScheduler.CONTINUE)
        known = cast(Trial, Numbered.of(trial))
        return str(super().on_trial_result(tune_controller, known, self.slim(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Result) -> None:
        self._trial_info.pop(Numbered.of(trial).trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._trial_info.pop(Numbered.of(trial).trial_id, None)

    def remember(self, trial: Numbered, results: Iterable[Result]) -> None:
        self.on_trial_add(None, trial)
        for result in results:
            self.on_trial_result(None, trial, result)
        self.on_trial_remove(None, trial)


class Median(_AtEvaluations, FIFOScheduler):
    """Stops a trial whose best is worse than the median of the others' running means.

    The others are those that have come as far. Ray's MedianStoppingRule says the same, but reads
    every result of every trial for each answer, pauses trials that have workers of their own, and
    breaks on one that ends before its first evaluation.
    """

    def __init__(self, *, time_attr: str, metric: str, mode: str, grace: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept, self.grace = (time_attr, metric), grace
        self.sign = 1 if mode == "max" else -1
        self._curves: dict[str, _Curve] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Result) -> str:
        time = result.get(self.kept[0], 0)
        if "state" in result or not self._add(Numbered.of(trial), result) or time < self.grace:
            return str(TrialScheduler.CONTINUE)
        own = self._curves[Numbered.of(trial).trial_id]
        means = [
            other.mean_until(time) for other in self._curves.values()
            if other is not own and other.times and other.times[0] <= time <= other.times[-1]
        ]  # fmt: skip
        if len(means) >= MEDIAN_OF and own.best < np.median(means):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Result) -> None:
        self._add(Numbered.of(trial), result)  # the last evaluation of a finished one comes here

    def remember(self, trial: Numbered, results: Iterable[Result]) -> None:
        for result in results:
            self._add(trial, result)

    def _add(self, trial: Numbered, result: Result) -> bool:
        """Whether it has a number."""
        time, value = (result.get(key) for key in self.kept)
        if time is None or value is None or not math.isfinite(value):
            return False
        curve = self._curves.setdefault(trial.trial_id, _Curve())
        curve.add(time, self.sign * value, counts=time >= self.grace)
        return True


@dataclass
class _Curve:
    """Sums up to each evaluation that counts; more is better."""

    times: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    best: float = -math.inf

    def add(self, time: float, value: float, *, counts: bool) -> None:
        self.best = max(self.best, value)
        while self.times and self.times[-1] >= time:  # trained again after a restart
            self.times.pop()
            self.sums.pop()
        if counts:
            self.times.append(time)
            self.sums.append(value + (self.sums[-1] if self.sums else 0.0))

    def mean_until(self, time: float) -> float:
        number = bisect_right(self.times, time)
        return self.sums[number - 1] / number


def make_scheduler(sweep: SweepConfig) -> TrialScheduler:
    config, objective = sweep.scheduler, sweep.objective
    told = {"time_attr": config.unit, "metric": objective.metric, "mode": objective.mode}
    if config.kind == "none":
        return FIFOScheduler()
    longest = sweep.longest()
    assert longest is not None, "checked when the sweep was read"
    if config.kind == "asha":
        return Asha(
            **told, grace=config.grace, longest=longest, reduction=config.reduction
        )  # fmt: skip
    if config.kind == "median":
        return Median(**told, grace=config.grace)
    return _population(sweep.space, config.grace, told)


class Population(PopulationBasedTraining):
    """Trials that are fewer at once than the population take turns."""

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # It refuses searchers, for they would learn from settings that change; ours only draws.
        super().on_trial_add(cast(Any, SimpleNamespace(search_alg=None)), trial)

    def _get_new_config(
        self, trial: Trial, trial_to_clone: Trial
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the other, but its own name and seed."""
        config, operations = super()._get_new_config(trial, trial_to_clone)
        own = {key: value for key, value in trial.config.items() if key != "sample"}
        return {**config, **own}, operations


def _population(space: Space, every: float, told: Mapping[str, str]) -> PopulationBasedTraining:
    """Only what differs is perturbed, and never out of its domain."""
    domains = {d.path: d.domain for d in space.dimensions if d.domain.size != 1}

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        sample = config["sample"]
        for path, domain in domains.items():
            if path in sample:
                sample[path] = nearest_value(domain, sample[path])
        return config

    mutations = {path: _mutation(domain) for path, domain in domains.items()}
    return Population(
        time_attr=told["time_attr"], metric=told["metric"], mode=told["mode"],
        perturbation_interval=every, hyperparam_mutations={"sample": mutations},
        custom_explore_fn=explore, require_attrs=False, log_config=False,
    )  # fmt: skip


def _mutation(domain: Domain) -> Any:
    """Neighbours of a list; a factor, or now and then a fresh draw, of a range."""
    if domain.size is not None:
        return list(domain.values())
    return lambda: domain.at(random.random())


def nearest_value(domain: Domain, value: Any) -> Any:
    """Within the domain."""
    if isinstance(domain, Choice) or domain.contains(value):
        return value
    if domain.size is not None:
        return min(domain.values(), key=lambda known: abs(known - value))
    return type(domain.low)(min(max(value, domain.low), domain.high))


def recall(scheduler: TrialScheduler, entries: Iterable[Entry], sweep: SweepConfig) -> None:
    """Show a scheduler what earlier processes of the sweep reported; it decides nothing anew."""
    unit, metric = sweep.scheduler.unit, sweep.objective.metric
    if not isinstance(scheduler, Asha | Median):
        return
    for entry in entries:
        results = [
            {unit: epoch if unit == "epoch" else step, metric: value}
            for epoch, step, value in entry.curve
        ]
        scheduler.remember(Numbered(entry.trial_id), results)
