"""The mathematics does not depend on the number of workers: shown in float64, where nothing hides.

In float32 a random network multiplies the last digit's noise from step to step; in float64 the same
code must agree to many digits, or it computes something else.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.loop import dataset, recipe

from model.data.dataset import collate
from model.data.sampler import StepSampler, plan_batch
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve
from model.training.config import Duration
from model.training.step import Schedule, Trainee

STEPS, IMAGES, BATCH = 6, 24, 8
# Its blocks have skips, so that stochastic depth takes part.
MODEL = ModelConfig(
    backbone="mobilenetv3_small_050",
    image_size_px=64,
    max_level=6,
    fpn_channels=16,
    fpn_repeats=1,
    head_layers=1,
    drop_path=0.3,
)


def _train(rank: int, world_size: int, group: int, folder: str) -> None:
    """Some steps in float64; rank 0 saves the curve and the final state."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = lambda self: self.double()  # type: ignore[method-assign,assignment]
    if world_size > 1:
        meet = f"file://{folder}/meet{world_size}{group}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    data = dataset(Path(folder) / "shapes", IMAGES)
    asked = recipe(batch_size=BATCH, bn_group=group, duration=Duration(steps=100))
    asked = replace(asked, network=resolve(MODEL, 6))
    plan = plan_batch(BATCH, group, world_size)
    torch.manual_seed(0)
    trainee = Trainee(Detector(asked.network), asked, plan, rank, torch.device("cpu"))
    trainee.anchors = trainee.anchors.double()
    schedule = Schedule.of(asked, IMAGES)
    shards = iter(StepSampler(plan=plan, rank=rank, num_images=IMAGES, seed=0, start=0, stop=STEPS))
    losses = []
    for step in range(STEPS):
        batches = [collate([data[key] for key in next(shards)]) for _ in trainee.shards]
        exact = [replace(b, boxes_xyxy=b.boxes_xyxy.double()) for b in batches]
        row = trainee.step(step, schedule, exact)
        if world_size > 1:
            dist.all_reduce(row)
        losses.append(float(row[0]))
    if rank == 0:
        kept = {k: v for k, v in trainee.detector.state_dict().items() if v.is_floating_point()}
        torch.save((losses, kept), f"{folder}/{world_size}-{group}.pt")
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("group", "what"), [(8, "synchronised over 2 workers"), (4, "one group on each worker")]
)
def test_two_workers_compute_what_one_does(tmp_path: Path, group: int, what: str) -> None:
    dataset(tmp_path / "shapes", IMAGES)
    found = {}
    for world_size in (1, 2):
        mp.spawn(_train, args=(world_size, group, str(tmp_path)), nprocs=world_size)
        found[world_size] = torch.load(tmp_path / f"{world_size}-{group}.pt")
    (one, state_one), (two, state_two) = found[1], found[2]
    assert one == pytest.approx(two, rel=1e-9), what
    assert len(set(one)) == STEPS
    for name, value in state_one.items():
        torch.testing.assert_close(state_two[name], value, rtol=1e-6, atol=1e-9, msg=name)
