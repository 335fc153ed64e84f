"""Without Ray: this process alone, or the processes of torchrun, of which rank 0 decides."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from model.training.runtime import LocalRuntime, NoSink, ProcessGroupRuntime, join_torchrun
from orchestrator.launch.recorder import Board, NodeRecorder, Recorder
from orchestrator.launch.worker import Assignment, open_store, open_watchdog, train
from orchestrator.storage.background import BackgroundStore


@dataclass(frozen=True)
class Order:
    """What rank 0 tells the others to do."""

    assignment: Assignment
    use_gpu: bool

    @property
    def device(self) -> torch.device | None:
        return _device(self.use_gpu)

    @property
    def threads(self) -> int | None:
        return self.assignment.resolved.job.launch.threads_per_worker


class Silence:
    """The board of ranks that show nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        return None

    def say(self, text: str) -> None:
        return None


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Leader:
    """Rank 0, from before the first thing that can fail: the others must never wait in vain."""

    def __init__(self, *, use_gpu: bool) -> None:
        self._told = world_size() == 1
        join_torchrun(_device(use_gpu))

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._told:
            self._tell(None)
        _leave()

    def lead(self, order: Order, board: Board) -> dict[str, Any]:
        """Rank 0's part of the training, after the others were told of theirs."""
        if not self._told:
            self._tell(order)

        def runtime(store: BackgroundStore, sink: Recorder) -> ProcessGroupRuntime:
            return LocalRuntime(
                store=store,
                sink=sink,
                device=order.device,
                threads=order.threads,
                save_every_s=order.assignment.save_every_s,
                watchdog=open_watchdog(order.assignment, 0, world_size(), board.say),
            )

        return lead(order.assignment, board, runtime)

    def _tell(self, order: Order | None) -> None:
        self._told = True
        dist.broadcast_object_list([order], src=0)


def lead(
    assignment: Assignment,
    board: Board,
    make: Callable[[BackgroundStore, Recorder], ProcessGroupRuntime],
) -> dict[str, Any]:
    """Rank 0's part in this process."""
    recorder = Recorder(assignment, board)
    store = BackgroundStore(open_store(assignment, board.say, recorder))
    try:
        runtime = make(store, recorder)
        recorder.begin(runtime.device, runtime.world_size)
        return train(assignment, runtime, store)
    finally:
        recorder.close()


def follow(*, use_gpu: bool) -> int:
    """The other ranks' part; their exit code."""
    join_torchrun(_device(use_gpu))
    box: list[Order | None] = [None]
    dist.broadcast_object_list(box, src=0)
    order, result = box[0], {}
    if order is not None:
        board = Silence()
        load = None
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # of another node than rank 0's
            node = int(os.environ.get("GROUP_RANK", "1"))
            load = NodeRecorder(order.assignment, board, node)
        store = BackgroundStore(open_store(order.assignment, board.say))
        runtime = LocalRuntime(
            store=store,
            sink=NoSink(),
            device=order.device,
            threads=order.threads,
            watchdog=open_watchdog(order.assignment, rank(), world_size(), _to_stderr),
        )
        try:
            result = train(order.assignment, runtime, store)
        finally:
            if load is not None:
                load.close()
    _leave()
    return 1 if "diverged" in result else 0


def _device(use_gpu: bool) -> torch.device | None:
    return None if use_gpu else torch.device("cpu")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
