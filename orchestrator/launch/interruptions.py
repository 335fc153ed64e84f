"""What came between a run and its end: failures and preemptions counted apart, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PREFIX = "effdet."
WAITING_S = 60.0


@dataclass
class Interruptions:
    """Counts over a run's whole life, whatever processes it took.

    failures: workers that died or raised. preemptions: nodes taken away with a notice. resizes:
    restarts because nodes came or went. resumptions: the command was given again.
    keep: called with the tags to record whenever a count changes. at_work: called with the number of
    workers that train from now on. say: shows a line.
    """

    say: Callable[[str], None]
    keep: Callable[[Mapping[str, str]], None] = lambda tags: None
    at_work: Callable[[int], None] = lambda workers: None
    failures: int = 0
    preemptions: int = 0
    resizes: int = 0
    resumptions: int = 0
    last: str | None = None
    workers: int | None = None
    here: int = 0
    """Failures since this process began."""
    _noticed: bool = False
    _failed: bool = False
    _blamed: str | None = None
    _since: float | None = None
    clock: Callable[[], float] = time.monotonic

    def recall(self, tags: Mapping[str, str]) -> None:
        """Go on counting from a run's tags."""
        for name in COUNTS:
            setattr(self, name, int(tags.get(PREFIX + name, 0)))
        self.last = tags.get(PREFIX + "last_interruption")

    def resumed(self) -> None:
        self.resumptions += 1
        self._keep()

    def noticed(self) -> None:
        """A node of the group will be taken away."""
        self._noticed = True
        self.say("a node is about to be taken away: saving now and often until it is gone")

    def blamed(self, why: str) -> None:
        """Ranks that waited in vain say for whom, before they end and look as if they had failed."""
        self._blamed = why
        self.say(why)

    def failed(self, why: str, *, preempted: bool) -> None:
        """The group of workers broke. Further news of the same group is not counted again."""
        if self._failed:
            return
        self._failed = True
        self.at_work(0)
        self.last = why = self._blamed or why
        if preempted or self._noticed:
            self.preemptions += 1
            self.say(f"a node was taken away ({why}): starting again from the newest checkpoint")
        else:
            self.failures += 1
            self.here += 1
            self.say(f"the workers failed ({why}): starting again from the newest checkpoint")
        self._keep()

    def waiting(self) -> None:
        """Looked at now and then: says once when there is no group of workers for long."""
        if self.workers is not None and not self._failed:
            return
        if self._since is None:
            self._since = self.clock()
        if 0 <= self._since < self.clock() - WAITING_S:
            self._since = -1.0
            self.say("no workers yet: slow to start, or no room on the cluster (see ray status)")

    def started(self, workers: int) -> None:
        """A group of workers begins."""
        before, self.workers = self.workers, workers
        self.at_work(workers)
        if before is not None and not self._failed:
            if self._noticed or before == workers:
                # Ray replaces a whole group without an error only when a node was to be taken away.
                self.preemptions += 1
                self.last = "a node was taken away"
            else:
                self.resizes += 1
                self.last = f"from {before} to {workers} workers"
            self._keep()
        if before is not None and before != workers:
            self.say(f"training goes on with {workers} worker(s), {before} before")
        self._noticed, self._failed, self._blamed = False, False, None
        self._since = None

    def describe(self) -> str | None:
        """For the summary; None if nothing happened."""
        named = [
            f"{getattr(self, name)} {text}" for name, text in COUNTS.items() if getattr(self, name)
        ]
        if not named:
            return None
        return ", ".join(named) + (f"; the last: {self.last}" if self.last else "")

    def counts(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in COUNTS}

    def _keep(self) -> None:
        tags = {PREFIX + name: str(count) for name, count in self.counts().items()}
        if self.last:
            tags[PREFIX + "last_interruption"] = self.last
        self.keep(tags)


COUNTS = {
    "failures": "failure(s)",
    "preemptions": "preemption(s)",
    "resizes": "change(s) of size",
    "resumptions": "resumption(s)",
}
