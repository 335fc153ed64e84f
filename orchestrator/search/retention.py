"""What is left to do for trials that have ended: their checkpoints, and records that wait.

Of the best trials some checkpoints stay, of all others none.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from orchestrator.config.schema import CheckpointConfig
from orchestrator.launch.recorder import records_folder, records_place
from orchestrator.records.replay import replay
from orchestrator.records.run import read_card
from orchestrator.records.sender import Sender, open_spool
from orchestrator.search.config import KeepConfig
from orchestrator.search.ledger import Entry, Ledger
from orchestrator.search.verdict import leaderboard
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import open_place, reason

SPOOL = "sweep.jsonl"
CLOSE_TIMEOUT_S = 60.0
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
        *,
        say: Callable[[str], None],
    ) -> None:
        self.ledger, self.keep, self.config, self.output, self.say = (
            ledger,
            keep,
            config,
            output,
            say,
        )
        self._left: dict[str, tuple[int, int]] = {}
        self._orders: queue.Queue[tuple[Entry, int, int] | None] = queue.Queue()
        self._orphans = self._cut_short()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """After a trial ended."""
        rows = leaderboard(self.ledger.records(), self.ledger.objective)
        ended = [row for row in rows if self.ledger.entries[row.record.trial_id].state is not None]
        best = [row for row in ended if row.rank is not None][: self.keep.best_of_sweep]
        for row in ended:
            entry = self.ledger.entries[row.record.trial_id]
            kept = (self.keep.latest_of_trial, self.keep.best_of_trial) if row in best else (0, 0)
            if entry.checkpoints_uri and self._left.get(entry.trial_id) != kept:
                self._left[entry.trial_id] = kept
                self._orders.put((entry, *kept))

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

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
        place = open_place(str(folder), "run.output")
        if not folder.is_dir():
            return  # of another machine: it lies beside the checkpoints, if anything was left
        for _ in replay(str(folder), tracking_uri=None):
            pass
        sender = Sender(
            read_card(place), open_spool(folder / SPOOL, records_place(entry.checkpoints_uri)),
            say=self.say,
        )  # fmt: skip
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
            entry, latest, best = order
            try:
                self._reduce(entry, latest, best)
            except Exception as error:  # each filesystem has its own; too many are better than none
                self.say(f"checkpoints of trial {entry.trial_id} were not removed: {reason(error)}")

    def _reduce(self, entry: Entry, latest: int, best: int) -> None:
        place = open_place(entry.checkpoints_uri, "checkpoint.uri")
        store = CheckpointStore(place, self.config, say=self.say)
        kept = store.reduce(latest=latest, best=best)
        if kept is None:
            return
        # The models that MLflow lists of a trial are those that are still there.
        folder = records_folder(self.output, entry.run_key)
        run = read_card(open_place(str(folder), "run.output"))
        carried = records_place(entry.checkpoints_uri)
        sender = Sender(run, open_spool(folder / SPOOL, carried), say=self.say)
        sender.log({"op": "kept", "steps": kept})
        sender.close()
