"""What is wrong is said before anything is started."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.config.serve_cli import ServeOptions, ServeRequest
from orchestrator.errors import CheckpointError, ClusterError, ConfigError
from orchestrator.launch.ray_runtime import Cluster
from orchestrator.serving import detector
from orchestrator.serving.app import Scale, build
from orchestrator.serving.detector import Copy, Detector, served_files
from orchestrator.serving.messages import sample_picture
from orchestrator.serving.running import scale_of
from orchestrator.serving.serve_job import TOKEN, _starting, _stop_signals, run_serve_job

from .conftest import ABOUT, LIMITS

CHECK = ServeOptions(dry_run=True, json=False)
COPY = Copy(device="cpu", threads=1, max_batch=1, batch_wait_s=0.0, max_pixels=10**6)


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


def test_a_signal_ends_the_start_at_once_and_the_service_in_order() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with _stop_signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert not signals.stop.is_set()
        signals.ready.set()
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_start_that_has_to_wait_says_so() -> None:
    assert _starting(1, 4) == "starting 1 copy ..."
    assert "starting 3 copies ... there is room for 1 now" in _starting(3, 1)


def test_answers_under_way_have_their_time_to_end() -> None:
    app = build(None, COPY, Scale(1, 1, 1.0, 0.0), ABOUT, LIMITS, None)  # type: ignore[arg-type]
    inner = app._bound_deployment.init_args[0]
    for bound in (app._bound_deployment, inner._bound_deployment):
        assert bound._deployment_config.graceful_shutdown_timeout_s == LIMITS.timeout_s


def test_a_copy_that_is_broken_says_so(
    folder_of_a_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that failed once refuses all that follows; images that were too many do not break it."""
    monkeypatch.setattr(detector.ray, "get", lambda files: files)
    copy = Detector(served_files(folder_of_a_model), COPY)  # type: ignore[arg-type]
    works, image = copy.predictor, copy.predictor.prepare(sample_picture())
    lost = RuntimeError("CUDA error: device-side assert triggered")

    class Failing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def detect(self, *_: object) -> None:
            raise self.error

    async def fails_with(error: Exception) -> None:
        copy.predictor = Failing(error)  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match=str(error)):
            await copy._look([image])

    async def one_after_another() -> None:
        copy.check_health()
        await fails_with(torch.OutOfMemoryError("full"))
        copy.check_health()
        await fails_with(lost)
        with pytest.raises(RuntimeError, match="device-side assert"):
            copy.check_health()
        copy.predictor = works
        assert len(await copy._look([image])) == 1
        copy.check_health()

    asyncio.run(one_after_another())
