"""Metrics on their way to MLflow: a local file first, a thread that sends.

The training thread appends one line; everything that can be slow or fail happens in the sender.
Exactly once: a record is dropped if the run already has its (key, step), so replaying steps after a
restart, or a whole file, adds nothing twice.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

MAX_BATCH = 1000  # MLflow's limit for log_batch
POLL_S, FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 0.5, 30.0


class Spool:
    """Append-only file of json lines with the position up to which they are sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position_path = path.with_suffix(".sent")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end_torn_line()
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        line = {"time_ms": int(time.time() * 1000), "step": step, "metrics": dict(metrics)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def read(self, position: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Up to `limit` whole records after `position`, and the position after them."""
        records: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            file.seek(position)
            while len(records) < limit:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue  # torn by a kill; its step is run and logged again
        return records, position

    def position(self) -> int:
        try:
            return int(self.position_path.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def set_position(self, position: int) -> None:
        draft = self.position_path.with_suffix(".tmp")
        draft.write_text(str(position))
        os.replace(draft, self.position_path)

    def close(self) -> None:
        self._file.close()

    def _end_torn_line(self) -> None:
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


class MetricSender:
    """`log` never blocks and never raises; `close` gives the rest a bounded time to leave."""

    def __init__(self, tracking_uri: str, run_id: str, spool: Spool) -> None:
        self.tracking_uri, self.run_id, self.spool = tracking_uri, run_id, spool
        self.lost = 0  # records that could not even be written down
        self._known: dict[str, set[int]] = {}
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="metric-sender", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self.spool.append(step, metrics)
        except (OSError, TypeError, ValueError) as error:
            self.lost += len(metrics)
            logger.warning("step %d: metrics could not be spooled (%s)", step, error)
        self._wake.set()

    def close(self, timeout_s: float = 10.0) -> bool:
        """True if everything was sent; otherwise the file stays and a later run sends it."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        done = not self._thread.is_alive()
        self.spool.close()
        return done

    def _run(self) -> None:
        # A dead server must cost this thread seconds, not MLflow's default of four minutes a call.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        backoff = FIRST_BACKOFF_S
        client: MlflowClient | None = None
        position = self.spool.position()
        while True:
            closing = self._closing.is_set()  # asked before reading: what came before it is read
            records, after = self.spool.read(position, MAX_BATCH)
            if after == position:
                if closing:
                    return
                self._wake.wait(POLL_S)
                self._wake.clear()
                continue
            try:
                client = client or MlflowClient(self.tracking_uri)
                self._send(client, records)
                self.spool.set_position(after)
                position, backoff = after, FIRST_BACKOFF_S
            except Exception as error:  # the tracker's trouble must never become training's
                if _permanent(error):
                    logger.warning("metrics refused by the tracker, dropped: %s", error)
                    self.lost += len(records)
                    position = after
                    continue
                logger.info("tracker does not answer (%s); next try in %.0f s", error, backoff)
                # Closing cuts the wait short: whoever comes back in time still gets everything.
                if self._closing.wait(backoff):
                    time.sleep(FIRST_BACKOFF_S)
                backoff = min(MAX_BACKOFF_S, 2 * backoff)

    def _send(self, client: MlflowClient, records: list[dict[str, Any]]) -> None:
        batch: list[Metric] = []
        for record in records:
            for key, value in record["metrics"].items():
                known = self._steps_of(client, key)
                if record["step"] not in known:
                    known.add(record["step"])
                    batch.append(Metric(key, value, record["time_ms"], record["step"]))
        try:
            for first in range(0, len(batch), MAX_BATCH):
                client.log_batch(self.run_id, metrics=batch[first : first + MAX_BATCH])
        except BaseException:
            self._known.clear()  # what arrived is asked anew
            raise

    def _steps_of(self, client: MlflowClient, key: str) -> set[int]:
        if key not in self._known:
            history = client.get_metric_history(self.run_id, key)
            self._known[key] = {metric.step for metric in history}
        return self._known[key]


def _permanent(error: Exception) -> bool:
    """A refusal that no repetition will change, such as a deleted run."""
    return isinstance(error, MlflowException) and error.error_code in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
        "PERMISSION_DENIED",
    )
