"""Checkpoints on S3 and a tracking server instead of local files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from helpers import environment, free_ports, settings, train
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Environment of a process that may use an S3 server with the bucket `models`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="key",
        aws_secret_access_key="planted-secret", region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket="models")
    yield env
    server.stop()


@pytest.fixture(scope="module")
def mlflow_server(s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server whose clients write artifacts to S3 themselves."""
    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("mlflow")
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1",
            "--port", str(port), "--workers", "1", "--no-serve-artifacts",
            "--backend-store-uri", f"sqlite:///{folder}/m.db",
            "--default-artifact-root", "s3://models/artifacts",
        ],
        env=environment(**s3, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"), cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < end, "mlflow server did not come up"
            time.sleep(0.5)
    yield uri
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def test_checkpoints_appear_under_the_run_on_s3(
    s3: dict[str, str], mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy, where MLflow shows it."""
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    output = tmp_path / "out"
    output.mkdir()
    arguments = [
        *settings(),
        "--launcher",
        "local",
        "--tracking-uri",
        mlflow_server,
        "--steps",
        "10",
    ]
    done = train(output, *arguments, timeout_s=300, **s3)
    assert done.code == 0, done.err + done.out
    report = done.report
    assert report["checkpoint"].startswith("s3://models/artifacts/")
    assert f"{report['run_id']}/artifacts/checkpoints/step_00000010" in report["checkpoint"]
    assert [step for step, _ in done.history()] == list(range(1, 11))
    assert "planted-secret" not in done.out + done.err

    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow_server)
    listed = client.list_artifacts(report["run_id"], "checkpoints")
    assert "checkpoints/step_00000010" in [entry.path for entry in listed]
    assert client.get_run(report["run_id"]).info.status == "FINISHED"
