"""The live line of a prediction."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.launch.progress import PLAIN_INTERVAL_S, duration
from orchestrator.storage.predictions import Part

WINDOW = 64  # shards that the speed is taken of


class PredictProgress:
    """A line that changes in place on a terminal; a plain line now and then elsewhere.

    images: of the list, of which `done` are. frames: there are videos, whose length nobody knows.
    """

    def __init__(
        self,
        *,
        images: int,
        done: int,
        frames: bool,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.images, self.done, self.frames = images, done, frames
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.clock = clock
        self.looked_at = self.failed = 0
        self._began = self._printed_at = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._began, 0)], maxlen=WINDOW)
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def add(self, files: int, part: Part) -> None:
        """A shard of so many files is done."""
        self.done += files
        self.looked_at += part.images
        self.failed += len(part.failed)
        now = self.clock()
        self._recent.append((now, self.looked_at))
        if self.live is not None:
            self.live.update(Text(self.line()))
        elif self.done >= self.images or now - self._printed_at > PLAIN_INTERVAL_S:
            self._printed_at = now
            self.console.print(self.line())

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @property
    def img_per_s(self) -> float:
        """Of late."""
        (since, before), (now, looked_at) = self._recent[0], self._recent[-1]
        return (looked_at - before) / max(now - since, 1e-9)

    def line(self) -> str:
        """files, failures, images a second, time left; what is unknown is left out."""
        what = "files" if self.frames else "images"
        parts = [f"{what} {self.done}/{self.images}"]
        if self.frames:
            parts.append(f"frames {self.looked_at}")
        if self.failed:
            parts.append(f"failed {self.failed}")
        if self.looked_at:
            parts.append(f"img/s {self.img_per_s:.1f}")
        if self.looked_at and not self.frames and self.done < self.images:
            parts.append(f"ETA {duration((self.images - self.done) / self.img_per_s)}")
        return "  ".join(parts)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
