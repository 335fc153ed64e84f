"""Two real ranks whose clocks disagree: they still ask Ray in the same steps, and decide alike."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.training.runtime import Decision, NoSink
from orchestrator.launch.mailbox import Requests
from orchestrator.launch.ray_runtime import SAVE_EVERY_S_ON_NOTICE, Notices, RayRuntime
from orchestrator.storage.checkpoints import CheckpointStore

pytestmark = pytest.mark.integration
STEPS, NOTICE_AT_S = 60, 20.0


class Ticking:
    """A clock that goes on by `pace` seconds whenever it is read."""

    def __init__(self, pace: float) -> None:
        self.pace, self.now = pace, 0.0

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


class Asked(Requests):
    """The driver asks to stop in the last step."""

    def __init__(self, decisions: list[Decision]) -> None:
        self.decisions, self.stop, self.hurry = decisions, False, False

    def look(self) -> None:
        self.stop = len(self.decisions) == STEPS - 1


def _decide(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    clock = Ticking(1.0 if rank == 0 else 0.37)
    asked_at: list[int] = []
    decisions: list[Decision] = []

    def ask() -> object | None:
        """As Ray's: nobody leaves before all have come."""
        dist.barrier()
        asked_at.append(len(decisions))
        box = [clock.now > NOTICE_AT_S]
        dist.broadcast_object_list(box, src=0)
        return object() if box[0] else None

    runtime = RayRuntime(
        rank=rank, world_size=2, device=torch.device("cpu"), store=None,
        sink=NoSink(), requests=Asked(decisions) if rank == 0 else None,
        notices=Notices(clock, ask),
    )  # fmt: skip
    while len(decisions) < STEPS:
        decisions.append(runtime.decide())
    torch.save(
        (asked_at, [(d.stop, d.save) for d in decisions], runtime.save_every_s),
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_ranks_look_for_notices_in_the_same_steps(tmp_path: Path) -> None:
    mp.spawn(_decide, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other
    asked_at, decisions, save_every_s = one
    assert len(asked_at) > 2
    assert [step for step, (_, save) in enumerate(decisions) if save] == asked_at[-1:]
    assert [step for step, (stop, _) in enumerate(decisions) if stop] == [STEPS - 1]
    assert save_every_s == SAVE_EVERY_S_ON_NOTICE


def test_a_checkpoint_is_due_by_rank_0s_clock(tmp_path: Path) -> None:
    from model.training.runtime import ProcessGroupRuntime
    from orchestrator.config.schema import CheckpointConfig
    from orchestrator.storage.filesystems import open_place

    now = 0.0
    store = CheckpointStore(open_place(str(tmp_path), "test"), CheckpointConfig(), say=print)

    def runtime(rank: int) -> ProcessGroupRuntime:
        return ProcessGroupRuntime(
            rank=rank, world_size=1, device=torch.device("cpu"), store=store,
            sink=NoSink(), save_every_s=60, clock=lambda: now,
        )  # fmt: skip

    first, second = runtime(0), runtime(1)
    assert first.decide() == Decision()
    now = 61.0
    assert first.decide() == Decision(save=True)
    assert second.decide() == Decision()
    first.save(7, {}, None)
    assert first.decide() == Decision()
