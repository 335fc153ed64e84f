from __future__ import annotations

from collections.abc import Mapping

import pytest

from orchestrator.launch.usage import HOURS, Usage, describe_usage


class Clock:
    """Seconds, set by the test."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_hours_of_workers_over_restarts_and_what_they_cost() -> None:
    clock, kept = Clock(), list[tuple[Mapping[str, float], Mapping[str, str]]]()
    usage = Usage(
        lambda metrics, tags: kept.append((metrics, tags)), gpus_per_worker=0.5, price=3.0,
        clock=clock,
    )  # fmt: skip
    usage.recall({HOURS: "1.0"})
    clock.now = 100.0  # set-up costs nothing
    usage.at_work(4)
    clock.now += 1800
    usage.at_work(0)  # the group broke
    clock.now += 600
    usage.at_work(2)  # a smaller one
    clock.now += 3600
    found = usage.close()
    assert found == pytest.approx(
        {"usage/worker_hours": 5.0, "usage/gpu_hours": 2.5, "usage/cost": 15.0}
    )
    assert kept[-1][1] == {HOURS: "5.000000"}
    assert describe_usage(found) == "5.00 worker-hours, 2.50 GPU-hours, cost 15.00"


def test_without_gpus_and_price_they_are_left_out() -> None:
    usage = Usage(lambda metrics, tags: None, gpus_per_worker=0, price=None, clock=Clock())
    assert usage.close() == {"usage/worker_hours": 0.0}
