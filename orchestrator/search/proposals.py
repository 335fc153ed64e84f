"""Which sample is trained next: drawn at random, taken from a grid, or proposed by TPE."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import optuna
from ray.tune.search.optuna import OptunaSearch

from orchestrator.search.config import SweepConfig
from orchestrator.search.constraints import Sieve, draw
from orchestrator.search.sample import apply, arm_key
from orchestrator.search.space import Sample, Suggester
from orchestrator.search.trial import Objective

Values = Mapping[str, float]  # by an objective's metric
MOST_REPEATS = 200  # of proposals in a row that are trained already


@dataclass(frozen=True)
class Known:
    """An arm that was begun earlier. values: None where it failed, or has not ended."""

    arm: str
    sample: Sample
    ended: bool
    values: Values | None


class Proposals(Protocol):
    """Where samples come from."""

    def next(self) -> Sample | None:
        """None: no more."""
        ...

    def tell(self, arm: str, values: Values | None) -> None:
        """What an arm reached, mean of its seeds; None: it failed."""
        ...


class Listed:
    """Known beforehand."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._left = iter(samples)

    def next(self) -> Sample | None:
        return next(self._left, None)

    def tell(self, arm: str, values: Values | None) -> None:
        return None


class Tpe:
    """Optuna's tree-structured Parzen estimator, by Ray Tune's OptunaSearch.

    What breaks a limit is told as failed and proposed anew; an arm that is trained already is
    answered with its known value. num: how many to propose. known: arms of earlier, in order.

    Raises:
        ConfigError: see `Sieve.error`.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        sieve: Sieve,
        num: int,
        known: Sequence[Known] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
        self.space, self.sieve, self.left = sweep.space, sieve, num
        self.objectives: tuple[Objective, ...] = sweep.objectives
        # A space that was widened may hold no point for what was trained before.
        known = [one for one in known if sweep.space.holds(one.sample)]
        points = [one.sample for one in known] + [
            point for point in sweep.search.points if point not in [one.sample for one in known]
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=sweep.search.seed, multivariate=True, group=True, constant_liar=True
            )
        metrics = [objective.metric for objective in self.objectives]
        modes: list[str] = [objective.mode for objective in self.objectives]
        several = len(metrics) > 1
        self._search = OptunaSearch(
            space=self._suggest,
            metric=metrics if several else metrics[0],
            mode=modes if several else modes[0],
            sampler=sampler,
            points_to_evaluate=[sweep.space.as_suggested(point) for point in points] or None,
        )
        self._values: dict[str, Values | None] = {}
        self._waiting: dict[str, list[str]] = {}
        self._asked = 0
        for one in known:
            name, found = self._propose()
            assert found == one.sample, "points come back in order"
            self._waiting[one.arm] = [name]
            if one.ended:
                self.tell(one.arm, one.values)

    def next(self) -> Sample | None:
        if self.left == 0:
            return None
        for _ in range(MOST_REPEATS):
            name, sample = self._propose()
            arm = arm_key(apply(self.sieve.base, sample))
            if arm in self._values:
                self._answer(name, self._values[arm])
            elif arm in self._waiting:
                self._waiting[arm].append(name)
            elif self.sieve.feasible(sample):
                self.sieve.known.add(arm)
                self._waiting[arm] = [name]
                self.left -= 1
                return sample
            else:
                self._answer(name, None)
                if self.sieve.hopeless():
                    raise self.sieve.error()
        # It keeps to what it knows: something new, at random.
        self._asked += 1
        [sample] = draw(self.space, self.sieve, grid=False, seed=self._asked, num=1)
        self._waiting[arm_key(apply(self.sieve.base, sample))] = []
        self.left -= 1
        return sample

    def tell(self, arm: str, values: Values | None) -> None:
        self._values[arm] = values
        for name in self._waiting.pop(arm, ()):
            self._answer(name, values)

    def _propose(self) -> tuple[str, Sample]:
        self._asked += 1
        name = str(self._asked)
        found: Sample = dict(self._search.suggest(name) or {})
        return name, found

    def _answer(self, name: str, values: Values | None) -> None:
        """Known values of all objectives, or a failure."""
        known = values is not None and all(o.metric in values for o in self.objectives)
        self._search.on_trial_complete(name, dict(values or {}) if known else None, error=not known)

    def _suggest(self, trial: Suggester) -> Sample:
        return self.space.suggest(trial)


def proposals(sweep: SweepConfig, sieve: Sieve, known: Sequence[Known] = ()) -> Proposals:
    """For what a sweep lacks of its `trials.num`. known: every arm begun so far, in order.

    Raises:
        ConfigError: see `orchestrator.search.constraints.draw`.
    """
    num = None if sweep.trials.num is None else max(0, sweep.trials.num - len(known))
    if num == 0:
        return Listed(())
    if sweep.search.algorithm == "tpe":
        assert num is not None
        return Tpe(sweep, sieve, num, known)
    trained = [one.sample for one in known]
    points = [point for point in sweep.search.points if point not in trained]
    grid, seed = sweep.search.algorithm == "grid", sweep.search.seed
    return Listed(draw(sweep.space, sieve, grid=grid, seed=seed, num=num, points=points))
