"""Checkpoints written beside training: the loop waits for a copy to the host, never for a disk.

One save is under way at a time; the next waits for it, so that steps are committed in order. What
cannot be written is tried again and then counted and said: training goes on, and `close` refuses to
call a run whose last checkpoint was lost a success.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import reason

ATTEMPTS = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class BackgroundStore:
    """A CheckpointStore whose `save` returns at once. sleep: for tests."""

    def __init__(
        self, store: CheckpointStore, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.store, self.sleep = store, sleep
        self.failures = 0
        self._thread: threading.Thread | None = None
        self._lost: tuple[int, str] | None = None

    def save(self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Commit in the background; `write` must own what it writes."""
        self.wait()
        self._thread = threading.Thread(
            target=self._commit, args=(step, dict(metrics), write), name="checkpoint", daemon=True
        )
        self._thread.start()

    def newest_valid(self) -> int | None:
        self.wait()
        return self.store.newest_valid()

    @contextmanager
    def open(self, step: int) -> Iterator[Path]:
        self.wait()
        with self.store.open(step) as folder:
            yield folder

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

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

    def _commit(
        self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None]
    ) -> None:
        pause = FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.store.save(step, metrics, write)
            except Exception as error:  # each filesystem has its own exceptions
                why = reason(error)
                if attempt == ATTEMPTS:
                    self.failures += 1
                    self._lost = step, why
                    self.store.say(f"the checkpoint of step {step} was given up: {why}")
                    return
                if attempt == 1:
                    self.store.say(f"the checkpoint of step {step} is tried again: {why}")
                self.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._lost = None
                return
