"""Figures of each evaluation, drawn in a process beside the training at the lowest priority.

The worker hands over what an evaluation found through a pipe; where drawing is slower than
evaluating, only the newest is drawn. The process has a spool and a sender of its own, and ends when
the pipe does, even if the worker was killed.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Reader
from model.data.index import CocoIndex
from model.training.evaluation import Evaluation
from orchestrator.errors import UserError
from orchestrator.records.run import TrackedRun
from orchestrator.storage.filesystems import reason

NICE = 19
PATIENCE_S = 10.0  # of a worker that ends, for the last figures
LONGEST_S = 180.0  # that the process may go on by itself


@dataclass(frozen=True)
class Exhibition:
    """What does not change between evaluations. folder: the run's records; carried_uri: see `Sender`.

    index, read: of the validation images. anchor_ious: of training boxes with their best anchors.
    """

    run: TrackedRun
    folder: Path
    carried_uri: str
    index: CocoIndex
    read: Reader
    anchor_ious: NDArray[np.float32]


@dataclass(frozen=True)
class Showing:
    """One evaluation. fusion: weights by name, see `model.network.pyramid.Pyramid.fusion_weights`."""

    step: int
    time_ms: int
    evaluation: Evaluation
    fusion: dict[str, float]


class Gallery:
    """The worker's end of the pipe. `show` never blocks and never raises."""

    def __init__(
        self, folder: Path, make: Callable[[], Exhibition], *, say: Callable[[str], None]
    ) -> None:
        """folder: the run's records; make: called beside the training."""
        self.say = say
        self._next: Showing | None = None
        self._finished_at = 0.0
        self._wake, self._finishing = threading.Event(), threading.Event()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        log = folder / "figures.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.records.painter"],
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                env=environment | {"PYTHONPATH": path},
            )  # fmt: skip
        self._thread = threading.Thread(
            target=self._pass_on, args=(make,), name="figures", daemon=True
        )
        self._thread.start()

    def show(self, step: int, evaluation: Evaluation, fusion: Mapping[str, float]) -> None:
        self._next = Showing(step, int(time.time() * 1000), evaluation, dict(fusion))
        self._wake.set()

    def finish(self) -> None:
        """Nothing more comes; returns at once."""
        if not self._finishing.is_set():
            self._finished_at = time.monotonic()
        self._finishing.set()
        self._wake.set()

    def close(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait for the last figures; what takes longer goes on by itself for a while.

        timeout_s: since `finish`.
        """
        self.finish()
        left_s = max(0.1, self._finished_at + timeout_s - time.monotonic())
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(left_s):
                self.say("some figures could not be drawn, see figures.log among the run's records")

    def _pass_on(self, make: Callable[[], Exhibition]) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            with pipe:
                _put(pipe, make())
                while True:
                    last = self._finishing.is_set()
                    showing, self._next = self._next, None
                    if showing is not None:
                        _put(pipe, showing)
                    elif last:
                        return
                    else:
                        self._wake.wait()
                        self._wake.clear()
        except (OSError, UserError) as error:  # figures are not worth a training
            self.say(f"figures are no longer drawn: {reason(error)}")


def _put(pipe: IO[bytes], content: Any) -> None:
    pickle.dump(content, pipe)
    pipe.flush()


def stepped_name(run_key: str, key: str, step: int, time_ms: int) -> str:
    """File name by which MLflow's charts know an image of a step; the same whenever it is sent again."""
    unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{run_key}/{key}/{step}")
    clean = re.sub(r"[^\w.\- ~]", "-", key.replace("/", "~"))
    return f"{clean}+step+{step}+timestamp+{time_ms}+{unique}"
