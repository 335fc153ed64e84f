"""The one seam: all that the training loop knows of the world around it.

Two implementations keep the same contract: `LocalRuntime` here (plain python and torchrun) and
`orchestrator.launch.ray_runtime.RayRuntime`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from model.training.evaluation import Evaluation
from model.training.watchdog import Watchdog


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step. stop: why to end, if to end; save: a checkpoint is due."""

    stop: str | None = None
    save: bool = False


class Runtime(Protocol):
    """rank, world_size, device: this worker's place. Collective methods are called by all ranks."""

    rank: int
    world_size: int
    device: torch.device

    def restore(self) -> AbstractContextManager[Path | None]:
        """The newest committed checkpoint as a local folder, None for a fresh start. Collective."""
        ...

    def arrive(self, step: int, phase: str) -> None:
        """This rank begins a phase (`watchdog.PHASES`) of step `step`; costs nothing."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a global step. Called on rank 0; never blocks, never raises."""
        ...

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Hand over what an evaluation found, for figures. Called on rank 0; never blocks, never raises."""
        ...

    def save(
        self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None] | None
    ) -> None:
        """Commit a checkpoint, now or soon; `write` is None but on rank 0, where it fills an empty
        folder with what it has copied. Called on all ranks.
        """
        ...

    def decide(self) -> Decision:
        """After each step. Collective: the same on all ranks."""
        ...


class CheckpointStore(Protocol):
    """What a runtime needs of the place where checkpoints live."""

    def newest_valid(self) -> int | None: ...

    def open(self, step: int) -> AbstractContextManager[Path]: ...

    def save(
        self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None]
    ) -> None: ...

    def figures(self) -> dict[str, float]:
        """Metrics of what it did since it was last asked."""
        ...


class Sink(Protocol):
    """Where rank 0's records go; neither call blocks or raises."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def show(self, step: int, evaluation: Evaluation) -> None: ...


class NoSink:
    """Of ranks that record nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        return None

    def show(self, step: int, evaluation: Evaluation) -> None:
        return None


class ProcessGroupRuntime:
    """What both runtimes share: ranks of one torch process group, one store, one sink of metrics.

    store: None keeps no checkpoints. sink: used on rank 0.
    save_every_s: the most that may be lost: a checkpoint is due when the last one is that old.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        store: CheckpointStore | None,
        sink: Sink,
        save_every_s: float | None = None,
        watchdog: Watchdog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.watchdog = watchdog
        self.rank, self.world_size, self.device = rank, world_size, device
        self.store, self.sink = store, sink
        self.save_every_s, self.clock = save_every_s, clock
        self.saved_at = clock()

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

    def arrive(self, step: int, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.arrive(step, phase)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = self.store.figures() if self.store is not None else {}
        self.sink.log(step, {**metrics, **figures})

    def show(self, step: int, evaluation: Evaluation) -> None:
        self.sink.show(step, evaluation)

    def save(
        self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None] | None
    ) -> None:
        self.saved_at = self.clock()
        if self.store is not None and write is not None:
            self.store.save(step, metrics, write)

    def decide(self) -> Decision:
        stop, save = agree([self.stop_code(), self.save_due()], self.device)
        return Decision(self.stop_reason(stop), bool(save))

    def stop_code(self) -> int:
        """What this rank was told; the largest of all ranks' codes counts, 0 goes on."""
        return 0

    def stop_reason(self, code: int) -> str | None:
        return str(code) if code else None

    def save_due(self) -> int:
        """Clocks differ: rank 0's counts."""
        if self.rank != 0 or self.save_every_s is None or self.store is None:
            return 0
        return int(self.clock() - self.saved_at >= self.save_every_s)


class LocalRuntime(ProcessGroupRuntime):
    """Plain python, or one process of torchrun. SIGTERM and SIGINT ask for a stop with a save."""

    def __init__(
        self,
        *,
        store: CheckpointStore | None,
        sink: Sink,
        device: torch.device | None = None,
        threads: int | None = None,
        save_every_s: float | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), threads)
        super().__init__(
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            device=device or local_device(local_rank),
            store=store,
            sink=sink,
            save_every_s=save_every_s,
            watchdog=watchdog,
        )
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def stop_code(self) -> int:
        return self._signal

    def stop_reason(self, code: int) -> str | None:
        return signal.Signals(code).name if code else None

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


def agree(flags: Sequence[int], device: torch.device) -> list[int]:
    """Flag by flag the largest of all ranks', in one exchange."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [*flags]
    values = torch.tensor(flags, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [int(value) for value in values.tolist()]


def broadcast(value: int, device: torch.device) -> int:
    """Rank 0's value on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)
