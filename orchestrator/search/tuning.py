"""Ray Tune at work: it runs trials, keeps their number, restarts what broke."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import TrialScheduler

from model.network.scaling import NetworkSpec
from orchestrator.launch.actors import Board
from orchestrator.launch.mailbox import beside, root_cause
from orchestrator.launch.preflight import Hardware
from orchestrator.search.config import SweepConfig
from orchestrator.search.constraints import Latency
from orchestrator.search.supply import Supply
from orchestrator.search.trainable import Trial
from orchestrator.search.training import ASK_TIMEOUT_S, Errand
from orchestrator.storage.filesystems import reason

# A trial with several workers is only their driver: it needs the head, and no CPU of it.
ON_HEAD = {"node:__internal_head__": 0.001}
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger and MLflow record what there is
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has none
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its own state is never read again
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}  # fmt: skip
WORKER_SETTINGS = {"RAY_CHDIR_TO_TRIAL_DIR": "0"}


class Ending(tune.Stopper):
    """Ends the sweep when it was asked to, or cannot go on. Trials end by themselves."""

    def __init__(self, supply: Supply, board: Any, say: Callable[[str], None]) -> None:
        self.supply, self.board, self.say = supply, board, say
        self.asked = self._told = False

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes down what it is given, and we never restore it."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        ending = self.asked or self.supply.error is not None
        if ending and not self._told:
            self._told = self.supply.interrupted = True
            with suppress(RayError):  # without it trials count as stopped, nothing else is lost
                ray.get(self.board.interrupt.remote(), timeout=ASK_TIMEOUT_S)
            self.say("ending the sweep: trials save a checkpoint first")
        return ending


class Reasons(tune.Callback):
    """Why a trial was given up: Tune tells its searcher only that it was."""

    def __init__(self, supply: Supply) -> None:
        self.supply = supply

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        error = trial.get_error()
        if error is not None:
            cause = root_cause(error)
            self.supply.explain(trial.config["trial"], f"{type(cause).__name__}: {reason(cause)}")


def new_board() -> Any:
    return beside(Board)


def run_trials(
    sweep: SweepConfig,
    supply: Supply,
    scheduler: TrialScheduler,
    errand: Errand,
    *,
    nested: bool,
    storage: str,
    say: Callable[[str], None],
) -> bool:
    """Until there are no more trials; True if the sweep was asked to end before.

    storage: of Tune's own notes, which nobody reads again, and of what PBT hands on.
    """
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.update(WORKER_SETTINGS)
    for noisy in ("ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    random.seed(sweep.search.seed)  # what PBT perturbs with
    ending = Ending(supply, errand.board, say)
    trainable = tune.with_resources(
        tune.with_parameters(Trial, errand=errand), _resources(errand.hardware, nested=nested)
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=supply, scheduler=scheduler, num_samples=-1, reuse_actors=True,
            trial_name_creator=_name, trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=sweep.name, storage_path=storage, verbose=0,
            stop=ending, callbacks=[Reasons(supply)],
            failure_config=tune.FailureConfig(max_failures=sweep.trials.max_failures),
        ),
    )  # fmt: skip
    with _signals(ending):
        tuner.fit()
    return ending.asked


def _name(trial: Any) -> str:
    return f"trial-{trial.config['trial']}"


def measured_latency(hardware: Hardware) -> Callable[[NetworkSpec], float]:
    """Milliseconds of a network's forward pass, measured where trials run."""
    known: dict[NetworkSpec, float] = {}
    device = "cuda" if hardware.gpus_per_worker else "cpu"

    def measure(spec: NetworkSpec) -> float:
        return Latency(torch.device(device))(spec)

    task = ray.remote(num_cpus=hardware.cpus_per_worker, num_gpus=hardware.gpus_per_worker)(measure)

    def latency(spec: NetworkSpec) -> float:
        if spec not in known:
            known[spec] = ray.get(task.remote(spec))
        return known[spec]

    return latency


def _resources(hardware: Hardware, *, nested: bool) -> PlacementGroupFactory:
    if nested:
        return PlacementGroupFactory([ON_HEAD])
    one = {"CPU": hardware.cpus_per_worker}
    if hardware.gpus_per_worker:
        one["GPU"] = hardware.gpus_per_worker
    return PlacementGroupFactory([one])


@contextmanager
def _signals(ending: Ending) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C ends the sweep in order, the second at once."""

    def ask(number: int, frame: object) -> None:
        if ending.asked:
            raise KeyboardInterrupt
        ending.asked = True

    before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
