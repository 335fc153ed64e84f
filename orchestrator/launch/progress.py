"""The live progress line and the tables around it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from model.training.step import Schedule

PLAIN_INTERVAL_S = 5.0
Row = tuple[str, str]


class Progress:
    """A line that changes in place on a terminal; a plain line now and then elsewhere."""

    def __init__(
        self, *, total_steps: int, steps_per_epoch: int, metric: str, stream: TextIO | None = None
    ) -> None:
        self.total_steps, self.steps_per_epoch, self.metric = total_steps, steps_per_epoch, metric
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self.live: Live | None = None
        self.step = 0
        self.latest: dict[str, float] = {}
        self._step_s: float | None = None
        self._printed_at = 0.0
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    @classmethod
    def of(cls, schedule: Schedule, metric: str, stream: TextIO) -> Self:
        return cls(
            total_steps=schedule.total, steps_per_epoch=schedule.steps_per_epoch,
            metric=metric, stream=stream,
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "train/rolled_back" in metrics:
            self.say(
                f"the loss was not finite: back to the checkpoint of step {step}, "
                "on at half the learning rate"
            )
        if "data/damaged_images" in metrics:
            number = metrics["data/damaged_images"]
            self.say(f"{number:.0f} unreadable image(s) replaced before step {step}")
        self.step = step
        self.latest.update(metrics)
        if "perf/step_s" in metrics:
            new = metrics["perf/step_s"]
            self._step_s = new if self._step_s is None else 0.7 * self._step_s + 0.3 * new
        scored = self.metric in metrics
        if self.live is not None:
            self.live.update(Text(self.line()))
            if scored:
                self.console.print(self.line())
        elif scored or step == self.total_steps or time.monotonic() - self._printed_at > PLAIN_INTERVAL_S:  # fmt: skip
            self._printed_at = time.monotonic()
            self.console.print(self.line())

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def line(self) -> str:
        """step, epoch, loss, AP, images a second, time left, memory; what is unknown is left out."""
        parts = [
            f"step {self.step}/{self.total_steps}",
            f"epoch {self.step / self.steps_per_epoch:.1f}",
        ]
        for label, key, form in (
            ("loss", "train/loss", ".3f"),
            ("AP", "val/AP", ".3f"),
            ("AP50", "val/AP50", ".3f"),
            ("img/s", "perf/img_per_s", ".1f"),
            ("lr", "train/lr", ".4f"),
        ):
            if key in self.latest:
                parts.append(f"{label} {self.latest[key]:{form}}")
        if self._step_s is not None and self.step < self.total_steps:
            parts.append(f"ETA {duration((self.total_steps - self.step) * self._step_s)}")
        if "perf/memory_gib" in self.latest:
            parts.append(f"mem {self.latest['perf/memory_gib']:.1f} GiB")
        return "  ".join(parts)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def duration(seconds: float) -> str:
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def print_table(title: str, rows: Sequence[Row], stream: TextIO | None = None) -> None:
    """Two columns; the first is a name, the second wraps."""
    console = Console(file=stream or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table(title=title, title_justify="left", show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)
