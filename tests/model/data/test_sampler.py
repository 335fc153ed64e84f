from __future__ import annotations

import re
from collections import Counter

import pytest

from model.data.sampler import (
    BatchPlan,
    StepSampler,
    default_group_size,
    epoch_order,
    evaluation_share,
    plan_batch,
)
from model.errors import ConfigError


def steps_of(
    plan: BatchPlan, rank: int, *, images: int = 50, seed: int = 3, start: int = 0, stop: int = 9
) -> list[list[list[tuple[int, int]]]]:
    """For each step this rank's shards."""
    sampler = StepSampler(
        plan=plan, rank=rank, num_images=images, seed=seed, start=start, stop=stop
    )
    shards = list(sampler)
    assert len(shards) == len(sampler)
    number = len(plan.shards(rank))
    return [shards[i : i + number] for i in range(0, len(shards), number)]


def groups_of_step(plan: BatchPlan, step: int) -> list[list[tuple[int, int]]]:
    """The groups of one step put together from all ranks, each image in its place."""
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for rank in range(plan.world_size):
        for shard, batch in zip(plan.shards(rank), steps_of(plan, rank)[step], strict=True):
            assert len(batch) == shard.size
            for row, image in zip(range(shard.rows.start, shard.rows.stop), batch, strict=True):
                assert (shard.group, row) not in places, "two workers compute one image"
                places[(shard.group, row)] = image
    size = plan.group_size
    assert len(places) == plan.batch_size
    return [[places[(g, row)] for row in range(size)] for g in range(plan.num_groups)]


IMPOSSIBLE = {(12, 3, 8), (12, 12, 8), (8, 8, 3), (8, 8, 6)}  # batch, group, world


@pytest.mark.parametrize(("batch", "group"), [(12, 3), (12, 12), (12, 4), (8, 2), (8, 8)])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_world_size_decides_who_and_nothing_else(batch: int, group: int, world: int) -> None:
    """The same images in the same rows of the same groups; steps 4 and up lie in later epochs."""
    if (batch, group, world) in IMPOSSIBLE:
        with pytest.raises(ConfigError, match=f"divides over {world} workers"):
            plan_batch(batch, group, world)
        return
    plan, alone = plan_batch(batch, group, world), plan_batch(batch, group, 1)
    for step in range(9):
        assert groups_of_step(plan, step) == groups_of_step(alone, step)


@pytest.mark.parametrize("world", [1, 3])
def test_resuming_at_a_step_gives_the_tail(world: int) -> None:
    plan = plan_batch(12, 3, world)
    for rank in range(world):
        whole = steps_of(plan, rank)
        for start in range(9):
            assert steps_of(plan, rank, start=start) == whole[start:]


def test_an_epoch_shows_each_image_at_most_once_and_leaves_others_out_each_time() -> None:
    plan = plan_batch(12, 4, 1)
    seen = [
        [
            image
            for step in range(e * 4, e * 4 + 4)
            for group in groups_of_step(plan, step)
            for image in group
        ]
        for e in range(2)
    ]
    for epoch, images in enumerate(seen):
        assert {e for e, _ in images} == {epoch}
        assert set(Counter(images).values()) == {1}
        assert len(images) == 48
    missed = [set(range(50)) - {image for _, image in images} for images in seen]
    assert missed[0] != missed[1]


def test_orders_differ_by_seed_and_epoch_and_stay_the_same_for_ever() -> None:
    orders = {tuple(epoch_order(seed, epoch, 30).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    golden = [1, 6, 5, 3, 0, 4, 7, 2]
    assert epoch_order(0, 0, 8).tolist() == golden, "else a checkpoint would resume other images"


def test_whole_groups_go_to_single_workers() -> None:
    plan = plan_batch(16, 4, 2)
    assert plan.team == 1
    assert [shard.group for shard in plan.shards(0)] == [0, 2]
    assert [shard.group for shard in plan.shards(1)] == [1, 3]
    assert plan.images_at_once() == 4


def test_teams_share_a_group_larger_than_a_workers_share() -> None:
    plan = plan_batch(16, 8, 4)
    assert plan.team == 2
    shards = [plan.shards(rank) for rank in range(4)]
    assert [(s.group, s.rows) for rank in shards for s in rank] == [
        (0, slice(0, 4)),
        (0, slice(4, 8)),
        (1, slice(0, 4)),
        (1, slice(4, 8)),
    ]
    assert "synchronised over 2 workers" in plan.describe()


def test_teams_for_devices_that_hold_little() -> None:
    assert plan_batch(16, 8, 2).team == 1
    plan = plan_batch(16, 8, 2, max_images_at_once=4)
    assert (plan.team, plan.images_at_once()) == (2, 4)
    assert "2 rounds a step" in plan.describe()
    with pytest.raises(ConfigError, match="at most 3 at once"):
        plan_batch(16, 8, 2, max_images_at_once=3)


def test_an_uneven_world_gets_uneven_work() -> None:
    plan = plan_batch(16, 4, 3)
    assert [[shard.group for shard in plan.shards(rank)] for rank in range(3)] == [[0, 3], [1], [2]]


def attempt(batch: int, world: int) -> BatchPlan | ConfigError:
    try:
        return plan_batch(batch, default_group_size(batch, "0"), world)
    except ConfigError as error:
        return error


@pytest.mark.parametrize("world", range(1, 17))
@pytest.mark.parametrize("batch", [7, 8, 10, 16, 30, 64])
def test_every_rank_works_or_the_error_names_batches_that_do(batch: int, world: int) -> None:
    plan = attempt(batch, world)
    if isinstance(plan, ConfigError):
        assert plan.where == "train.batch_size"
        batches, groups = (
            [int(size) for size in re.findall(r"\d+", part.partition(",")[0])]
            for part in (
                plan.remedy.partition("train.batch_size ")[2],
                plan.remedy.partition("train.bn_group ")[2],
            )
        )
        assert batches
        assert all(plan_batch(size, default_group_size(batch, "0"), world) for size in batches)
        assert all(plan_batch(batch, size, world) for size in groups)
        return
    assert all(plan.shards(rank) for rank in range(world))
    work = Counter(shard.group for rank in range(world) for shard in plan.shards(rank))
    assert set(work) == set(range(plan.num_groups))
    assert set(work.values()) == {plan.team}


def test_a_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"choose one of \[1, 2, 3, 4, 6, 12\]") as caught:
        plan_batch(12, 5, 1)
    assert caught.value.where == "train.bn_group"


def test_more_images_a_step_than_there_are() -> None:
    with pytest.raises(ConfigError, match="at most the 10 training images, got 12"):
        steps_of(plan_batch(12, 4, 1), 0, images=10)


@pytest.mark.parametrize(
    ("batch", "phi", "size"),
    [(64, "0", 16), (12, "2", 12), (64, "4", 8), (64, "7x", 4), (7, "6", 1)],
)
def test_default_group_size(batch: int, phi: str, size: int) -> None:
    assert default_group_size(batch, phi) == size


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [0, 1, 5, 20, 21])
def test_evaluation_share_is_an_exact_partition(images: int, world: int) -> None:
    shares = [list(evaluation_share(images, rank, world)) for rank in range(world)]
    assert sorted(image for share in shares for image in share) == list(range(images))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
