"""Ends a wait for ranks that do not come, and names them.

A collective gives up after its process group's timeout, which must allow for compilation, downloads
and slow starts, and then says only that it waited. So every rank reports where it is to the group's
store, from a thread of its own: one whose training thread hangs still reports, one whose process is
stopped or whose network is cut falls silent. Whoever has waited too long reads the reports.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# In the order of a step. In all but "step" a rank may rightly be busy for long while others wait.
PHASES = ("restore", "data", "step", "evaluate", "save")
REPORT_EVERY_S = 1.0
STORE_TIMEOUT_S = 10.0
EXIT_CODE = 75
SLOW_STEP = 5.0  # times the longest step so far
# Scoring is one long call of a library that may not let other threads run, so not even reports.
DEAF = ("evaluate",)


@dataclass(frozen=True)
class Report:
    """Where a rank was. age_s: how long already; silent_s: since when nothing new came from it."""

    rank: int
    host: str
    step: int
    phase: str
    age_s: float
    silent_s: float = 0.0

    def order(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def describe(self) -> str:
        return f"rank {self.rank} on {self.host}"


def verdict(
    me: Report, others: Sequence[Report], *, timeout_s: float, patience_s: float
) -> str | None:
    """Why to stop waiting, None to wait on.

    timeout_s: for a rank that is stuck in a step, or has been silent for half of that time, which is
    when reports begin to be read; patience_s: for one busy with something that may take long.
    """
    where = f"step {me.step + 1}"
    if me.age_s <= timeout_s:
        return None
    silent = [
        report
        for report in others
        if report.silent_s > (patience_s if report.phase in DEAF else timeout_s / 2)
    ]
    if silent:
        lost = min(silent, key=lambda report: report.order())
        return (
            f"{where}: {lost.describe()} did not arrive: nothing was heard of it for "
            f"{lost.silent_s:.0f} s, last in step {lost.step + 1} ({lost.phase})"
        )
    if any(report.order() > me.order() for report in others):
        return None  # this rank is the late one, and they say so
    behind = [report for report in others if report.order() < me.order()]
    busy = [r for r in behind if r.phase != "step" and r.age_s <= patience_s]
    if busy or (me.phase != "step" and me.age_s <= patience_s):
        return None
    if behind:
        late = min(behind, key=lambda report: report.order())
        return (
            f"{where}: {late.describe()} did not arrive: it is in step {late.step + 1} "
            f"({late.phase}) for {late.age_s:.0f} s"
        )
    if me.phase != "step":
        return f"{where}: {me.describe()} is not done with {me.phase} after {me.age_s:.0f} s"
    return f"{where}: all {len(others) + 1} ranks wait for one another for {me.age_s:.0f} s"


class Watchdog:
    """One for each rank of the default process group.

    timeout_s, patience_s: see `verdict`; patience is also what counts until the first step is done.
    say: gets the line; end: leaves the process, whose training thread cannot be interrupted.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        patience_s: float,
        say: Callable[[str], None],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.say, self.end = say, end
        self._place = (0, "restore", time.monotonic())
        self._first: int | None = None
        self._longest_s = 0.0
        self._closing = threading.Event()
        self._heard: dict[int, tuple[str, float, Report]] = {}
        self._read_at: float | None = None
        if world_size == 1:
            return
        shared = dist.distributed_c10d._get_default_store()
        # Where rank 0 stands still, calls of its store never return; so each thread has a
        # connection of its own, and the one that judges has none.
        for work in (self._report, self._read):
            store = shared.clone()
            store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
            threading.Thread(target=work, args=(store,), name="watchdog", daemon=True).start()
        threading.Thread(target=self._judge, name="watchdog", daemon=True).start()

    def arrive(self, step: int, phase: str) -> None:
        """Called by the training thread; costs nothing."""
        before, was, since = self._place
        now = time.monotonic()
        if self._first is None and phase == "data":
            self._first = step
        elif was == "step" and before != self._first:
            self._longest_s = max(self._longest_s, now - since)
        self._place = (step, phase, now)

    def close(self) -> None:
        """The rank is done; others may still be busy."""
        self._closing.set()

    def _report(self, store: Any) -> None:
        number = 0
        while not self._closing.wait(REPORT_EVERY_S):
            number += 1
            step, phase, since = self._place
            age = time.monotonic() - since
            try:
                store.set(
                    f"watchdog/{self.rank}", f"{number} {step} {phase} {age:.1f} {platform.node()}"
                )
            except RuntimeError:
                continue  # the store's rank is gone or far; the judge says so

    def _read(self, store: Any) -> None:
        """Keeps what the others report while this rank waits for long."""
        while not self._closing.wait(REPORT_EVERY_S):
            if self._me().age_s < self._timeout_s() / 2:
                self._heard, self._read_at = {}, None
                continue
            try:
                for rank in set(range(self.world_size)) - {self.rank}:
                    key = f"watchdog/{rank}"
                    text = store.get(key).decode() if store.check([key]) else ""
                    if rank not in self._heard or self._heard[rank][0] != text:
                        self._heard[rank] = (text, time.monotonic(), _parse(rank, text))
            except RuntimeError:
                continue
            self._read_at = time.monotonic()

    def _judge(self) -> None:
        while not self._closing.wait(REPORT_EVERY_S):
            me, timeout_s, since = self._me(), self._timeout_s(), self._place[2]
            if me.age_s <= timeout_s:
                continue
            now = time.monotonic()
            read_at = self._read_at
            unread_s = now - read_at if read_at else me.age_s - timeout_s / 2
            if unread_s > timeout_s / 2:
                # The store is rank 0's: what keeps it from answering keeps rank 0 from arriving.
                why: str | None = (
                    f"step {me.step + 1}: rank 0 did not arrive: nothing was heard of it for "
                    f"{unread_s:.0f} s"
                )
                speaker = 1
            elif read_at is None:
                continue
            else:
                # Silence is what reading did not end: one that had no time to read heard nothing.
                others = [
                    _aged(report, now - heard_at, read_at - heard_at)
                    for _, heard_at, report in list(self._heard.values())
                ]
                why = verdict(me, others, timeout_s=timeout_s, patience_s=self.patience_s)
                waiting = [r.rank for r in others if not r.silent_s and r.order() >= me.order()]
                speaker = min([self.rank, *waiting])
            if why is None or self._closing.is_set() or self._place[2] != since:
                continue
            if speaker == self.rank:
                self.say(why)
                time.sleep(REPORT_EVERY_S)  # for the line to leave
            else:
                time.sleep(3 * REPORT_EVERY_S)  # for the speaker to see the same
            if self._place[2] == since and not self._closing.is_set():
                self.end(EXIT_CODE)
                return

    def _me(self) -> Report:
        step, phase, since = self._place
        return Report(self.rank, platform.node(), step, phase, time.monotonic() - since)

    def _timeout_s(self) -> float:
        stepped = self._first is not None and self._place[0] > self._first
        if not stepped:
            return self.patience_s
        # Where a step itself takes long, a slow one must not look like a stuck one.
        return min(self.patience_s, max(self.timeout_s, SLOW_STEP * self._longest_s))


def _aged(report: Report, elapsed_s: float, unheard_s: float) -> Report:
    """As it is to be seen elapsed_s after it came, when reading found nothing new for unheard_s."""
    silent_s = unheard_s if unheard_s > 2 * REPORT_EVERY_S else 0.0
    return replace(report, age_s=report.age_s + elapsed_s, silent_s=silent_s)


def _parse(rank: int, text: str) -> Report:
    if not text:
        return Report(rank, "an unknown host", 0, "restore", 0.0)
    _, step, phase, age, host = text.split(" ", 4)
    return Report(rank, host, int(step), phase, float(age))
