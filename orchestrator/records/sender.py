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
from requests import HTTPError

from orchestrator.records.run import CARD, TrackedRun, keep_card, read_bytes
from orchestrator.records.scribe import Scribe, find_run
from orchestrator.records.secrets import redact
from orchestrator.records.spool import Record, Spool
from orchestrator.records.tracker import create_run, open_experiment
from orchestrator.storage.filesystems import Place, open_place, reason, within

logger = logging.getLogger(__name__)

MOST_RECORDS = 200  # at once
SEND_EVERY_S, FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 0.5, 30.0
CARRY_EVERY_S, CARRY_TIMEOUT_S = 60.0, 5.0
CLOSE_TIMEOUT_S = 6.0
SAY_AFTER_S = 60.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
UNKNOWN_TO_SERVER = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")
MAY_BECOME_BETTER = (401, 403, 408, 429)  # of HTTP's refusals


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
        self._given_up = self._carried = self._told = False
        self._trouble_since = 0.0
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
            self._carried = True
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
            records, after = self.spool.next_batch(position, MOST_RECORDS)
            if after == position:
                if closing:
                    return
                self._tidy_once()
                self._wake.wait(SEND_EVERY_S)
                self._wake.clear()
                self._closing.wait(SEND_EVERY_S)  # what comes together is sent together
                continue
            try:
                self._send(records)
            except RunGoneError:
                self.say("the run was deleted in MLflow: nothing more of it is recorded")
                return
            except Exception as error:  # the tracker's trouble must never become training's
                self._in_trouble(error)
                self._carry_now_and_then()
                # Closing cuts the wait short: whoever comes back in time still gets everything.
                if self._closing.wait(backoff):
                    time.sleep(FIRST_BACKOFF_S)
                backoff = min(MAX_BACKOFF_S, 2 * backoff)
            else:
                self.spool.set_position(after)
                position, backoff = after, FIRST_BACKOFF_S
                self._out_of_trouble()

    def _in_trouble(self, error: Exception) -> None:
        """Said when it has lasted, once."""
        logger.info("tracker does not take records: %s", error)
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if not self._told and now - self._trouble_since > SAY_AFTER_S:
            self._told = True
            self.say(f"the tracker takes no records ({redact(reason(error))[:160]}): they wait")

    def _out_of_trouble(self) -> None:
        if self._told:
            self.say("the tracker takes records again")
        self._trouble_since, self._told = 0.0, False

    def _carry_now_and_then(self) -> None:
        if time.monotonic() - self._carried_at > CARRY_EVERY_S:
            self._carried_at = time.monotonic()
            with suppress(Exception):  # the next checkpoint, or the end, carries it
                self.carry()

    def _tidy_once(self) -> None:
        """What was carried is sent by now; an old copy must not speak for the run later."""
        if self._carried:
            self._carried = False
            with suppress(Exception):  # tried again at the end
                self._tidy()

    def _send(self, records: list[dict[str, Any]]) -> None:
        try:
            self._scribe = self._scribe or self._open()
            self._scribe.write(records)
        except (MlflowException, HTTPError) as error:
            if self._scribe is None or not _refusal(error, records):
                raise
            self._refused(self._scribe, records, error)

    def _refused(self, scribe: Scribe, records: list[dict[str, Any]], error: Exception) -> None:
        """What no repetition will change: find the record that is meant, send the others."""
        parts = [[record] for record in records]
        if len(records) == 1 and len(records[0].get("metrics", ())) > 1:
            [record] = records
            parts = [[record | {"metrics": {k: v}}] for k, v in record["metrics"].items()]
        if len(parts) > 1:
            for part in parts:
                self._send(part)
            return
        if self._deleted(scribe):
            raise RunGoneError(scribe.run_id)
        self.lost += 1
        self.say(f"MLflow refused a record of {records[0]['op']}: {redact(reason(error))}")

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
        rest = within(CARRY_TIMEOUT_S, partial(read_bytes, carried, path.name))
        if rest not in path.read_bytes():
            spool.adopt(rest)
    return spool


def remove_carried(place: Place, name: str) -> None:
    """A spool that was sent; with the last one goes the card."""
    with suppress(FileNotFoundError):
        left = {
            str(path).rsplit("/", 1)[-1] for path in place.filesystem.ls(place.path, detail=False)
        }
        gone = {name, CARD} if left <= {name, CARD} else {name}
        for file in sorted(left & gone):
            place.filesystem.rm_file(f"{place.path}/{file}")


def _refusal(error: Exception, records: list[dict[str, Any]]) -> bool:
    """Whether repeating is in vain: too large for a proxy, unknown to an old server, not allowed."""
    if isinstance(error, HTTPError):
        status = error.response.status_code if error.response is not None else 0
        return 400 <= status < 500 and status not in MAY_BECOME_BETTER
    code = getattr(error, "error_code", "")
    if records[0]["op"] != "metrics" and code in UNKNOWN_TO_SERVER:
        return True
    return code in REFUSALS
