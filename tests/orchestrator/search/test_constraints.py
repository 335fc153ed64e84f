"""Limits against enumeration with the closed forms, and what a user reads of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.network.footprint import GIB, activations, network_cost
from model.network.scaling import ModelConfig, NetworkSpec, resolve
from orchestrator.config.codec import decode
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.search import constraints
from orchestrator.search.constraints import (
    NO_NETWORK,
    Band,
    Budget,
    ConstraintsConfig,
    Latency,
    Sieve,
    check_constraints,
    draw,
)
from orchestrator.search.sample import apply, arm_key
from orchestrator.search.space import Space, read_space

CLASSES = 80
SPACE = {
    "model.scaling.width": {"choice": [1.2, 1.25, 1.3, 1.35, 1.4, 1.45]},
    "model.scaling.depth": {"choice": [-1, 0, 1]},
    "model.scaling.resolution": {"quniform": [384, 576, 64]},
    "model.fusion": {"choice": ["fast", "sum"]},
}
LIMITS = ConstraintsConfig(max_params_m=6.6, gmacs=Band(target=6.0, tolerance=0.1))
TINY = ModelConfig(
    backbone="test_efficientnet", image_size_px=128, fpn_channels=16, fpn_repeats=1, head_layers=1
)


@pytest.fixture
def small() -> Space:
    return read_space(SPACE)


def by_hand(base: TrainJob, sample: dict[str, Any]) -> str | None:
    """The first limit that a sample breaks."""
    try:
        cost = network_cost(resolve(apply(base, sample).model, CLASSES))
    except ConfigError:
        return NO_NETWORK
    if cost.params > 6_600_000:
        return "model/params_m"
    return None if 5.4 <= cost.gmacs <= 6.6 else "model/gmacs"


def test_grid_keeps_what_the_closed_forms_allow_and_counts_the_rest(
    small: Space, base: TrainJob
) -> None:
    sieve = Sieve(base, Budget(LIMITS, CLASSES))
    found = draw(small, sieve, grid=True, seed=0, num=None)
    expected = [sample for sample in small.grid() if by_hand(base, sample) is None]
    assert found == expected
    assert 0 < len(found) < (small.size() or 0) == sieve.tried
    reasons = [by_hand(base, sample) for sample in small.grid()]
    for reason in (NO_NETWORK, "model/params_m", "model/gmacs"):
        assert sieve.rejected[reason] == reasons.count(reason) > 0
    assert sieve.describe().startswith(f"{sieve.tried - len(found)} of {sieve.tried} samples rejected")  # fmt: skip


def test_random_draws_are_feasible_distinct_and_repeatable(small: Space, base: TrainJob) -> None:
    def drawn(seed: int) -> list[dict[str, Any]]:
        return draw(small, Sieve(base, Budget(LIMITS, CLASSES)), grid=False, seed=seed, num=8)

    assert all(by_hand(base, sample) is None for sample in drawn(1))
    assert len({arm_key(apply(base, sample)) for sample in drawn(1)}) == 8
    assert drawn(1) == drawn(1) != drawn(2)


def test_random_draws_of_a_whole_finite_space_are_its_grid(small: Space, base: TrainJob) -> None:
    feasible = [sample for sample in small.grid() if by_hand(base, sample) is None]
    budget = Budget(LIMITS, CLASSES)
    found = draw(small, Sieve(base, budget), grid=False, seed=3, num=len(feasible))
    assert sorted(map(str, found)) == sorted(map(str, feasible))
    with pytest.raises(ConfigError, match=f"trials.num: expected at most the {len(feasible)} points"):  # fmt: skip
        draw(small, Sieve(base, budget), grid=False, seed=3, num=len(feasible) + 1)


def test_a_range_too_narrow_for_its_digits_ends(
    base: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "MOST_REPEATS", 500)
    space = read_space({"optim.lr_per_64": {"uniform": [0.1, 0.100002]}})
    with pytest.raises(ConfigError, match=r"trials\.num: expected at most the 3 points"):
        draw(space, Sieve(base, Budget(ConstraintsConfig(), CLASSES)), grid=False, seed=0, num=9)


def test_done_arms_are_passed_over_and_known_points_come_first(
    small: Space, base: TrainJob
) -> None:
    budget = Budget(LIMITS, CLASSES)
    first = draw(small, Sieve(base, budget), grid=False, seed=1, num=8)
    done = [arm_key(apply(base, sample)) for sample in first]
    more = draw(small, Sieve(base, budget, done), grid=False, seed=1, num=4)
    assert first + more == draw(small, Sieve(base, budget), grid=False, seed=1, num=12)
    for point in (more[-1], first[3]):
        led = draw(small, Sieve(base, budget), grid=False, seed=1, num=8, points=[point, point])
        assert led == [point, *(sample for sample in first if sample != point)][:8]


def test_a_known_point_over_budget_is_refused(small: Space, base: TrainJob) -> None:
    bad = next(s for s in small.grid() if by_hand(base, s) == "model/gmacs")
    with pytest.raises(ConfigError, match=r"search.points: .*model/gmacs"):
        draw(small, Sieve(base, Budget(LIMITS, CLASSES)), grid=True, seed=0, num=None, points=[bad])


def test_rejection_says_the_limit_and_the_numbers(base: TrainJob) -> None:
    budget = Budget(ConstraintsConfig(max_params_m=4, gmacs=Band(max=3)), CLASSES)
    params, gmacs = budget.rejections(base)
    assert str(params) == "model/params_m 6.618 (at most 4)"
    assert params.excess == pytest.approx(6.618 / 4 - 1, abs=1e-3)
    assert str(gmacs).startswith("model/gmacs 5.936")
    assert str(Budget(ConstraintsConfig(gmacs=Band(min=7)), CLASSES).rejections(base)[0]).endswith(
        "(at least 7)"
    )
    (none,) = budget.rejections(apply(base, {"model.image_size_px": 600}))
    assert none.reason == NO_NETWORK
    assert "a multiple of 128" in str(none)


def test_a_hopeless_space_ends_with_the_closest_miss(base: TrainJob) -> None:
    space = read_space({"model.scaling.width": {"uniform": [1.2, 1.45]}, **LEARNING_RATE})
    sieve = Sieve(base, Budget(ConstraintsConfig(gmacs=Band(max=5)), CLASSES))
    with pytest.raises(ConfigError) as caught:
        draw(space, sieve, grid=False, seed=0, num=4)
    text = str(caught.value)
    assert text.startswith("constraints: expected at least 0.1% of samples feasible, got 0 of 5000")
    closest, _ = sieve.closest or ({}, ())
    width = round(64 * closest["model.scaling.width"] / 8) * 8  # the narrowest there is
    assert width == 80 - 80 % 8
    assert "closest miss: model.scaling.width 1.2" in text
    assert "model/gmacs 5." in text
    assert "(at most 5)" in text
    assert "\n" not in text


LEARNING_RATE = {"optim.lr_per_64": {"loguniform": [0.02, 0.2]}}


def test_few_feasible_samples_are_found_above_the_least_share(base: TrainJob) -> None:
    """1.3 % of widths round to 88 from below 1.32: rare is not hopeless."""
    space = read_space({"model.scaling.width": {"uniform": [1.2, 8.0]}, **LEARNING_RATE})
    sieve = Sieve(base, Budget(ConstraintsConfig(gmacs=Band(max=5.8)), CLASSES))
    found = draw(space, sieve, grid=False, seed=0, num=5)
    assert len(found) == sieve.accepted == 5
    assert sieve.tried > 100


def test_activations_are_those_of_one_image_at_the_jobs_precision() -> None:
    job = TrainJob(model=TINY)
    gib = activations(resolve(TINY, 3)).total(recompute=False) / GIB
    for changes, half, share in (
        ({}, False, 1.0),
        ({}, True, 0.5),
        ({"train.precision": "bf16"}, False, 0.5),
        ({"train.precision": "fp32"}, True, 1.0),
    ):
        limit = ConstraintsConfig(max_activation_gib=gib * share * 0.99)
        (found,) = Budget(limit, 3, half_precision=half).rejections(apply(job, changes))
        assert found.reason == "model/activation_gib"
        assert found.excess == pytest.approx(0.01, abs=0.005)
    enough = ConstraintsConfig(max_activation_gib=gib * 0.99)
    recompute = apply(job, {"train.checkpoint_activations": "yes"})
    assert Budget(enough, 3).rejections(recompute) == ()


def test_dear_limits_are_looked_at_only_where_cheap_ones_hold() -> None:
    measured: list[NetworkSpec] = []

    def latency(spec: NetworkSpec) -> float:
        measured.append(spec)
        return 12.0

    limits = ConstraintsConfig(max_params_m=1, max_latency_ms=10)
    budget = Budget(limits, 3, latency=latency)
    (found,) = budget.rejections(TrainJob(model=TINY))
    assert str(found) == "model/latency_ms 12 (at most 10)"
    assert budget.rejections(TrainJob())[0].reason == "model/params_m"
    assert measured == [resolve(TINY, 3)]


def test_latency_is_measured_once_a_network() -> None:
    latency = Latency(torch.device("cpu"), rounds=3)
    first = latency(resolve(TINY, 3))
    assert first > 0
    assert latency(resolve(TINY, 3)) == first
    assert len(latency._known) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_params_m": 0}, r"constraints\.max_params_m: expected a positive number, got 0"),
        ({"gmacs": {"min": 3, "max": 2}}, "min <= max, got 3 and 2"),
        ({"gmacs": {"target": 3, "max": 2}}, "min and max, or target and tolerance, got both"),
        ({"gmacs": {"target": -1}}, r"gmacs\.target"),
        ({"gmacs": {"target": 3, "tolerance": 10}}, "a share of the target"),
        ({"gmacs": {"targte": 3}}, "did you mean 'target'"),
        ({"max_parms_m": 3}, "did you mean 'max_params_m'"),
    ],
)
def test_limits_that_nothing_can_satisfy_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_constraints(decode(ConstraintsConfig, given, "constraints"), "constraints")
