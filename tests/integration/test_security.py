"""A tracker with passwords over TLS, and secrets planted wherever a job could leak them from."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from helpers import ROOT, environment, settings, train
from helpers.mlflow_server import MlflowServer
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.integration

PLANTED = {
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret",
    "HF_TOKEN": "planted-hub-token",
}


def certificate(folder: Path) -> tuple[Path, Path]:
    """Self-signed, for 127.0.0.1; certificate and key as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = folder / "cert.pem", folder / "key.pem"
    cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert_path, key_path


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[dict[str, str], Any]]:
    """Environment of a process that may use it, and a client."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "planted-key-id",
        "AWS_SECRET_ACCESS_KEY": PLANTED["AWS_SECRET_ACCESS_KEY"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="planted-key-id", aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    client.create_bucket(Bucket="models")
    yield env, client
    server.stop()


@pytest.fixture(scope="module")
def secured(
    s3: tuple[dict[str, str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[MlflowServer, dict[str, str]]]:
    """The server and what its clients need in their environment."""
    folder = tmp_path_factory.mktemp("mlflow")
    cert, key = certificate(folder)
    auth = folder / "auth.ini"
    auth.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
    )
    server = MlflowServer(
        folder, "--app-name", "basic-auth", "--artifacts-destination", "s3://models/artifacts",
        "--uvicorn-opts", f"--ssl-certfile {cert} --ssl-keyfile {key}", scheme="https",
        MLFLOW_AUTH_CONFIG_PATH=str(auth), MLFLOW_FLASK_SERVER_SECRET_KEY="for-tests",
        MLFLOW_AUTH_ADMIN_PASSWORD=PLANTED["MLFLOW_TRACKING_PASSWORD"], **s3[0],
    )  # fmt: skip
    client = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_SERVER_CERT_PATH": str(cert)}
    with server:
        yield server, s3[0] | PLANTED | client


def keys_of(client: Any) -> list[str]:
    return [str(item["Key"]) for item in client.list_objects_v2(Bucket="models")["Contents"]]


def leaks(folder: Path) -> list[str]:
    """Files below a folder that hold a planted secret."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("auth.ini", "auth.db", "key.pem"):
            content = path.read_bytes()
            found += [f"{path.name}: {s}" for s in PLANTED.values() if s.encode() in content]
    return found


def test_records_reach_a_secured_tracker_and_no_secret_goes_along(
    secured: tuple[MlflowServer, dict[str, str]], s3: tuple[dict[str, str], Any], tmp_path: Path
) -> None:
    server, env = secured
    output = tmp_path / "out"
    output.mkdir()
    done = train(
        output, *settings(tracking__figures="true"), "--launcher", "local", "--steps", "10",
        "--tracking-uri", server.uri, "--set", "checkpoint.uri=s3://models/checkpoints", **env,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    if (
        "doctor" in done.out
    ):  # this server hashes the password at each request: a slow machine's end waits no longer
        late = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / "doctor.py"), "--replay", str(output)],
            env=environment(**env), capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert late.returncode == 0, late.stdout + late.stderr
    assert done.report["run_id"]
    end = time.monotonic() + 120
    while not any("/figures/" in key for key in keys_of(s3[1])):
        assert time.monotonic() < end, "a busy machine draws after the job's end, but it draws"
        time.sleep(0.5)
    keys = keys_of(s3[1])
    assert any(key.endswith("config.yaml") for key in keys), "artifacts go through the server"
    assert any(key.startswith("checkpoints/shapes-d0-") for key in keys)

    copy = tmp_path / "bucket"
    for number, key in enumerate(keys):
        (copy / str(number)).parent.mkdir(exist_ok=True)
        s3[1].download_file("models", key, str(copy / str(number)))
    assert len(list(copy.iterdir())) > 10
    assert leaks(output) == []
    assert leaks(server.folder) == []
    assert leaks(copy) == []
    assert not any(secret in done.out + done.err for secret in PLANTED.values())


@pytest.mark.parametrize("how", ["password", "certificate"])
def test_tracker_that_refuses_is_told_in_one_line(
    secured: tuple[MlflowServer, dict[str, str]], tmp_path: Path, how: str
) -> None:
    server, env = secured
    changed = dict(env)
    if how == "password":
        changed["MLFLOW_TRACKING_PASSWORD"] = "planted-wrong-password"
    else:
        del changed["MLFLOW_TRACKING_SERVER_CERT_PATH"]
    output = tmp_path / "out"
    output.mkdir()
    done = train(
        output, *settings(), "--launcher", "local", "--steps", "10",
        "--tracking-uri", server.uri, **changed,
    )  # fmt: skip
    assert done.code == 2
    [line] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: tracking.uri: expected an MLflow server")
    assert (
        ("401" in line or "not authenticated" in line)
        if how == "password"
        else "CERT" in line.upper()
    )
    assert "planted" not in done.out + done.err
    assert "Traceback" not in done.err
