"""Checkpoints written beside training: the loop waits for a copy to the host, never for a disk.

They are committed one after another. Where the storage is slower than training, or away for a
while, the newest waits its turn, and so does the newest with an evaluation; what was waiting is
dropped, counted and said once. What cannot be written is tried again for a long time, then given
up and said: training goes on, and `close` refuses to call a run whose last checkpoint was lost a
success.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import reason
from orchestrator.storage.retry import pauses

PATIENCE_S = 900.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is not committed yet; `write` owns what it writes."""

    step: int
    metrics: dict[str, float]
    write: Callable[[Path], None]


class BackgroundStore:
    """A CheckpointStore whose `save` returns at once.

    patience_s: how long one checkpoint is tried. sleep, clock: for tests.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        patience_s: float = PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.patience_s, self.sleep, self.clock = store, patience_s, sleep, clock
        self.failures = self.skipped = 0
        self._waiting: list[Snapshot] = []
        self._busy = False
        self._changed = threading.Condition()
        self._lost: tuple[int, str] | None = None

    def save(self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Commit in the background; `write` must own what it writes."""
        with self._changed:
            self._waiting.append(Snapshot(step, dict(metrics), write))
            scored = [snapshot for snapshot in self._waiting if snapshot.metrics]
            keep = [*scored[-1:], *self._waiting[-1:]]
            dropped = [snapshot for snapshot in self._waiting if snapshot not in keep]
            self._waiting = [snapshot for snapshot in self._waiting if snapshot in keep]
            if dropped and not self.skipped:
                self.store.say(
                    "the storage is slower than training: the checkpoint of step "
                    f"{dropped[0].step} gave way to that of step {step}"
                )
            self.skipped += len(dropped)
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def newest_valid(self) -> int | None:
        self.wait()
        step = self.store.newest_valid()
        if step is not None:
            self.store.say(f"going on from the checkpoint of step {step}")
        return step

    @contextmanager
    def open(self, step: int) -> Iterator[Path]:
        self.wait()
        with self.store.open(step) as folder:
            yield folder

    def figures(self) -> dict[str, float]:
        figures = self.store.figures()
        if self.skipped:
            figures["perf/checkpoints_skipped"] = float(self.skipped)
        return figures

    def wait(self) -> None:
        """Until nothing is under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def close(self) -> None:
        """Wait for the last save.

        Raises:
            StorageError: it could not be committed.
        """
        self.wait()
        if self._lost is not None:
            step, why = self._lost
            raise StorageError(
                "checkpoint.uri", f"the checkpoint of step {step} to be kept",
                f"{self.store.place.uri} ({why})", "repair the storage and run the same command again",
            )  # fmt: skip

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._busy = False
                    self._changed.notify_all()
                    return
                snapshot = self._waiting.pop(0)
            self._commit(snapshot)

    def _commit(self, snapshot: Snapshot) -> None:
        end, told = self.clock() + self.patience_s, False
        for pause in pauses(FIRST_PAUSE_S, LONGEST_PAUSE_S):
            try:
                self.store.save(snapshot.step, snapshot.metrics, snapshot.write)
            except Exception as error:  # each filesystem has its own exceptions
                why = reason(error)
                if self.clock() + pause > end:
                    self.failures += 1
                    self._lost = snapshot.step, why
                    self.store.say(f"the checkpoint of step {snapshot.step} was given up: {why}")
                    return
                if not told:
                    self.store.say(f"the checkpoint of step {snapshot.step} is tried again: {why}")
                    told = True
                self.sleep(pause)
            else:
                if told:
                    self.store.say(f"the checkpoint of step {snapshot.step} is saved after all")
                self._lost = None
                return
