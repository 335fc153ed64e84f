"""The actor of a fleet. It is a process of its own, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FleetWorker:
    """Actor: loads once, then answers one task after another."""

    def __init__(self) -> None:
        self.answer: Callable[[Any], Any] | None = None

    def load(self, make: Callable[[], Callable[[Any], Any]], threads: int) -> None:
        """Before the first task. Raises what `make` raises."""
        torch.set_num_threads(threads)
        self.answer = make()

    def work(self, task: Any) -> Any:
        """Raises what answering raises."""
        assert self.answer is not None, "load comes first"
        return self.answer(task)
