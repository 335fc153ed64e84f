"""A sweep while it runs: a live table on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.launch.progress import duration
from orchestrator.search.ledger import Entry, Ledger
from orchestrator.search.trial import Objective, describe_sample
from orchestrator.search.verdict import leaderboard

ENDED_SHOWN = 5
REFRESH_S = 1.0


class Display:
    """knobs: paths that are shown. total: trials to come to (None: not known)."""

    def __init__(
        self,
        ledger: Ledger,
        objective: Objective,
        knobs: Sequence[str],
        total: int | None,
        stream: TextIO | None = None,
    ) -> None:
        self.ledger, self.objective, self.knobs, self.total = ledger, objective, knobs, total
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self.began, self._shown_at = time.monotonic(), 0.0
        self.running: dict[str, Entry] = {}
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()

    def tell(self, what: str, entry: Entry) -> None:
        """As `Supply` tells it."""
        if what == "ended":
            self.running.pop(entry.trial_id, None)
        else:
            self.running[entry.trial_id] = entry
        if self.live is not None:
            if time.monotonic() - self._shown_at > REFRESH_S or what == "ended":
                self._shown_at = time.monotonic()
                self.live.update(self._table(), refresh=True)
            return
        if what == "ended" or (what == "began" and not entry.curve):
            self.say(self._line(what, entry))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _line(self, what: str, entry: Entry) -> str:
        sample = describe_sample(entry.sample, self.knobs)
        if what == "began":
            return f"trial {entry.trial_id} begins: {sample}"
        state = entry.state or "interrupted"
        parts = [f"trial {entry.trial_id} {state} at epoch {entry.epoch:.4g}", sample]
        value = entry.best.get(self.objective.metric)
        if value is not None:
            parts.append(f"{self.objective.name} {value:.4f}")
        if entry.img_per_s:
            parts.append(f"{entry.img_per_s:.1f} img/s")
        if entry.reason:
            parts.append(entry.reason)
        return f"{self._count()}  " + "  ".join(parts)

    def _count(self) -> str:
        total = f"/{self.total}" if self.total else ""
        return f"[{self.ledger.ended}{total} {duration(time.monotonic() - self.began)}]"

    def _table(self) -> Group:
        """What runs, and the best so far."""
        table = Table(pad_edge=False)
        for head in ("trial", "configuration", "epoch", self.objective.name, "img/s", "state"):
            table.add_column(head, overflow="fold")
        records = self.ledger.records()
        best = [row.record.trial_id for row in leaderboard(records, self.objective)]
        ended = [t for t in best if self.ledger.entries[t].state is not None][:ENDED_SHOWN]
        rows: Sequence[Entry] = [*self.running.values(), *(self.ledger.entries[t] for t in ended)]
        for entry in rows:
            value = entry.best.get(self.objective.metric)
            table.add_row(
                entry.trial_id, describe_sample(entry.sample, self.knobs), f"{entry.epoch:.4g}",
                "" if value is None else f"{value:.4f}",
                f"{entry.img_per_s:.1f}" if entry.img_per_s else "", entry.state or "running",
            )  # fmt: skip
        return Group(Text(f"{self._count()} trials ended; running, then the best so far"), table)
