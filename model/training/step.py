"""One optimiser step over the global batch, on this worker.

Shape legend: B images of a shard, A anchors, K classes.
Order matters: targets of all shards are matched first, so that the positives of the whole global
batch are known before the first backward pass.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.data.dataset import Batch
from model.data.sampler import BatchPlan
from model.detection.anchors import make_anchors
from model.detection.loss import detection_loss
from model.detection.matching import match
from model.errors import DivergedError
from model.network.stochastic_depth import draw
from model.training.batch_norm import RunningStatistics, synchronise
from model.training.config import Recipe
from model.training.optim import Ema, build_optimizer, learning_rate

# Batch-norm statistics are averaged by RunningStatistics; newer torch renamed the switch.
_BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


@dataclass(frozen=True)
class Schedule:
    """Durations in steps."""

    steps_per_epoch: int
    total: int
    warmup: int
    evaluate_every: int
    checkpoint_every: int

    @classmethod
    def of(cls, recipe: Recipe, num_images: int) -> Schedule:
        per_epoch = max(1, num_images // recipe.train.batch_size)
        train, optim = recipe.train, recipe.optim
        total = train.duration.to_steps(per_epoch, "train.duration")
        return cls(
            per_epoch,
            total,
            min(optim.warmup.to_steps(per_epoch, "optim.warmup"), max(1, total - 1)),
            train.evaluate_every.to_steps(per_epoch, "train.evaluate_every"),
            train.checkpoint_every.to_steps(per_epoch, "train.checkpoint_every"),
        )


class Trainee:
    """The network with everything that one step changes: weights, momentum, average, statistics."""

    def __init__(
        self, detector: nn.Module, recipe: Recipe, plan: BatchPlan, rank: int, device: torch.device
    ) -> None:
        self.recipe, self.plan, self.device = recipe, plan, device
        self.autocast = use_bf16(recipe, device)
        self.layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        detector = detector.to(device=device, memory_format=self.layout)  # type: ignore[call-overload]
        average = copy.deepcopy(detector)  # before its batch norms hold process groups
        freeze(detector, recipe.freeze)
        self.detector = synchronise(detector, plan, rank, device)
        if recipe.train.compile:
            self.detector.compile()
        self.anchors = make_anchors(recipe.network).to(device)
        self.shards = plan.shards(rank)
        self.optimizer = build_optimizer(self.detector, recipe.optim)
        self.ema = Ema(average, self.detector, recipe.optim.ema_decay)
        self.statistics = RunningStatistics(
            self.detector, plan, recomputed=recipe.checkpoint_activations
        )
        self.lr_factor = 1.0
        self.forward: nn.Module = self.detector
        if plan.world_size > 1:
            off: dict[str, Any] = {_BUFFER_SYNC: False}
            self.forward = DistributedDataParallel(
                self.detector,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **off,
            )

    def step(
        self,
        step: int,
        schedule: Schedule,
        batches: Sequence[Batch],
        mark: Callable[[str], None] = lambda name: None,
    ) -> Tensor:
        """One update from this worker's shards of global step `step` (from 0).

        mark: called with the name of each part when it is done, for a stopwatch.

        Returns the step's log row, float32 on the device: this worker's part of the loss, class
        loss and box loss, then the global positives and gradient norm divided by the world size,
        so that rows of all workers add up.

        Raises:
            DivergedError: gradient not finite; on all ranks, before the update.
        """
        lr = self.set_learning_rate(step, schedule)
        targets = [match(self.anchors, b.boxes_xyxy, b.labels) for b in batches]
        positives = torch.stack([t.num_positives() for t in targets]).sum()
        if self.plan.world_size > 1:
            dist.all_reduce(positives)
        normaliser = positives + 1.0
        mark("match")

        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.begin_step()
        parts = torch.zeros(3, device=self.device)
        for index, (shard, batch, target) in enumerate(
            zip(self.shards, batches, targets, strict=True)
        ):
            seed = (self.recipe.train.seed, step, shard.group)
            draw(self.detector, seed=seed, group_size=self.plan.group_size, rows=shard.rows)
            with self._gradients_stay_local(unless=index == len(self.shards) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    images = batch.images.contiguous(memory_format=self.layout)
                    class_logits, box_codes = self.forward(images)
                mark("forward")
                self.statistics.end_forward()
                losses = detection_loss(
                    class_logits, box_codes, target, normaliser, self.recipe.loss
                )
                mark("loss")
                # DDP averages over workers, the loss is a sum over them.
                (losses.total * self.plan.world_size).backward()
                mark("backward")
            self.statistics.end_shard()
            parts += torch.stack([losses.total, losses.classes, losses.boxes]).detach()
        self.statistics.end_step()

        norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.recipe.optim.clip_norm)
        # Gradients are already reduced: every rank sees the same norm and decides alike.
        if not math.isfinite(float(norm)):
            raise DivergedError(step, float(parts[0]), float(norm), lr)
        mark("clip")
        self.optimizer.step()
        mark("optimizer")
        self.ema.update(step)
        mark("ema")
        shared = torch.stack([positives, norm.detach()]) / self.plan.world_size
        return torch.cat([parts, shared])

    def set_learning_rate(self, step: int, schedule: Schedule) -> float:
        lr = learning_rate(
            step,
            self.recipe.optim,
            batch_size=self.recipe.train.batch_size,
            warmup_steps=schedule.warmup,
            total_steps=schedule.total,
        )
        lr *= self.lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    @contextlib.contextmanager
    def _gradients_stay_local(self, *, unless: bool) -> Iterator[None]:
        if isinstance(self.forward, DistributedDataParallel) and not unless:
            with self.forward.no_sync():
                yield
        else:
            yield


def freeze(detector: nn.Module, parts: Sequence[str]) -> None:
    """Put all of `detector` into training mode but for `parts`: no gradient, fixed statistics."""
    detector.train()
    for name in parts:
        detector.get_submodule(name).eval().requires_grad_(False)


def use_bf16(recipe: Recipe, device: torch.device) -> bool:
    if recipe.train.precision == "auto":
        return device.type == "cuda"
    return recipe.train.precision == "bf16"
