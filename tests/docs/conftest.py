"""A place where the commands of the documents can be typed: data, pictures, an S3, a trained model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import Done, environment, settings, train
from PIL import Image

from .documents import stand_in
from .other_formats import as_voc, as_yolo

STEPS = "{steps: 2}"
# Large enough for several sizes of a picture that differ.
TRAINED = settings(
    train__duration="{steps: 10}", train__evaluate_every="{steps: 5}",
    train__checkpoint_every="{steps: 5}", model__image_size_px=320,
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """folder: where commands are typed. trained: a run that was trained there."""

    folder: Path
    env: dict[str, str]
    trained: Done

    @property
    def checkpoint(self) -> Path:
        return Path(self.trained.report["checkpoint"].removeprefix("file://"))

    def here(self, text: str) -> str:
        """A command with what a reader would put into it."""
        found = self.checkpoint
        for pattern, value in (
            (r"\bRUN_ID\b", str(self.trained.report["run_id"])),
            (r"runs/…/step_00001200", str(found)),
            (r"http://mlflow:5000|(?<=MLFLOW_TRACKING_URI=)…", str(self.trained.report["tracking_uri"])),
            (r"val/AP>=0\.\d+", "val/AP>=0"),  # ten steps of training find little
        ):  # fmt: skip
            text = re.sub(pattern, lambda match, value=value: value, text)  # type: ignore[misc]
        return text

    def run(self, text: str, added: list[str], timeout_s: float = 300) -> Done:
        """By a shell, as it is written, with more arguments after it."""
        done = subprocess.run(
            ["bash", "-c", f"{self.here(text)} {shlex.join(added)}"],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("documents")
    folder, home = stand_in(base / "clone"), base / "home"
    _draw_data(home)
    _draw_pictures(folder, home / "my-dataset")
    with _s3(home / "my-dataset", folder / "photos") as s3:
        env = environment(
            **s3, HOME=str(home), OMP_NUM_THREADS="1", RAY_AUTH_MODE="token", PYTHONDONTWRITEBYTECODE="1",
            RAY_AUTH_TOKEN="a-token-of-the-tests-0123456789", RAY_USAGE_STATS_ENABLED="0",
        )  # fmt: skip
        env.pop("MLFLOW_TRACKING_URI", None)
        kept = {name: env[name] for name in (*s3, "HOME")}
        trained = train(
            folder / "runs", *TRAINED, "--data", str(home / "my-dataset"), "--pretrained", "no",
            "--launcher", "local", "--name", "stand-in", **kept,
        )  # fmt: skip
        assert trained.code == 0, trained.out + trained.err
        there = World(folder, env, trained)
        _upload(s3, trained, there.checkpoint)
        yield there


@pytest.fixture(scope="session")
def detector(world: World) -> None:
    """models:/detector@champion and @previous, of two steps of the run."""
    for step in ("5", "10"):
        promoted = world.run(
            ".venv/bin/python jobs/promote.py RUN_ID --name detector --allow-worse",
            ["--checkpoint", step],
        )
        assert promoted.code == 0, promoted.out + promoted.err


def _draw_data(home: Path) -> None:
    from model.data.shapes import ShapesConfig, ensure_shapes

    ensure_shapes(home / "my-dataset", ShapesConfig(num_train=32, num_val=8, size_px=64))
    (home / "my-dataset" / "train2017").symlink_to(home / "my-dataset" / "images" / "train")
    (home / "other-data").symlink_to(home / "my-dataset")
    as_voc(home / "my-dataset", home / "my-voc")
    as_yolo(home / "my-dataset", home / "my-yolo")


def _draw_pictures(folder: Path, dataset: Path) -> None:
    import av
    import numpy as np

    images = sorted((dataset / "images" / "val").glob("*.jpg"))[:3]
    (folder / "photos").mkdir()
    for path in images:
        (folder / "photos" / path.name).write_bytes(path.read_bytes())
    (folder / "photo.jpg").write_bytes(images[0].read_bytes())
    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        for path in images:
            pixels = np.asarray(Image.open(path).convert("RGB").resize((64, 64)))
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


class _s3:
    """A server with the bucket that the pages name; its environment."""

    def __init__(self, dataset: Path, photos: Path) -> None:
        self.contents = {"coco": dataset, "photos": photos}

    def __enter__(self) -> dict[str, str]:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        host, port = self.server.get_host_and_port()
        env = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        client(env).create_bucket(Bucket="bucket")
        for prefix, folder in self.contents.items():
            upload(env, folder, prefix)
        return env

    def __exit__(self, *error: object) -> None:
        self.server.stop()


def client(env: dict[str, str]):  # type: ignore[no-untyped-def]
    import boto3

    return boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip


def upload(env: dict[str, str], folder: Path, prefix: str) -> None:
    to = client(env)
    for path in folder.rglob("*"):
        if path.is_file():
            to.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder).as_posix()}")


def _upload(s3: dict[str, str], trained: Done, checkpoint: Path) -> None:
    """The run's checkpoint and records where the pages have them."""
    upload(s3, checkpoint, "checkpoints/RUN/step_00001200")
    output = Path(trained.report["tracking_uri"].removeprefix("sqlite:///")).parent
    (records,) = [path.parent for path in output.rglob("records/*/*.json")][:1]
    upload(s3, records, f"checkpoints/RUN/records/{records.name}")
    assert os.listdir(records)
