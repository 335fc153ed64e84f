"""Worker-hours of a run over all its restarts, and what they cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

HOURS = "effdet.worker_hours"
RECORD_EVERY_S = 60.0


class Usage:
    """Counts while workers are at work; records now and then and at the end.

    gpus_per_worker: 0 on a CPU. price: of a worker's hour, None if nobody wants to know. record: takes
    metrics and tags.
    """

    def __init__(
        self,
        record: Callable[[Mapping[str, float], Mapping[str, str]], None],
        *,
        gpus_per_worker: float,
        price: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.record, self.gpus_per_worker, self.price = record, gpus_per_worker, price
        self.clock = clock
        self._worker_s, self._workers, self._since = 0.0, 0, clock()
        self._lock, self._closing = threading.Lock(), threading.Event()

    def recall(self, tags: Mapping[str, str]) -> None:
        """Go on counting from a run's tags."""
        self._worker_s += 3600 * float(tags.get(HOURS, 0))

    def start(self) -> None:
        """Record now and then, beside the job."""
        threading.Thread(target=self._run, name="usage", daemon=True).start()

    def at_work(self, workers: int) -> None:
        """So many workers from now on."""
        with self._lock:
            self._add()
            self._workers = workers

    def metrics(self) -> dict[str, float]:
        with self._lock:
            self._add()
            hours = self._worker_s / 3600
        found = {"usage/worker_hours": hours}
        if self.gpus_per_worker:
            found["usage/gpu_hours"] = hours * self.gpus_per_worker
        if self.price is not None:
            found["usage/cost"] = hours * self.price
        return found

    def close(self) -> dict[str, float]:
        """The last figures, recorded."""
        self._closing.set()
        self.at_work(0)
        return self._keep()

    def _add(self) -> None:
        now = self.clock()
        self._worker_s += self._workers * (now - self._since)
        self._since = now

    def _keep(self) -> dict[str, float]:
        found = self.metrics()
        self.record(found, {HOURS: f"{found['usage/worker_hours']:.6f}"})
        return found

    def _run(self) -> None:
        while not self._closing.wait(RECORD_EVERY_S):
            self._keep()


def describe_usage(used: Mapping[str, float]) -> str:
    """From the metrics of a run's whole life."""
    parts = [f"{used['usage/worker_hours']:.2f} worker-hours"]
    if "usage/gpu_hours" in used:
        parts.append(f"{used['usage/gpu_hours']:.2f} GPU-hours")
    if "usage/cost" in used:
        parts.append(f"cost {used['usage/cost']:.2f}")
    return ", ".join(parts)
