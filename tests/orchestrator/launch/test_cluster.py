"""What a cluster that an autoscaler keeps empty counts as."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray._private.state import state
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.exceptions import AuthenticationError

from orchestrator.errors import ClusterError
from orchestrator.launch import ray_runtime
from orchestrator.launch.ray_runtime import Cluster, autoscaler_limits, connect, fitting


def config(*groups: tuple[dict[str, int], int]) -> ClusterConfig:
    """Groups of up to so many nodes with these resources each."""
    made = ClusterConfig()
    for resources, most in groups:
        group = made.node_group_configs.add()
        group.resources.update(resources)
        group.max_count = most
    return made


def test_limits_are_those_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    found = config(({"CPU": 4}, 1), ({"CPU": 8, "GPU": 2}, 3))
    monkeypatch.setattr(state, "get_cluster_config", lambda: found)
    assert autoscaler_limits() == {"CPU": 28.0, "GPU": 6.0}


def test_without_an_autoscaler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "get_cluster_config", lambda: None)
    assert autoscaler_limits() == {}


@pytest.mark.parametrize(
    ("there", "per_worker", "expected"),
    [
        ((2.0, 0.0), (0.2, 0.0), 10),
        ((1.0, 0.0), (0.1, 0.0), 10),
        ((8.0, 2.0), (1.0, 0.4), 4),  # no worker is on two devices
        ((8.0, 1.2), (1.0, 0.2), 6),
        ((99.0, 1.0), (1.0, 0.1), 10),
        ((8.0, 3.0), (1.0, 2.0), 1),
        ((1.9, 8.0), (1.0, 1.0), 1),
    ],
)
def test_what_nodes_hold(
    there: tuple[float, float], per_worker: tuple[float, float], expected: int
) -> None:
    assert fitting(*there, *per_worker) == expected


@pytest.mark.parametrize(
    ("grows", "per_worker", "expected"),
    [(False, (1.0, 0.0), 3), (True, (1.0, 0.0), 28), (True, (1.0, 1.0), 6), (True, (16.0, 0.0), 3)],
)
def test_room_counts_nodes_that_may_come(
    monkeypatch: pytest.MonkeyPatch, grows: bool, per_worker: tuple[float, float], expected: int
) -> None:
    monkeypatch.setattr(ray_runtime, "room_for", lambda cpus, gpus: 3)
    cluster = Cluster(False, cpus=28.0, gpus=6.0, nodes=1, address="", grows=grows)
    assert cluster.room(*per_worker) == expected


@pytest.mark.parametrize(
    ("address", "where"), [("", "Ray: expected to start"), ("127.0.0.1:9", "RAY_ADDRESS: expected")]
)
def test_what_keeps_ray_away_is_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str, where: str
) -> None:
    def refuse(**_: object) -> None:
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_runtime.ray, "init", refuse)
    with pytest.raises(ClusterError, match=rf"(?s)^{where}.*InvalidAuthToken"):
        connect(Path("."))
