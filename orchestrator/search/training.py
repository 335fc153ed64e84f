"""A trial: a whole training job, run in a thread that hands each evaluation to Ray Tune.

With one worker it trains in the trial's own process, with several in the workers of a TorchTrainer.
Either way it ends by itself when it is stopped: it saves, sends its records and leaves, so nothing
has to be killed and nothing stays behind.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from model.training.fit import forget_memory
from model.training.runtime import ProcessGroupRuntime, local_device, set_threads
from model.training.state import read_metrics
from orchestrator.config.schema import TrainJob
from orchestrator.errors import UserError
from orchestrator.launch import local, preflight
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.launchers import Launcher
from orchestrator.launch.places import checkpoints_uri, open_runs
from orchestrator.launch.preflight import Hardware
from orchestrator.launch.progress import Progress
from orchestrator.launch.recorder import Recorder
from orchestrator.launch.resolve import Derived, ResolvedJob, derive, with_job
from orchestrator.launch.tracked import Work, run_tracked
from orchestrator.launch.worker import Assignment
from orchestrator.records.run import DIVERGED, FINISHED, TrackedRun
from orchestrator.search.group import Group
from orchestrator.search.sample import apply
from orchestrator.search.space import Sample
from orchestrator.search.trial import Unit
from orchestrator.storage.background import BackgroundStore
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import open_place

PARENT, SWEEP_TAG, TRIAL_TAG, FROM_TAG = (
    "mlflow.parentRunId", "effdet.sweep", "effdet.trial", "effdet.exploited_from",
)  # fmt: skip
END_TIMEOUT_S = 300.0
ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Errand:
    """What every trial of a sweep is told. Picklable.

    resolved: the base job on its data. unit, longest: where a trial ends (None: with its schedule).
    stopper: what stops trials early, for the record. parent_id: the sweep's MLflow run, if known.
    board: actor that says whether the whole sweep is being interrupted.
    """

    sweep: str
    resolved: ResolvedJob
    num_train: int
    num_val: int
    facts: Mapping[str, Any]
    hardware: Hardware
    unit: Unit
    longest: float | None
    stopper: str
    parent_id: str | None
    board: Any
    logs: Path
    storage: str


def trial_job(base: TrainJob, sweep: str, trial: str, sample: Sample, seed: int) -> TrainJob:
    """What a trial trains: the base job with its sample, its seed and its name."""
    job = apply(base, {**sample, "train.seed": seed})
    return replace(job, run=replace(job.run, name=f"{sweep}-{trial}"))


class Training:
    """One training in a thread. donor: checkpoints of a better trial to go on from (PBT).

    group: workers that train it, None: this process does.
    """

    def __init__(
        self, errand: Errand, config: Mapping[str, Any], donor: str | None, group: Group | None
    ) -> None:
        self.errand, self.donor, self.group = errand, donor, group
        self.trial, self.sample = str(config["trial"]), dict(config["sample"])
        self.seed = int(config["seed"])
        self.process = uuid.uuid4().hex[:8]
        self.began = time.monotonic()
        self.stop, self.answered = threading.Event(), threading.Event()
        self.interrupted = self.reached_end = False
        self.checkpoints_uri = ""
        self.fit_began_s = 0.0
        self.found: dict[str, Any] = {}
        self.run: TrackedRun | None = None
        self.results: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self.thread = threading.Thread(target=self._run, name=f"trial-{self.trial}", daemon=True)
        self.thread.start()

    def next(self) -> dict[str, Any]:
        """The next evaluation; whoever waits for an answer to the last goes on."""
        self.answered.set()
        found = self.results.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def end(self) -> bool:
        """Ask for the end and wait for it; False if it does not come."""
        if not self.thread.is_alive():
            return True
        with suppress(Exception):  # the driver is gone; then nobody records how it ended
            self.interrupted = ray.get(
                self.errand.board.is_interrupted.remote(), timeout=ASK_TIMEOUT_S
            )
        self.stop.set()
        self.answered.set()
        self.thread.join(END_TIMEOUT_S)
        return not self.thread.is_alive()

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """By the thread that hears of it. The last one goes with the end; a group may still be on
        its way to stop, and go further.
        """
        if self.reached_end:
            return
        self.note(step, epoch, metrics)
        reached = epoch if self.errand.unit == "epoch" else step
        if self.errand.longest is not None and reached >= self.errand.longest:
            self.reached_end = True
            self.stop.set()
            return
        self.answered.clear()
        self.results.put(dict(self.found))

    def note(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """What is known of the newest evaluation."""
        self.found = {
            "step": step, "epoch": epoch, "process": self.process,
            "seconds": time.monotonic() - self.began, "sample": json.dumps(self.sample),
            "run_id": self.run.run_id if self.run else None,
            "run_key": self.run.run_key if self.run else "",
            "checkpoints_uri": self.checkpoints_uri,
            **{k: v for k, v in metrics.items() if k.startswith(("val/", "val_class/", "model/"))},
        }  # fmt: skip
        if metrics.get("perf/img_per_s"):
            self.found["img_per_s"] = metrics["perf/img_per_s"]

    def began_fit(self) -> None:
        self.fit_began_s = time.monotonic() - self.began

    def ended_early(self) -> str | None:
        if self.reached_end:
            return FINISHED
        if self.interrupted or self.errand.stopper == "pbt":  # then its turn is over, no more
            return None
        return f"stopped early by {self.errand.stopper}"

    def _run(self) -> None:
        """Whoever waits gets something to wait for, however it ends."""
        try:
            forget_memory()
            self.errand.logs.mkdir(parents=True, exist_ok=True)
            with (self.errand.logs / f"{self.trial}.log").open("a", buffering=1) as log:
                try:
                    status = self._train(log)
                except Exception:
                    traceback.print_exc(file=log)
                    raise
            if status == FINISHED:
                self._finish("finished")
            else:  # of what was told to stop nobody takes it
                self._finish("failed", status)
        except UserError as error:
            self._finish("failed", str(error))
        except BaseException as error:  # handed to Tune, which counts it and tries again
            self.results.put(error)

    def _finish(self, how: str, why: str = "") -> None:
        self.found.setdefault("sample", json.dumps(self.sample))
        seconds = time.monotonic() - self.began
        self.results.put(
            {**self.found, "seconds": seconds, "state": how, "reason": why, "done": True}
        )

    def _train(self, log: TextIO) -> str:
        """How it ended: FINISHED, or why not."""
        errand = self.errand
        job = trial_job(errand.resolved.job, errand.sweep, self.trial, self.sample, self.seed)
        resolved = with_job(errand.resolved, job)
        derived = derive(resolved, errand.num_train, errand.num_val)
        resolved, _ = preflight.check_memory(resolved, derived, errand.hardware, job.launch.workers)
        resolved = preflight.with_loader_workers(resolved, errand.hardware)
        runs = open_runs(job, resolved.output, log)
        resume = "never" if self.donor else "auto"
        run = runs.open(name=resolved.name, key=resolved.key(), resume=resume)
        run = replace(run, checkpoints_uri=checkpoints_uri(resolved, run))
        self.run, self.checkpoints_uri = run, run.checkpoints_uri
        tags = {SWEEP_TAG: errand.sweep, TRIAL_TAG: self.trial}
        if errand.parent_id:
            tags[PARENT] = errand.parent_id
        if self.donor:
            tags[FROM_TAG] = self.donor
            self._exploit(resolved, run, log)
        launcher = _Here(self) if self.group is None else _There(self, self.group)
        work = Work(
            resolved, derived, errand.hardware, launcher, runs, dict(errand.facts),
            self._anchor_ious(resolved), tags,
        )  # fmt: skip
        progress = Watched.of(derived.schedule, job.checkpoint.metric, log)
        progress.watch(self, derived)
        outcome = run_tracked(
            work, run, progress, began=self.began, out=log, err=log, ended_early=self.ended_early
        )
        status, metrics = str(outcome.report["status"]), outcome.report["metrics"]
        lacking = self.found.get("step", -1) < outcome.report["step"]
        if status == FINISHED and metrics and lacking and not self.reached_end:
            # It had been evaluated by a process that could not say so.
            progress.evaluated(outcome.report["step"], metrics)
        self.found |= {"fit_s": outcome.report["train_s"], "fit_began_s": self.fit_began_s}
        if status == DIVERGED:
            return f"{DIVERGED} at step {outcome.report['step']}: the loss was not finite"
        if status != FINISHED and outcome.report["last_interruption"]:
            status += f": {outcome.report['last_interruption']}"
        return status

    def _exploit(self, resolved: ResolvedJob, run: TrackedRun, log: TextIO) -> None:
        """The donor's newest checkpoint becomes this run's first."""
        config = resolved.job.checkpoint

        def say(text: str) -> None:
            print(text, file=log)

        own = CheckpointStore(open_place(run.checkpoints_uri, "checkpoint.uri"), config, say=say)
        assert self.donor is not None
        theirs = CheckpointStore(open_place(self.donor, "checkpoint.uri"), config, say=say)
        step = theirs.newest_valid()
        if step is None:
            say(f"no checkpoint to take over in {self.donor}: from the start")
            return
        with theirs.open(step) as folder:
            own.save(step, read_metrics(folder), lambda to: _copy(folder, to))

    def _anchor_ious(self, resolved: ResolvedJob) -> NDArray[np.float32]:
        if not resolved.job.tracking.figures:
            return np.zeros(0, dtype=np.float32)
        index = resolved.train.index(resolved.job.data.classes)
        return preflight.anchor_ious(resolved, index)


class Watched(Progress):
    """The progress line, which also passes evaluations on."""

    training: Training
    derived: Derived

    def watch(self, training: Training, derived: Derived) -> None:
        self.training, self.derived = training, derived

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        if any(key.startswith("val/") for key in metrics):
            self.training.evaluated(step, step / self.steps_per_epoch, self._all(metrics))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Earlier; only its numbers are left."""
        self.training.note(step, step / self.steps_per_epoch, self._all(metrics))

    def _all(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """With what is known of the network, and how fast it trains."""
        cost = self.derived.cost
        model = {"model/params_m": cost.params / 1e6, "model/gmacs": cost.gmacs}
        return {**metrics, **model, "perf/img_per_s": self.latest.get("perf/img_per_s", 0.0)}


class TrialRuntime(ProcessGroupRuntime):
    """One worker, in the trial's own process. After an evaluation it waits to hear if it goes on."""

    training: Training

    def stop_code(self) -> int:
        self.training.answered.wait()
        return int(self.training.stop.is_set())

    def stop_reason(self, code: int) -> str | None:
        return "stopped" if code else None


class _Here(Launcher):
    """Trains in this process, with what Tune reserved for it."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def run(
        self,
        assignment: Assignment,
        hardware: Hardware,
        progress: Progress,
        interruptions: Interruptions,
    ) -> dict[str, Any]:
        interruptions.at_work(1)
        self.training.began_fit()

        def runtime(store: BackgroundStore, sink: Recorder) -> ProcessGroupRuntime:
            set_threads(1, assignment.resolved.job.launch.threads_per_worker)
            found = TrialRuntime(
                rank=0, world_size=1, store=store, sink=sink,
                device=local_device(0) if hardware.gpus_per_worker else torch.device("cpu"),
                save_every_s=assignment.save_every_s,
            )  # fmt: skip
            found.training = self.training
            return found

        return local.lead(assignment, progress, runtime)


class _There(Launcher):
    """Trains in a group of workers."""

    def __init__(self, training: Training, group: Group) -> None:
        self.training, self.group = training, group

    def run(
        self,
        assignment: Assignment,
        hardware: Hardware,
        progress: Progress,
        interruptions: Interruptions,
    ) -> dict[str, Any]:
        self.training.began_fit()
        return self.group.train(assignment, progress, interruptions, self.training.stop)


def _copy(folder: Path, to: Path) -> None:
    shutil.copytree(folder, to, dirs_exist_ok=True)
