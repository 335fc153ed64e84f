"""What every training process does, under any launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from model.data.index import ClassMap
from model.errors import DivergedError
from model.network.detector import Detector
from model.training.fit import FitResult, fit
from model.training.initial import load_initial
from model.training.runtime import ProcessGroupRuntime
from model.training.watchdog import Watchdog
from orchestrator.launch.preflight import out_of_memory
from orchestrator.launch.resolve import ResolvedJob
from orchestrator.records.spool import MetricSender, Spool
from orchestrator.records.tracker import TrackedRun
from orchestrator.storage.background import BackgroundStore
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import open_place
from orchestrator.storage.weights import open_initial


class Board(Protocol):
    """Where rank 0 shows what happens; neither call blocks or raises."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told. Picklable."""

    resolved: ResolvedJob
    run: TrackedRun
    checkpoints_uri: str

    @property
    def save_every_s(self) -> float | None:
        minutes = self.resolved.job.checkpoint.every_minutes
        return None if minutes is None else 60.0 * minutes


def open_store(assignment: Assignment, say: Callable[[str], None]) -> CheckpointStore:
    place = open_place(assignment.checkpoints_uri, "checkpoint.uri")
    return CheckpointStore(place, assignment.resolved.job.checkpoint, say=say)


def open_watchdog(
    assignment: Assignment, rank: int, world_size: int, say: Callable[[str], None]
) -> Watchdog:
    launch = assignment.resolved.job.launch
    return Watchdog(
        rank=rank, world_size=world_size, say=say,
        timeout_s=launch.hang_timeout_s, patience_s=launch.collective_timeout_s,
    )  # fmt: skip


class Recorder:
    """Rank 0's sink: the board at once, MLflow through the spool."""

    def __init__(self, assignment: Assignment, board: Board) -> None:
        spool = Spool(assignment.resolved.output / "spool" / f"{assignment.run.run_id}.jsonl")
        self.sender = MetricSender(assignment.run.tracking_uri, assignment.run.run_id, spool)
        self.board = board

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.board.log(step, metrics)
        self.sender.log(step, metrics)

    def close(self) -> None:
        if not self.sender.close():
            path: Path = self.sender.spool.path
            self.board.say(f"the tracker did not take all metrics; the rest waits in {path}")


def _initialise(source: str | None, classes: ClassMap, detector: Detector) -> None:
    if source is not None:
        with open_initial(source) as path:
            load_initial(detector, path, classes)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def train(
    assignment: Assignment, runtime: ProcessGroupRuntime, store: BackgroundStore
) -> dict[str, Any]:
    """Run `fit` on this worker; the result as plain data, once its last checkpoint is committed.

    Divergence is a result too, {"diverged": the exception}: all ranks agree on it and no restart
    would cure it.
    """
    resolved = assignment.resolved
    if runtime.rank == 0:
        store.store.clean()
    train_set, val_set = resolved.datasets()
    try:
        result: FitResult = fit(
            resolved.recipe,
            train_set,
            val_set,
            runtime,
            resolved.config(),
            partial(_initialise, resolved.job.model.init, train_set.index.classes),
        )
    except DivergedError as error:
        return {"diverged": error}
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise out_of_memory(resolved, runtime.world_size) from None
    finally:
        if runtime.watchdog is not None:
            runtime.watchdog.close()
        for data in (train_set, val_set):
            close = getattr(data.read, "close", None)
            if close is not None:
                close()
        store.wait()
    store.close()
    return asdict(result)
