"""The thread that sends a spool to MLflow, and takes what it cannot send to where checkpoints lie.

Nobody waits for it: records are appended to the spool, and the end of a process is given a bounded
time. What is left then lies in the file and beside the checkpoints; the next start of the run sends
it, or `jobs/doctor.py --replay`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.records.run import CARD, TrackedRun, keep_card
from orchestrator.records.scribe import Scribe, find_run
from orchestrator.records.spool import Record, Spool
from orchestrator.records.tracker import create_run, open_experiment
from orchestrator.storage.filesystems import Place, open_place, reason, within

logger = logging.getLogger(__name__)

MOST_RECORDS = 200  # at once
SEND_EVERY_S, FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 0.5, 30.0
CARRY_EVERY_S, CARRY_TIMEOUT_S = 60.0, 5.0
CLOSE_TIMEOUT_S = 6.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")


class RunNotThereError(Exception):
    """MLflow does not know the run yet; another process creates it."""


class RunGoneError(Exception):
    """The run was deleted: nothing can be recorded any more."""


class Sender:
    """`log` never blocks and never raises; `close` gives the rest a bounded time to leave.

    creates: may create the run (only one sender of a run may). carry_to: folder beside the checkpoints.
    found: called with the run once MLflow knows it.
    """

    def __init__(
        self,
        run: TrackedRun,
        spool: Spool,
        *,
        creates: bool = False,
        carry_to: Place | None = None,
        say: Callable[[str], None] = logger.warning,
        found: Callable[[TrackedRun], None] = lambda run: None,
    ) -> None:
        self.run, self.spool, self.creates, self.carry_to = run, spool, creates, carry_to
        self.say, self.found = say, found
        self.lost = 0  # records that could not be written down, or that MLflow refused
        self._scribe: Scribe | None = None
        self._keep_card()
        self._gone = self._given_up = False
        self._carried_at = time.monotonic()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        try:
            self.spool.append(record)
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("a record could not be spooled (%s)", error)
        self._wake.set()

    def carry(self) -> None:
        """Put what is not sent beside the checkpoints, so that it outlives this node.

        Raises what the storage raises.
        """
        rest = self.spool.rest()
        if rest and self.carry_to is not None:
            keep_card(self.carry_to, self.run)
            self.carry_to.filesystem.pipe_file(f"{self.carry_to.path}/{self.spool.path.name}", rest)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """True if everything was sent; otherwise the rest stays and a later process sends it."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        self._given_up = True
        self.spool.close()
        left = len(self.spool.rest())
        try:
            within(CARRY_TIMEOUT_S, self.carry if left else self._tidy)
        except Exception as error:  # each filesystem has its own exceptions
            if left:
                self.say(f"unsent records stay in {self.spool.path} only: {reason(error)}")
        return not left

    def _tidy(self) -> None:
        """Nothing is left to be sent: take away what was once carried."""
        if self.carry_to is not None:
            remove_carried(self.carry_to, self.spool.path.name)

    def _keep_card(self) -> None:
        """Beside the spool, for whoever replays it."""
        try:
            keep_card(open_place(str(self.spool.path.parent), CARD), self.run)
        except OSError as error:
            logger.warning("the run's card could not be written (%s)", error)

    def _run(self) -> None:
        # A dead server must cost this thread seconds, not MLflow's default of four minutes a call.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        backoff, position = FIRST_BACKOFF_S, self.spool.position()
        while not self._given_up:
            closing = self._closing.is_set()  # asked before reading: what came before it is read
            with suppress(OSError):
                self.spool.sync()
            records, after = self.spool.read(position, MOST_RECORDS)
            if after == position:
                if closing:
                    return
                self._wake.wait(SEND_EVERY_S)
                self._wake.clear()
                self._closing.wait(SEND_EVERY_S)  # what comes together is sent together
                continue
            try:
                self._send(records)
                self.spool.set_position(after)
                position, backoff = after, FIRST_BACKOFF_S
            except Exception as error:  # the tracker's trouble must never become training's
                logger.info("tracker does not answer (%s); next try in %.0f s", error, backoff)
                self._carry_now_and_then()
                # Closing cuts the wait short: whoever comes back in time still gets everything.
                if self._closing.wait(backoff):
                    time.sleep(FIRST_BACKOFF_S)
                backoff = min(MAX_BACKOFF_S, 2 * backoff)

    def _carry_now_and_then(self) -> None:
        if time.monotonic() - self._carried_at > CARRY_EVERY_S:
            self._carried_at = time.monotonic()
            with suppress(Exception):  # the next checkpoint, or the end, carries it
                self.carry()

    def _send(self, records: list[dict[str, Any]]) -> None:
        if self._gone:
            self.lost += len(records)
            return
        try:
            self._scribe = self._scribe or self._open()
            self._scribe.write(records)
        except RunGoneError:
            self._gone = True
            self.lost += len(records)
            self.say("the run was deleted in MLflow: nothing more of it is recorded")
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            self._refused(records, error)

    def _refused(self, records: list[dict[str, Any]], error: MlflowException) -> None:
        """What no repetition will change: find the record that is meant, send the others."""
        parts = [[record] for record in records]
        if len(records) == 1 and len(records[0].get("metrics", ())) > 1:
            [record] = records
            parts = [[record | {"metrics": {k: v}}] for k, v in record["metrics"].items()]
        if self._scribe is None:
            raise error
        if len(parts) == 1:
            if self._deleted(self._scribe):
                self._gone = True
            self.lost += 1
            self.say(f"MLflow refused a record of {records[0]['op']}: {reason(error)}")
            return
        for part in parts:
            self._send(part)

    def _deleted(self, scribe: Scribe) -> bool:
        try:
            run = scribe.client.get_run(scribe.run_id)
        except MlflowException as error:
            return str(error.error_code) == "RESOURCE_DOES_NOT_EXIST"
        return str(run.info.lifecycle_stage) != "active"

    def _open(self) -> Scribe:
        """Find the run by its key, or create it where that is this sender's part."""
        client = MlflowClient(self.run.tracking_uri)
        run_id = self.run.run_id or find_run(client, self.run)
        if run_id is None:
            if not self.creates:
                raise RunNotThereError(f"the run {self.run.run_key} is not there yet")
            experiment_id = open_experiment(client, self.run.experiment, self.run.artifact_root)
            run_id = create_run(client, experiment_id, self.run).run_id
        assert run_id is not None
        try:
            there = client.get_run(run_id)
        except MlflowException as error:
            if str(error.error_code) == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(run_id) from None
            raise
        if there.info.lifecycle_stage != "active":
            raise RunGoneError(run_id)
        if self.run.run_id is None:
            self.run = replace(
                self.run, run_id=run_id, experiment_id=there.info.experiment_id,
                artifact_uri=there.info.artifact_uri,
            )  # fmt: skip
            self._keep_card()
            self.found(self.run)
        return Scribe(client, self.run, run_id, self.spool.path.parent)


def open_spool(path: Path, carried: Place) -> Spool:
    """With what another node, or an earlier pod, carried to `carried` and could not send."""
    spool = Spool(path)
    with suppress(Exception):  # each filesystem has its own exceptions; it stays there
        rest = within(CARRY_TIMEOUT_S, partial(_read, carried, path.name))
        if rest not in path.read_bytes():
            spool.adopt(rest)
    return spool


def _read(place: Place, name: str) -> bytes:
    found: bytes = place.filesystem.cat_file(f"{place.path}/{name}")
    return found


def remove_carried(place: Place, name: str) -> None:
    """A spool that was sent; with the last one goes the card."""
    with suppress(FileNotFoundError):
        left = {
            str(path).rsplit("/", 1)[-1] for path in place.filesystem.ls(place.path, detail=False)
        }
        gone = {name, CARD} if left <= {name, CARD} else {name}
        for file in sorted(left & gone):
            place.filesystem.rm_file(f"{place.path}/{file}")
