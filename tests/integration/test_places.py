"""Checkpoints and artifacts on S3, with a tracking server whose clients write there or that does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from helpers import environment, free_ports, settings, train
from helpers.mlflow_server import MlflowServer
from mlflow.tracking import MlflowClient
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.integration
SHORT = ("--launcher", "local", "--steps", "10")


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
    client_of(env).create_bucket(Bucket="models")
    yield env
    server.stop()


def client_of(env: dict[str, str], service: str = "s3") -> Any:
    return boto3.client(
        service, endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


def keys_with_figures(env: dict[str, str], prefix: str, number: int) -> list[str]:
    """All of the bucket, once it has so many figures: a busy machine draws them after the job's end."""
    end = time.monotonic() + 120
    while True:
        found = client_of(env).list_objects_v2(Bucket="models")["Contents"]
        keys = [str(item["Key"]) for item in found]
        figures = [key for key in keys if key.startswith(prefix) and "/figures/" in key]
        if len(figures) >= number:
            assert len(figures) == number
            return keys
        assert time.monotonic() < end, figures
        time.sleep(0.5)


@pytest.mark.parametrize("artifacts", ["direct", "proxied"])
def test_everything_is_on_s3_and_seen_from_the_run(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: str
) -> None:
    """direct: one copy of each checkpoint, where MLflow shows it. proxied: at a URI of their own."""
    where = f"s3://models/{artifacts}"
    flags = ("--no-serve-artifacts", "--default-artifact-root", where)
    if artifacts == "proxied":
        flags = ("--artifacts-destination", where)  # type: ignore[assignment]
    with MlflowServer(tmp_path / "mlflow", *flags, **s3) as server:
        output = tmp_path / "out"
        output.mkdir()
        arguments = [*settings(tracking__figures="true"), *SHORT, "--tracking-uri", server.uri]
        if artifacts == "proxied":
            arguments += ["--set", "checkpoint.uri=s3://models/checkpoints"]
        done = train(output, *arguments, timeout_s=300, **s3)
        assert done.code == 0, done.err + done.out
        assert "planted-secret" not in done.out + done.err
        report = done.report
        assert [step for step, _ in done.history()] == list(range(1, 11))
        client = MlflowClient(server.uri)
        run = client.get_run(report["run_id"])
        assert run.info.status == "FINISHED"
        keys = keys_with_figures(s3, f"{artifacts}/", 7)
        checkpoint = report["checkpoint"]
        if artifacts == "direct":
            assert checkpoint.startswith(f"{where}/")
            assert f"{report['run_id']}/artifacts/checkpoints/step_00000010" in checkpoint
            # Listed by this process, which needs the same access.
            for key, value in s3.items():
                monkeypatch.setenv(key, value)
            listed = client.list_artifacts(report["run_id"], "checkpoints")
            assert "checkpoints/step_00000010" in [entry.path for entry in listed]
        else:
            assert checkpoint.startswith("s3://models/checkpoints/shapes-d0-")
        [model] = client.search_logged_models([run.info.experiment_id])
        assert model.tags["effdet.checkpoint_uri"] == checkpoint
        assert model.tags["effdet.role"] == "best last"
        ours = ("direct/",) if artifacts == "direct" else ("proxied/", "checkpoints/")
        committed = [key for key in keys if key.endswith("step_00000010/meta.json")]
        assert len([key for key in committed if key.startswith(ours)]) == 1, "one copy"


@pytest.fixture(scope="module")
def readers_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a process that may read the bucket `models`, and not write it."""
    (port,) = free_ports(1)
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        # The first calls are free: those that say who may do what.
        env=environment(INITIAL_NO_AUTH_ACTION_COUNT="4"), stdout=log, stderr=log,
    )  # fmt: skip
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "root",
        "AWS_SECRET_ACCESS_KEY": "root", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    iam = client_of(env, "iam")
    end = time.monotonic() + 60
    while True:
        try:
            iam.create_user(UserName="reader")
            break
        except Exception:  # until it listens
            assert time.monotonic() < end
            time.sleep(0.2)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    allow = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    iam.put_user_policy(
        UserName="reader", PolicyName="read",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allow]}),
    )  # fmt: skip
    client_of(env).create_bucket(Bucket="models")
    yield env | {
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
    }
    server.terminate()
    server.wait(30)
    log.close()


@pytest.mark.parametrize(
    ("asked", "bucket", "cause"),
    [
        ("checkpoints", "no-such-bucket", "bucket does not exist"),
        ("artifacts", "models", "denied"),
        pytest.param(
            "artifacts", "no-such-bucket", "bucket does not exist", marks=pytest.mark.slow
        ),
        pytest.param("checkpoints", "models", "denied", marks=pytest.mark.slow),
    ],
)
def test_bucket_that_cannot_be_written_is_found_before_training(
    s3: dict[str, str],
    readers_s3: dict[str, str],
    tmp_path: Path,
    asked: str,
    bucket: str,
    cause: str,
) -> None:
    """Nothing is left in the tracker either."""
    env = readers_s3 if cause == "denied" else s3
    output = tmp_path / "out"
    output.mkdir()
    uri = f"sqlite:///{output}/mlflow.db"
    arguments = [*settings(), *SHORT, "--tracking-uri", uri]
    if asked == "checkpoints":
        arguments += ["--set", f"checkpoint.uri=s3://{bucket}/checkpoints"]
    else:
        client = MlflowClient(uri)
        client.create_experiment("efficientdet", f"s3://{bucket}/artifacts")
    done = train(output, *arguments, **env)
    assert done.code == 2, done.out
    [line] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert f"s3://{bucket}/" in line
    assert cause in line.lower()
    assert "Traceback" not in done.err
    client = MlflowClient(uri)
    assert [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])] == []  # fmt: skip
