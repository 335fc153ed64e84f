"""Real servers and small data for the orchestrator's tests; each is made once a session."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from s3fs import S3FileSystem
from torch import nn

from model.data.index import ClassMap
from model.data.shapes import ShapesConfig, ensure_shapes
from model.network.scaling import ModelConfig
from model.training.config import Duration, TrainConfig
from model.training.state import Progress, write_checkpoint
from orchestrator.config.schema import CheckpointConfig, DataConfig, RunConfig, TrainJob
from orchestrator.records.tracker import Tracker


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test, or the code under it, puts into the environment goes with the test."""
    before = dict(os.environ)
    for name in ("AWS_ENDPOINT_URL", "RAY_ADDRESS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    # fsspec keeps connections by their options, and the endpoint is not one of them.
    S3FileSystem.clear_instance_cache()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """An experiment in a sqlite database; its first opening takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    return Tracker(f"sqlite:///{folder / 'mlflow.db'}", "tests", (folder / "artifacts").as_uri())


@pytest.fixture
def run_id(tracker: Tracker) -> str:
    return str(tracker.client.create_run(tracker.experiment_id).info.run_id)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint that this process now uses."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3_server


@pytest.fixture(scope="session")
def s3_client(s3_server: str) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=s3_server, region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip


@pytest.fixture
def bucket(s3: str, s3_client: Any) -> str:
    """The name of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3_client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def write() -> Callable[..., Callable[[Path], None]]:
    """write(step, AP) -> what fills a folder with a checkpoint of a tiny network."""

    def of(step: int, value: float | None = None) -> Callable[[Path], None]:
        weights = nn.Linear(2, 2).state_dict()
        progress = Progress(step, {"weight": torch.zeros(2, 2)}, torch.zeros(3))
        metrics = {} if value is None else {CheckpointConfig().metric: value}

        def fill(folder: Path) -> None:
            write_checkpoint(
                folder, model=weights, ema=weights, progress=progress, config={"step": step},
                classes=ClassMap((1,), ("thing",)), metrics=metrics,
            )  # fmt: skip

        return fill

    return of


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny COCO-format dataset; copy it before changing it."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    ensure_shapes(folder, ShapesConfig(num_train=8, num_val=4, size_px=48))
    return folder


@pytest.fixture
def job(shapes: Path, tmp_path: Path) -> TrainJob:
    """The smallest network on the tiny dataset."""
    return TrainJob(
        model=ModelConfig(
            backbone="test_efficientnet", pretrained="no", image_size_px=128,
            fpn_channels=16, fpn_repeats=1, head_layers=1,
        ),
        data=DataConfig(root=str(shapes)),
        train=TrainConfig(duration=Duration(steps=20), batch_size=4),
        run=RunConfig(output=str(tmp_path / "runs")),
    )  # fmt: skip
