"""Which sample is trained next: drawn at random, taken from a grid, or proposed by TPE."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from orchestrator.search.config import SweepConfig
from orchestrator.search.constraints import Sieve, check_point, draw
from orchestrator.search.sample import apply, arm_key
from orchestrator.search.space import Sample, Suggester
from orchestrator.search.trial import Objective

Values = Mapping[str, float]  # by an objective's metric
MOST_REPEATS = 200  # of proposals in a row that are trained already
HISTORY, MOST_GOOD = 500, 50  # trials that TPE looks at: the newest, and the best


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
    """Optuna's tree-structured Parzen estimator.

    What breaks a limit is told as failed and proposed anew; an arm that is trained already is
    answered with its known value. num: how many to propose. known: arms of earlier, in order.

    Raises:
        ConfigError: see `Sieve.error`; a known point breaks a limit.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        sieve: Sieve,
        num: int,
        known: Sequence[Known] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.sieve, self.left = sweep.space, sieve, num
        self.objectives: tuple[Objective, ...] = sweep.objectives
        # A sweep that goes on must not draw again what it drew at first.
        self._seed = sweep.search.seed + len(known)
        self._values: dict[str, Values | None] = {}
        self._waiting: dict[str, list[int]] = {}  # numbers in the study that want an arm's value
        self._drawn = self._asked = 0
        self._study = self._new_study()
        # A space that was widened may hold no point for what was trained before.
        for one in (one for one in known if self.space.holds(one.sample)):
            self._waiting[one.arm] = [self._begun(one.sample)]
            if one.ended:
                self.tell(one.arm, one.values)
        trained = [one.sample for one in known]
        for point in sweep.search.points:
            if point not in trained:
                check_point(sieve, point)
                self._study.enqueue_trial(self.space.as_suggested(point))

    def next(self) -> Sample | None:
        if self.left == 0:
            return None
        for _ in range(MOST_REPEATS):
            number, sample = self._propose()
            arm = arm_key(apply(self.sieve.base, sample))
            if arm in self._values:
                self._answer(number, self._values[arm])
            elif arm in self._waiting:
                self._waiting[arm].append(number)
            elif self.sieve.feasible(sample):
                self.sieve.known.add(arm)
                self._waiting[arm] = [number]
                self.left -= 1
                return sample
            else:
                self._answer(number, None)
                if self.sieve.hopeless():
                    raise self.sieve.error()
        # It keeps to what it knows: something new, at random.
        self._drawn += 1
        [sample] = draw(self.space, self.sieve, grid=False, seed=self._seed + self._drawn, num=1)
        self._waiting[arm_key(apply(self.sieve.base, sample))] = [self._begun(sample)]
        self.left -= 1
        return sample

    def tell(self, arm: str, values: Values | None) -> None:
        self._values[arm] = values
        for number in self._waiting.pop(arm, ()):
            self._answer(number, values)

    def _propose(self) -> tuple[int, Sample]:
        if self._asked >= HISTORY:
            self._forget()
        self._asked += 1
        trial = self._study.ask()
        return trial.number, self.space.suggest(cast(Suggester, trial))

    def _begun(self, sample: Sample) -> int:
        """Its number in the study, as if it had been proposed."""
        fixed = optuna.trial.FixedTrial(self.space.as_suggested(sample))
        self.space.suggest(cast(Suggester, fixed))
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=fixed.params, distributions=fixed.distributions
            )
        )
        self._asked += 1
        return len(self._study.get_trials(deepcopy=False)) - 1

    def _answer(self, number: int, values: Values | None) -> None:
        """Known values of all objectives, or a failure."""
        if values is not None and all(o.metric in values for o in self.objectives):
            self._study.tell(number, [values[o.metric] for o in self.objectives])
        else:
            self._study.tell(number, state=TrialState.FAIL)

    def _forget(self) -> None:
        """Keep what the sampler takes for good, the newest of the others, and what has not ended.

        It reads the whole study for each answer: 0.03 ms a trial. Of one objective it takes the
        best 25 at most for good, whatever their number, so only the others become fewer.
        """
        trials = self._study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        best = self._study.best_trials if done else []
        if len(self.objectives) == 1:
            sign = self.objectives[0].sign
            best = sorted(done, key=lambda trial: -sign * trial.values[0])[:MOST_GOOD]
        kept = {trial.number for trial in (*best, *done[-HISTORY:])}
        kept |= {trial.number for trial in trials if not trial.state.is_finished()}
        self._study = self._new_study()
        numbers: dict[int, int] = {}
        for trial in trials:
            if trial.number in kept:
                numbers[trial.number] = len(numbers)
                self._study.add_trial(trial)
        self._waiting = {
            arm: [numbers[number] for number in waiting] for arm, waiting in self._waiting.items()
        }

    def _new_study(self) -> optuna.Study:
        self._seed += self._asked
        self._asked = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=self._seed, multivariate=True, group=True, constant_liar=True
            )
        more, less = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
        ways = [more if o.mode == "max" else less for o in self.objectives]
        return optuna.create_study(directions=ways, sampler=sampler)


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
