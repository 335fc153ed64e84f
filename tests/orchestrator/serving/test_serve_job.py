"""What is wrong is said before anything is started."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.serve_cli import ServeOptions, ServeRequest
from orchestrator.errors import CheckpointError, ClusterError, ConfigError
from orchestrator.launch.ray_runtime import Cluster
from orchestrator.serving.app import Scale
from orchestrator.serving.running import scale_of
from orchestrator.serving.serve_job import TOKEN, run_serve_job

CHECK = ServeOptions(dry_run=True, json=False)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def request(folder: Path, port: int, **changes: object) -> ServeRequest:
    return replace(ServeRequest(str(folder), port=port), **changes)  # type: ignore[arg-type]


def test_a_dry_run_loads_the_model_and_serves_nothing(
    folder_of_a_model: Path, closed_port: int
) -> None:
    out = io.StringIO()
    done = run_serve_job(request(folder_of_a_model, closed_port), CHECK, out)
    assert done.code == 0
    assert (done.report["status"], done.report["step"]) == ("checked", 3)
    assert done.report["params"] > 10_000
    for text in ("3: disc, box, star", "val/AP 0.250", "256 requests at once", "everybody"):
        assert text in out.getvalue()


def test_who_may_ask_is_said(
    folder_of_a_model: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = request(folder_of_a_model, closed_port, host="0.0.0.0"), io.StringIO()
    run_serve_job(asked, CHECK, out)
    assert f"set {TOKEN}" in out.getvalue()
    monkeypatch.setenv(TOKEN, "planted-secret")
    out = io.StringIO()
    run_serve_job(asked, CHECK, out)
    assert "those with the token" in out.getvalue()
    assert "planted-secret" not in out.getvalue()


def test_a_taken_port_is_said_before_the_model_is_looked_for(taken: int) -> None:
    with pytest.raises(ConfigError, match="--port: expected an address that is free"):
        run_serve_job(request(Path("nowhere"), taken), CHECK)


def test_a_damaged_model_is_refused(folder_of_a_model: Path, closed_port: int) -> None:
    weights = folder_of_a_model / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        run_serve_job(request(folder_of_a_model, closed_port), CHECK)


CPUS, GPUS = (
    Cluster(embedded=True, cpus=cpus, gpus=gpus, nodes=1, address="x")
    for cpus, gpus in ((4.0, 0.0), (8.0, 2.0))
)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room as on one node of the cluster's size."""

    def room(self: Cluster, cpus: float, gpus: float) -> int:
        by_cpus = self.cpus // cpus
        return int(min(by_cpus, self.gpus // gpus) if gpus else by_cpus)

    monkeypatch.setattr(Cluster, "room", room)


@pytest.mark.usefixtures("nodes")
def test_copies_take_a_gpu_where_there_are_some() -> None:
    asked = ServeRequest("m")
    assert scale_of(asked, CPUS) == Scale(None, 4, 1.0, 0.0)
    assert scale_of(asked, GPUS) == Scale(None, 2, 1.0, 1.0)
    assert scale_of(replace(asked, gpus_per_replica=0.0), GPUS) == Scale(None, 8, 1.0, 0.0)
    assert scale_of(replace(asked, replicas=2), GPUS).options(8)["num_replicas"] == 2
    grows = scale_of(asked, CPUS).options(8)["autoscaling_config"]
    assert (grows.min_replicas, grows.max_replicas) == (1, 4)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 5}, "at most 4"),
        ({"gpus_per_replica": 1.0}, "at most 0"),
        ({"cpus_per_replica": 5.0}, "at most 0"),
    ],
)
def test_more_than_there_is_room_for_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        scale_of(replace(ServeRequest("m"), **changes), CPUS)  # type: ignore[arg-type]
