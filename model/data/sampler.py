"""Which images each worker computes in each step: a function of its arguments, without state.

A step's global batch is the next slice of the epoch's permutation; it is cut into batch-norm
groups, and the groups are dealt to workers. So the world size decides who computes an image and
nothing else, and a run resumes in the middle of an epoch by naming the step.

Shape legend: B images a step, g images a group, N workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The images `rows` of group `group` of a step's batch: one forward pass of one worker."""

    group: int
    rows: slice

    @property
    def size(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread. `team` consecutive workers share each of their groups.

    team 1: a worker runs whole groups one after another, no batch-norm traffic.
    team s: a group is larger than what one worker takes; its statistics are synchronised.
    """

    batch_size: int
    group_size: int
    world_size: int
    team: int

    @property
    def num_groups(self) -> int:
        return self.batch_size // self.group_size

    def shards(self, rank: int) -> list[Shard]:
        """In the order they are run; every rank has at least one."""
        teams = self.world_size // self.team
        part = self.group_size // self.team
        member = rank % self.team
        return [
            Shard(group, slice(member * part, (member + 1) * part))
            for group in range(rank // self.team, self.num_groups, teams)
        ]

    def images_at_once(self) -> int:
        return self.group_size // self.team

    def describe(self) -> str:
        rounds = -(-self.num_groups * self.team // self.world_size)
        text = f"{self.num_groups} group(s) of {self.group_size} over {self.world_size} worker(s)"
        text += f", {self.images_at_once()} images at once"
        if rounds > 1:
            text += f", {rounds} rounds a step"
        if self.team > 1:
            text += f", batch norm synchronised over {self.team} workers"
        return text


def default_group_size(batch_size: int, phi: str) -> int:
    """Images normalised together where the config says auto: by network size, never world size."""
    limit = {"0": 16, "1": 16, "2": 16, "3": 8, "4": 8}.get(phi, 4)
    return max(size for size in range(1, limit + 1) if batch_size % size == 0)


def plan_batch(
    batch_size: int, group_size: int, world_size: int, max_images_at_once: int | None = None
) -> BatchPlan:
    """Smallest teams that fit.

    Raises:
        ConfigError: the batch cannot be spread over so many workers.
    """
    if batch_size < 1 or batch_size % group_size:
        divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
        raise ConfigError(
            "train.bn_group",
            f"a divisor of train.batch_size {batch_size}",
            str(group_size),
            f"choose one of {divisors}",
        )
    plan = _plan(batch_size, group_size, world_size, max_images_at_once)
    if plan is not None:
        return plan
    limit = f", at most {max_images_at_once} at once" if max_images_at_once else ""
    raise ConfigError(
        "train.batch_size",
        f"a batch that divides over {world_size} workers in groups of {group_size}{limit}",
        str(batch_size),
        _batch_remedy(batch_size, group_size, world_size, max_images_at_once),
    )


def _plan(
    batch_size: int, group_size: int, world_size: int, max_images_at_once: int | None
) -> BatchPlan | None:
    groups = batch_size // group_size
    for team in range(1, world_size + 1):
        if world_size % team or group_size % team:
            continue
        fits = max_images_at_once is None or group_size // team <= max_images_at_once
        if groups >= world_size // team and fits:
            return BatchPlan(batch_size, group_size, world_size, team)
    return None


def _batch_remedy(
    batch_size: int, group_size: int, world_size: int, max_images_at_once: int | None
) -> str:
    """The nearest batches with the same groups, and groups with the same batch, that do work."""

    def works(batch: int, group: int) -> bool:
        return _plan(batch, group, world_size, max_images_at_once) is not None

    batches = [
        batch
        for batch in range(group_size, batch_size + group_size * world_size + 1, group_size)
        if works(batch, group_size)
    ]
    below = [batch for batch in batches if batch < batch_size][-1:]
    above = [batch for batch in batches if batch > batch_size][:1]
    sizes = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    groups = [size for size in sizes if works(batch_size, size)][:3]
    remedies = []
    if below or above:
        remedies.append(f"train.batch_size {' or '.join(map(str, below + above))}")
    if groups:
        remedies.append(f"train.bn_group {' or '.join(map(str, groups))}")
    return f"use {', '.join([*remedies, 'or another number of workers'])}"


def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """The permutation of one epoch."""
    return np.random.default_rng((seed, epoch, num_images)).permutation(num_images)


class StepSampler:
    """Yields one list of (epoch, image) for each shard of each step from `start` to `stop`.

    One DataLoader lives for the whole run: no epoch boundary ever drains or restarts its workers.
    The last images of an epoch that do not fill a batch are left out; each epoch leaves others.
    """

    def __init__(
        self, *, plan: BatchPlan, rank: int, num_images: int, seed: int, start: int, stop: int
    ) -> None:
        if num_images < plan.batch_size:
            raise ConfigError(
                "train.batch_size",
                f"at most the {num_images} training images",
                str(plan.batch_size),
                "lower it or add images",
            )
        self.plan, self.rank, self.num_images, self.seed = plan, rank, num_images, seed
        self.start, self.stop = start, stop
        self.steps_per_epoch = num_images // plan.batch_size

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.plan.shards(self.rank))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shards = self.plan.shards(self.rank)
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start, self.stop):
            epoch, index = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.seed, epoch, self.num_images), epoch
            begin = index * self.plan.batch_size
            batch = order[begin : begin + self.plan.batch_size]
            for shard in shards:
                first = shard.group * self.plan.group_size
                group = batch[first : first + self.plan.group_size]
                yield [(epoch, int(image)) for image in group[shard.rows]]


def evaluation_share(num_images: int, rank: int, world_size: int) -> range:
    """Exact partition: each image belongs to one rank, nothing is padded or repeated."""
    return range(rank, num_images, world_size)
