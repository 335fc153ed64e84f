"""The one seam: all that the training loop knows of the world around it.

Two implementations keep the same contract: `LocalRuntime` here (plain python and torchrun) and
`orchestrator.launch.ray_runtime.RayRuntime`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist


class Runtime(Protocol):
    """rank, world_size, device: this worker's place. Collective methods are called by all ranks."""

    rank: int
    world_size: int
    device: torch.device

    def restore(self) -> AbstractContextManager[Path | None]:
        """The newest committed checkpoint as a local folder, None for a fresh start. Collective."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a global step. Called on rank 0; never blocks, never raises."""
        ...

    def save(
        self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None] | None
    ) -> None:
        """Commit a checkpoint, now or soon; `write` is None but on rank 0, where it fills an empty
        folder with what it has copied. Called on all ranks.
        """
        ...

    def stop_reason(self) -> str | None:
        """Why all ranks should stop after this step, or None. Collective, the same on all ranks."""
        ...


class CheckpointStore(Protocol):
    """What a runtime needs of the place where checkpoints live."""

    def newest_valid(self) -> int | None: ...

    def open(self, step: int) -> AbstractContextManager[Path]: ...

    def save(
        self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None]
    ) -> None: ...


class ProcessGroupRuntime:
    """What both runtimes share: ranks of one torch process group, one store, one sink of metrics.

    store: None keeps no checkpoints. sink: called on rank 0 with (step, metrics).
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        store: CheckpointStore | None,
        sink: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.store, self.sink = store, sink

    @contextmanager
    def restore(self) -> Iterator[Path | None]:
        # Rank 0 chooses: a checkpoint that is committed meanwhile must not split the ranks.
        step = self.store.newest_valid() if self.store is not None and self.rank == 0 else None
        chosen = broadcast(-1 if step is None else step, self.device)
        if chosen < 0 or self.store is None:
            yield None
            return
        with self.store.open(chosen) as folder:
            yield folder

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.sink(step, metrics)

    def save(
        self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None] | None
    ) -> None:
        if self.store is not None and write is not None:
            self.store.save(step, metrics, write)

    def stop_reason(self) -> str | None:
        return None


class LocalRuntime(ProcessGroupRuntime):
    """Plain python, or one process of torchrun. SIGTERM and SIGINT ask for a stop with a save."""

    def __init__(
        self,
        *,
        store: CheckpointStore | None,
        sink: Callable[[int, Mapping[str, float]], None],
        device: torch.device | None = None,
        threads: int | None = None,
    ) -> None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), threads)
        super().__init__(
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            device=device or local_device(local_rank),
            store=store,
            sink=sink,
        )
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def stop_reason(self) -> str | None:
        number = agree(self._signal, self.device)
        return signal.Signals(number).name if number else None

    def _remember(self, number: int, frame: object) -> None:
        if self._signal:  # the second time means now
            raise KeyboardInterrupt
        self._signal = number


def join_torchrun(device: torch.device | None = None) -> None:
    """Join the process group that torchrun's environment describes; nothing without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
        if cuda:
            torch.cuda.set_device(local_device(int(os.environ.get("LOCAL_RANK", "0"))))
        dist.init_process_group("nccl" if cuda else "gloo")


def local_device(local_rank: int) -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def set_threads(workers_on_node: int, threads: int | None = None) -> int:
    """`threads`, or the node's cores shared between its workers, alike under every launcher.

    The number of threads decides how sums are split, so bit-equal curves need it to be equal.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // workers_on_node)
    torch.set_num_threads(threads)
    return threads


def agree(flag: int, device: torch.device) -> int:
    """The largest of all ranks' flags."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    value = torch.tensor(flag, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def broadcast(value: int, device: torch.device) -> int:
    """Rank 0's value on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)
