"""A sweep without Ray Tune and without training: its searcher and scheduler under a virtual clock.

`simulate` builds what a sweep is made of as `orchestrator.search.sweep_job` does, and calls it in
the order of Tune's controller (ray/tune/execution/tune_controller.py: _process_trial_result,
stop_trial, _process_trial_failure). Trials follow the courses of a made-up objective.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.utils.util import flatten_dict

from orchestrator.search.config import SweepConfig
from orchestrator.search.constraints import Budget, Sieve
from orchestrator.search.ledger import Entry, Ledger
from orchestrator.search.proposals import proposals
from orchestrator.search.schedulers import make_scheduler, recall
from orchestrator.search.supply import Supply, known_arms
from orchestrator.search.trial import TrialRecord

STEPS_PER_EPOCH = 100
NUM_CLASSES = 8


@dataclass(frozen=True)
class Course:
    """What a trial would go through.

    at: metrics of an evaluation at an epoch. epoch_s: virtual seconds. fails_at: epoch at which
    the training gives up, with `reason`. dies_at: epochs at which its process dies, once each.
    """

    at: Callable[[float], Mapping[str, float]]
    epoch_s: float = 60.0
    fails_at: float = math.inf
    reason: str = "diverged: the loss was not finite"
    dies_at: tuple[float, ...] = ()


Objective = Callable[[Mapping[str, Any], int], Course]  # of a sample and its seed


@dataclass
class World:
    """What outlives a driver: by trial, the epoch of its checkpoint and the epochs trained."""

    checkpoints: dict[str, float] = field(default_factory=dict)
    trained: Counter[str] = field(default_factory=Counter)


@dataclass
class Simulated:
    """killed: in the middle. begun: trials in order. epochs: trained by this driver.

    decision_s, suggest_s, build_s: seconds of a clock on the wall. clock_s: virtual ones.
    """

    supply: Supply
    sieve: Sieve
    killed: bool
    build_s: float
    begun: list[str] = field(default_factory=list)
    epochs: float = 0.0
    clock_s: float = 0.0
    decision_s: array[float] = field(default_factory=lambda: array("d"))
    suggest_s: array[float] = field(default_factory=lambda: array("d"))

    @property
    def entries(self) -> dict[str, Entry]:
        return self.supply.ledger.entries

    @property
    def records(self) -> list[TrialRecord]:
        return self.supply.ledger.records()

    def states(self) -> Counter[str]:
        return Counter(record.state for record in self.records)


def simulate(
    sweep: SweepConfig,
    objective: Objective,
    workers: int,
    folder: Path,
    *,
    world: World | None = None,
    evaluate_every: float = 1.0,
    kill_after: int | None = None,
    on_end: Callable[[int], None] = lambda ended: None,
) -> Simulated:
    """Begin, or go on with, the sweep of `folder` until it ends.

    evaluate_every: epochs. kill_after: lines of the ledger, after which the driver is gone at once.
    on_end: called with the number of trials that have ended.

    Raises:
        ConfigError: as when a sweep is begun.
    """
    began = time.perf_counter()
    ledger = _Mortal(folder, sweep.objective, workers=sweep.trials.workers_per_trial)
    budget = Budget(sweep.constraints, NUM_CLASSES)
    known = known_arms(ledger, sweep.objectives)
    sieve = Sieve(sweep.base, budget, done=[one.arm for one in known])
    supply = Supply(
        proposals(sweep, sieve, known), ledger, budget, sweep.base, sweep.objectives,
        concurrent=workers, seeds=sweep.trials.seeds,
    )  # fmt: skip
    scheduler = make_scheduler(sweep)
    recall(scheduler, ledger.entries.values(), sweep)
    found = Simulated(supply, sieve, False, time.perf_counter() - began)
    controller = _Controller(sweep, objective, workers, scheduler, world or World(), found)
    controller.every, controller.on_end = evaluate_every, on_end
    ledger.lines_left = kill_after
    try:
        controller.run()
    except _KilledError:
        found.killed = True
    ledger.lines_left = None
    ledger.close()
    return found


class _KilledError(Exception):
    pass


class _Mortal(Ledger):
    """Takes the driver with it, in the middle of a line."""

    lines_left: int | None = None

    def _write(self, event: dict[str, Any]) -> None:
        if self.lines_left is not None:
            if self.lines_left == 0:
                self._file.write(json.dumps(event)[:-9])
                raise _KilledError
            self.lines_left -= 1
        super()._write(event)


@dataclass(eq=False)
class _Trial:
    """As much of a Tune trial as searchers and schedulers look at, and where it stands."""

    trial_id: str
    config: dict[str, Any]
    course: Course
    epoch: float = 0.0
    failures: int = 0
    process: str = ""
    began_s: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config["trial"])


class _Controller:
    """Tune's part."""

    every: float
    on_end: Callable[[int], None]

    def __init__(
        self, sweep: SweepConfig, objective: Objective, workers: int,
        scheduler: TrialScheduler, world: World, found: Simulated,
    ) -> None:  # fmt: skip
        self.sweep, self.objective, self.workers = sweep, objective, workers
        self.scheduler, self.world, self.found = scheduler, world, found
        self.supply = found.supply
        longest = sweep.longest()
        assert longest is not None, "counted in the scheduler's unit"
        self.longest = longest / (STEPS_PER_EPOCH if sweep.scheduler.unit == "step" else 1)
        self.live = 0
        self.events: list[tuple[float, int, _Trial, float]] = []  # time, tie, trial, epoch
        self.ties, self.names = itertools.count(), itertools.count()

    def run(self) -> None:
        more = True
        while True:
            while more and self.live < self.workers and self.supply.error is None:
                more = self._begin()
            if not self.events or self.supply.error is not None:
                return
            self.found.clock_s, _, trial, epoch = heapq.heappop(self.events)
            self._reached(trial, epoch)

    def _begin(self) -> bool:
        """Whether to ask again."""
        tune_id = f"{next(self.names):08x}"
        began = time.perf_counter()
        config = self.supply.suggest(tune_id)
        self.found.suggest_s.append(time.perf_counter() - began)
        if config == Searcher.FINISHED:
            return False
        assert isinstance(config, dict), "asked only for a free worker"
        trial = _Trial(tune_id, config, self.objective(config["sample"], config["seed"]))
        self.found.begun.append(trial.name)
        self.scheduler.on_trial_add(None, trial)
        self.live += 1
        self._start(trial)
        return True

    def _start(self, trial: _Trial) -> None:
        """A process that goes on from the newest checkpoint."""
        trial.epoch = self.world.checkpoints.get(trial.name, 0.0)
        trial.process = f"{next(self.ties):08x}"
        trial.began_s, trial.found = self.found.clock_s, {}
        self._train(trial)

    def _train(self, trial: _Trial) -> None:
        """To the next evaluation, or to what comes before it."""
        course = trial.course
        stop = min(trial.epoch + self.every, self.longest, course.fails_at)
        if len(course.dies_at) > trial.failures:
            stop = min(stop, max(trial.epoch, course.dies_at[trial.failures]))
        at = self.found.clock_s + (stop - trial.epoch) * course.epoch_s
        heapq.heappush(self.events, (at, next(self.ties), trial, stop))

    def _reached(self, trial: _Trial, epoch: float) -> None:
        course, trained = trial.course, epoch - trial.epoch
        self.found.epochs += trained
        self.world.trained[trial.name] += trained  # type: ignore[assignment]  # of floats
        trial.epoch = epoch
        if len(course.dies_at) > trial.failures and epoch >= course.dies_at[trial.failures]:
            self._died(trial)
        elif epoch >= course.fails_at:
            self._end(trial, self._told(trial, "failed", course.reason))
        elif trained == 0:  # its checkpoint was the last one
            self._end(trial, self._told(trial, "finished"))
        else:
            self._evaluated(trial)

    def _evaluated(self, trial: _Trial) -> None:
        """_process_trial_result. The last evaluation goes with the end, which is all it asks."""
        self.world.checkpoints[trial.name] = trial.epoch
        trial.found = {
            "step": round(trial.epoch * STEPS_PER_EPOCH), "epoch": trial.epoch,
            "process": trial.process, "seconds": self.found.clock_s - trial.began_s,
            "sample": json.dumps(trial.config["sample"]), "run_id": f"run-{trial.name}",
            "run_key": f"key-{trial.name}", "checkpoints_uri": f"file:///{trial.name}",
            **trial.course.at(trial.epoch), "img_per_s": 100.0,
        }  # fmt: skip
        if trial.epoch >= self.longest:
            self._end(trial, self._told(trial, "finished"))
            return
        result = self._tuned(trial, trial.found)
        began = time.perf_counter()
        decision = self.scheduler.on_trial_result(None, trial, result)
        self.found.decision_s.append(time.perf_counter() - began)
        if decision == TrialScheduler.STOP:
            self._end(trial, {**result, "done": True})
            return
        assert decision == TrialScheduler.CONTINUE, f"nobody waits, got {decision}"
        self.supply.on_trial_result(trial.trial_id, result)
        self._train(trial)

    def _told(self, trial: _Trial, state: str, reason: str = "") -> dict[str, Any]:
        """A result as `orchestrator.search.training` ends with."""
        sample = json.dumps(trial.config["sample"])
        seconds = self.found.clock_s - trial.began_s
        last = {"sample": sample, **trial.found, "seconds": seconds}
        return self._tuned(trial, {**last, "state": state, "reason": reason, "done": True})

    def _tuned(self, trial: _Trial, result: Mapping[str, Any]) -> dict[str, Any]:
        """What Tune adds, flat as it hands it on."""
        more = {"trial_id": trial.trial_id, "done": False, "training_iteration": 1,
                "time_total_s": self.found.clock_s, "config": trial.config}  # fmt: skip
        return dict(flatten_dict({**more, **result}))

    def _end(self, trial: _Trial, result: dict[str, Any]) -> None:
        """stop_trial."""
        self.scheduler.on_trial_complete(None, trial, result)
        self.supply.on_trial_complete(trial.trial_id, result)
        self._left()

    def _died(self, trial: _Trial) -> None:
        """_process_trial_failure, and _try_recover."""
        trial.failures += 1
        self.scheduler.on_trial_error(None, trial)
        if trial.failures > self.sweep.trials.max_failures:
            self.supply.on_trial_complete(trial.trial_id, error=True)
            self._left()
            return
        self.scheduler.on_trial_add(None, trial)
        self._start(trial)

    def _left(self) -> None:
        self.live -= 1
        self.on_end(self.supply.ledger.ended)


KNOBS: dict[str, Any] = {
    "model.fusion": {"choice": ["fast", "softmax", "unbounded", "sum"]},
    "model.scaling.width": {"quniform": [1.1, 1.6, 0.05]},
    "model.scaling.depth": {"randint": [-1, 2]},
    "optim.lr_per_64": {"loguniform": [0.005, 0.5]},
    "optim.weight_decay": {"loguniform": [1e-6, 1e-3]},
}
OPTIMUM_AP = 0.40
FUSIONS_AP = {"fast": 0.0, "softmax": -0.001, "unbounded": -0.008, "sum": -0.006}


def sweep_mapping(
    num: int | None, *, algorithm: str = "random", kind: str = "none", epochs: int = 27,
    grace: float = 1, **sections: Any,
) -> dict[str, Any]:  # fmt: skip
    """As a sweep's YAML; a section that is given replaces the one here."""
    return {
        "train": {"model": {"phi": "0"}, "train": {"duration": {"epochs": epochs}}},
        "objective": {"metric": "val/AP"},
        "trials": {"num": num},
        "search": {"algorithm": algorithm},
        "scheduler": {"kind": kind, "grace": grace, "reduction": 3},
        "space": KNOBS,
        **sections,
    }


def planted_ap(sample: Mapping[str, Any]) -> float:
    """AP without noise: OPTIMUM_AP at fusion fast, width 1.35, depth 1, lr 0.09, decay 4e-5.

    The learning rate counts most and steeply above, as where training becomes unstable; deeper
    networks want a lower one; weight decay hardly counts.
    """
    best_lr = 0.09 * 0.9 ** (sample["model.scaling.depth"] - 1)
    away = math.log(sample["optim.lr_per_64"] / best_lr)
    decay = math.log(sample.get("optim.weight_decay", 4e-5) / 4e-5)
    wide = (sample["model.scaling.width"] - 1.35) / 0.25
    return (
        OPTIMUM_AP
        - (0.05 if away > 0 else 0.02) * away**2
        - 0.03 * wide**2
        - 0.006 * abs(sample["model.scaling.depth"] - 1)
        - 0.0008 * decay**2
        + FUSIONS_AP[sample["model.fusion"]]
    )


def planted(
    longest: float, *, noise: float = 0.003, wobble: float = 0.002, crossing: float = 0.1
) -> Objective:
    """Trials that end at `planted_ap`.

    noise: standard deviation between seeds, of COCO's order. Curves rise as 1 - exp(-epoch / tau);
    tau is a tenth of the training, up to twice that for deep networks and low learning rates and
    down to half for high ones: these lead early and are overtaken, `crossing` says how much. With
    0.1, 0.2, 0.3 ranks at a ninth of the training and at its end correlate by 0.89, 0.78, 0.69.
    wobble: of an evaluation at first, a tenth of it at the end.
    """

    def course(sample: Mapping[str, Any], seed: int) -> Course:
        key = json.dumps([sample, seed], sort_keys=True)
        random = Random(key)
        end = max(0.0, planted_ap(sample) + random.gauss(0, noise))
        slow = (0.09 / sample["optim.lr_per_64"]) ** crossing
        slow *= 1.05 ** sample["model.scaling.depth"]
        tau = longest / 10 * min(max(slow * random.uniform(0.9, 1.1), 0.5), 2.0)

        def at(epoch: float) -> dict[str, float]:
            left = 1 - epoch / longest
            shaken = Random(f"{key}{epoch}").gauss(0, wobble * (0.1 + left))
            return {"val/AP": max(0.0, end * (1 - math.exp(-epoch / tau)) + shaken)}

        return Course(at, epoch_s=60 * random.uniform(0.8, 1.25))

    return course
