"""What is left to do for trials that have ended: their checkpoints, and records that wait.

Of the best trials some checkpoints stay, of all others none.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.config.schema import CheckpointConfig
from orchestrator.launch.recorder import records_folder, records_place
from orchestrator.records.replay import replay
from orchestrator.records.run import TrackedRun
from orchestrator.records.sender import Sender, open_spool
from orchestrator.search.config import KeepConfig
from orchestrator.search.ledger import Entry, Ledger
from orchestrator.search.verdict import leaderboard
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import open_place, reason

SPOOLS, SPOOL = "sweep", "sweep.jsonl"
CLOSE_TIMEOUT_S = 300.0
MANY, LOOK_EVERY_S = 200, 30.0
LEAVING_S, POLL_S = 30.0, 0.5  # a trial that is stopped saves once more on its way out
CLOSING_S = 300.0  # what a trial's process may take to leave


class Retention:
    """A thread that reduces trials as they end; it never raises and nobody waits for it but `close`.

    Trials that may go on (interrupted ones) keep all they have.
    """

    def __init__(
        self,
        ledger: Ledger,
        keep: KeepConfig,
        config: CheckpointConfig,
        output: Path,
        parent: TrackedRun,
        *,
        say: Callable[[str], None],
    ) -> None:
        self.ledger, self.keep, self.config, self.output = ledger, keep, config, output
        self.parent, self.say = parent, say
        self._left: dict[str, tuple[int, int]] = {}
        self._orders: queue.Queue[tuple[float, Entry, int, int] | None] = queue.Queue()
        self._closing = False
        self._looked_at = 0.0
        self._orphans = self._cut_short()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """After a trial ended; of very many not after each one."""
        now = time.monotonic()
        if self.ledger.ended > MANY and now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for entry, kept in self._wanted():
            if self._left.get(entry.trial_id) != kept:
                self._left[entry.trial_id] = kept
                self._orders.put((time.monotonic() + LEAVING_S, entry, *kept))

    def close(self) -> None:
        """Once all trials have left: what a stopped one saved on its way out is seen now."""
        self._closing = True
        for entry, kept in self._wanted():
            self._orders.put((0.0, entry, *kept))
        self._orders.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _wanted(self) -> list[tuple[Entry, tuple[int, int]]]:
        """(latest, best) checkpoints to be kept of each trial that has ended."""
        rows = leaderboard(self.ledger.records(), self.ledger.objective)
        ended = [row for row in rows if self.ledger.entries[row.record.trial_id].state is not None]
        best = [row for row in ended if row.rank is not None][: self.keep.best_of_sweep]
        found = []
        for row in ended:
            entry = self.ledger.entries[row.record.trial_id]
            kept = (self.keep.latest_of_trial, self.keep.best_of_trial) if row in best else (0, 0)
            if entry.checkpoints_uri:
                found.append((entry, kept))
        return found

    def _cut_short(self) -> list[Entry]:
        """Trials whose end was written down, but whose process may have been killed before its own
        records were: they ended just before the driver did.
        """
        ended = [e for e in self.ledger.entries.values() if e.state is not None and e.run_key]
        last = max((entry.ended_at for entry in ended), default=0.0)
        return [entry for entry in ended if entry.ended_at > last - CLOSING_S]

    def _close(self, entry: Entry) -> None:
        """Send what such a trial could not, and end its run unless it has."""
        folder = records_folder(self.output, entry.run_key)
        if not folder.is_dir():
            return  # of another machine: it lies beside the checkpoints, if anything was left
        for _ in replay(str(folder), tracking_uri=None):
            pass
        sender = self._sender(entry)
        outcome = entry.reason or ("stopped early" if entry.state == "stopped" else "finished")
        status = "FAILED" if entry.state == "failed" else "FINISHED"
        ended_ms = int(entry.ended_at * 1000)
        sender.log({"op": "end", "status": status, "outcome": outcome, "time_ms": ended_ms})
        sender.close()

    def _run(self) -> None:
        for entry in self._orphans:
            try:
                self._close(entry)
            except Exception as error:  # the tracker's trouble is not the sweep's
                self.say(f"records of trial {entry.trial_id} wait: {reason(error)}")
        while (order := self._orders.get()) is not None:
            due, entry, latest, best = order
            while not self._closing and time.monotonic() < due:
                time.sleep(POLL_S)
            try:
                self._reduce(entry, latest, best)
            except Exception as error:  # each filesystem has its own; too many are better than none
                self.say(f"checkpoints of trial {entry.trial_id} were not removed: {reason(error)}")

    def _reduce(self, entry: Entry, latest: int, best: int) -> None:
        for uri in entry.earlier_uris if self._closing else ():  # till then others may copy them
            self._store(uri).reduce(latest=0, best=0)
        kept = self._store(entry.checkpoints_uri).reduce(latest=latest, best=best)
        if kept is None:
            return
        # The models that MLflow lists of a trial are those that are still there.
        sender = self._sender(entry)
        sender.log({"op": "kept", "steps": kept})
        sender.close()

    def _store(self, uri: str) -> CheckpointStore:
        return CheckpointStore(open_place(uri, "checkpoint.uri"), self.config, say=self.say)

    def _sender(self, entry: Entry) -> Sender:
        """Of a trial's run, wherever it was trained."""
        run = replace(
            self.parent, name=f"trial-{entry.trial_id}", key="", run_key=entry.run_key,
            run_id=entry.run_id, artifact_uri=None, checkpoints_uri=entry.checkpoints_uri,
        )  # fmt: skip
        folder = records_folder(self.output, entry.run_key) / SPOOLS
        folder.mkdir(parents=True, exist_ok=True)
        carried = records_place(entry.checkpoints_uri)
        return Sender(run, open_spool(folder / SPOOL, carried), say=self.say)
