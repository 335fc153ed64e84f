"""Which trials go on: Ray Tune's schedulers, told what a sweep counts.

A result carries the epoch and the step, never the number of results: a trial that was restarted
has reported fewer than it has trained.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from orchestrator.search.config import SweepConfig
from orchestrator.search.domains import Choice, Domain
from orchestrator.search.ledger import Entry
from orchestrator.search.space import Space

Result = Mapping[str, Any]
MEDIAN_OF = 3  # trials that must have come as far


class _AtEvaluations:
    """What all that stop trials early share: the end of a trial is no reason to stop it.

    Only what they need is handed on: some keep every result of every trial.
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

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Result) -> str:
        if "state" in result or result.get(self.kept[0], 0) >= self.longest:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, self.slim(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Result) -> None:
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._trial_info.pop(trial.trial_id, None)


class Median(_AtEvaluations, MedianStoppingRule):
    """Stops what is below the median of the others' running means."""

    def __init__(self, *, time_attr: str, metric: str, mode: str, grace: float) -> None:
        self.kept = (time_attr, metric)
        super().__init__(
            time_attr=time_attr, metric=metric, mode=mode, grace_period=grace,
            min_samples_required=MEDIAN_OF,
        )  # fmt: skip

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Result) -> str:
        if "state" in result:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, self.slim(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Result) -> None:
        self._results[trial].append(self.slim(result))


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
    return PopulationBasedTraining(
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


@dataclass(frozen=True)
class _Past:
    """A trial of an earlier process, as far as schedulers look at one."""

    trial_id: str


def recall(scheduler: TrialScheduler, entries: Iterable[Entry], sweep: SweepConfig) -> None:
    """Show a scheduler what earlier processes of the sweep reported; its answers change nothing."""
    unit, metric = sweep.scheduler.unit, sweep.objective.metric
    if not isinstance(scheduler, Asha | Median):
        return
    for entry in entries:
        past = cast(Trial, _Past(f"past-{entry.trial_id}"))
        controller = cast(Any, None)
        scheduler.on_trial_add(controller, past)
        result: dict[str, Any] = {}
        for epoch, step, value in entry.curve:
            result = {unit: epoch if unit == "epoch" else step, metric: value}
            if past not in getattr(scheduler, "_stopped_trials", ()):
                scheduler.on_trial_result(controller, past, result)
        if result:
            scheduler.on_trial_complete(controller, past, result)
        else:
            scheduler.on_trial_remove(controller, past)
