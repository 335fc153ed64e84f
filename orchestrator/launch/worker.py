"""What every training process does, under any launcher."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.data.index import ClassMap
from model.errors import DivergedError
from model.network.detector import Detector
from model.training.fit import FitResult, fit
from model.training.initial import load_initial
from model.training.runtime import ProcessGroupRuntime
from model.training.watchdog import Watchdog
from orchestrator.launch.preflight import out_of_memory
from orchestrator.launch.recorder import records_place
from orchestrator.launch.resolve import ResolvedJob
from orchestrator.records.gallery import Exhibition
from orchestrator.records.run import TrackedRun
from orchestrator.storage.background import BackgroundStore
from orchestrator.storage.checkpoints import CheckpointStore, Witness
from orchestrator.storage.filesystems import open_place
from orchestrator.storage.weights import open_initial


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told. Picklable.

    val_facts: name and digest of the validation data. anchor_ious: see `Exhibition`.
    """

    resolved: ResolvedJob
    run: TrackedRun
    checkpoints_uri: str
    val_facts: Mapping[str, str]
    anchor_ious: NDArray[np.float32]

    def exhibition(self, folder: Path) -> Exhibition:
        """For the figures; folder: the run's records."""
        val, job = self.resolved.val, self.resolved.job
        return Exhibition(
            run=self.run,
            folder=folder,
            carried_uri=records_place(self.checkpoints_uri).uri,
            index=val.index(job.data.classes),
            read=val.reader(),
            anchor_ious=self.anchor_ious,
        )

    @property
    def save_every_s(self) -> float | None:
        minutes = self.resolved.job.checkpoint.every_minutes
        return None if minutes is None else 60.0 * minutes


def open_store(
    assignment: Assignment, say: Callable[[str], None], witness: Witness | None = None
) -> CheckpointStore:
    place = open_place(assignment.checkpoints_uri, "checkpoint.uri")
    return CheckpointStore(place, assignment.resolved.job.checkpoint, say=say, witness=witness)


def open_watchdog(
    assignment: Assignment, rank: int, world_size: int, say: Callable[[str], None]
) -> Watchdog:
    launch = assignment.resolved.job.launch
    return Watchdog(
        rank=rank, world_size=world_size, say=say,
        timeout_s=launch.hang_timeout_s, patience_s=launch.collective_timeout_s,
    )  # fmt: skip


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
    resolved, began = assignment.resolved, time.monotonic()
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
    return asdict(result) | {"seconds": time.monotonic() - began}
