"""The actor of a fleet. The driver imports this too, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class FleetWorker:
    """Actor: loads once, then answers one task after another."""

    def __init__(self) -> None:
        self.answer: Callable[[Any], Any] | None = None

    def load(self, make: Callable[[], Callable[[Any], Any]], threads: int) -> str:
        """Before the first task; the node it is on. Raises what `make` raises."""
        import ray
        import torch

        torch.set_num_threads(threads)
        self.answer = make()
        return str(ray.get_runtime_context().get_node_id())

    def work(self, task: Any) -> Any:
        """Raises what answering raises."""
        assert self.answer is not None, "load comes first"
        return self.answer(task)
