"""The tracker as its manifests start it: their commands, flags and settings, as processes here.

Changed is only what a cluster brings: addresses of Services, mounted folders and secrets.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, environment, free_ports, settings, train
from helpers.manifests import K8S, Doc, everything, find, pods_of
from helpers.postgres import Postgres

pytestmark = pytest.mark.slow

OVERLAY = "local"
SCRIPTS = K8S / "base" / "platform" / "scripts"
START_S = 240.0
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
EXPERIMENT = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=stack"


class Service:
    """What the name of a Service stands for in a cluster: its pods, one after the other.

    Clients reach it as their HTTP proxy, so that they use the name that the manifests say.
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.taken = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        """One request: a proxy's target is a whole URL, a server's is a path."""
        self.taken += 1
        port = self.ports[self.taken % len(self.ports)]
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", port)) as server:
            text = b""
            while b"\r\n\r\n" not in text:
                text += client.recv(65536)
            head, _, body = text.partition(b"\r\n\r\n")
            head = re.sub(rb"^(\w+) http://[^/ ]+", rb"\1 ", head)
            head = re.sub(rb"(?mi)^connection:.*\r\n", b"", head)
            server.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            self._copy(server, client)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)

    def close(self) -> None:
        self.listener.close()


@dataclass
class Stack:
    """What Services and Secrets are here. replicas: ports of the servers."""

    docs: list[Doc]
    secrets: dict[str, dict[str, str]]
    folder: Path
    postgres: Postgres
    s3: str
    service: Service = field(default_factory=Service)
    replicas: list[int] = field(default_factory=list)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def container(self, kind: str, name: str, container: str) -> Doc:
        (pod,) = pods_of(find(self.docs, kind, name))
        (found,) = [one for one in pod.containers() if one["name"] == container]
        return found

    def environment_of(self, container: Doc, where: Path) -> dict[str, str]:
        """As kubelet makes it, with the cluster's addresses and folders replaced by those here."""
        values: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                values |= find(self.docs, "ConfigMap", source["configMapRef"]["name"])["data"]
            else:
                values |= self.secrets[source["secretRef"]["name"]]
        values |= {"POSTGRES_HOST": "127.0.0.1", "MLFLOW_AUTH_CONFIG_PATH": str(where / "auth.ini")}
        for env in container.get("env", ()):
            if "value" in env:
                value = re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], env["value"])
                values[env["name"]] = value.replace(":5432/", f":{self.postgres.port}/")
            else:
                ref = env["valueFrom"]["secretKeyRef"]
                values[env["name"]] = self.secrets[ref["name"]][ref["key"]]
        if "AWS_ENDPOINT_URL" in values:
            values["AWS_ENDPOINT_URL"] = self.s3
        return values | {
            "HOME": str(where), "http_proxy": self.service.url, "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def command(self, container: Doc, env: dict[str, str]) -> list[str]:
        words = [*container.get("command", ()), *container.get("args", ())]
        words = [re.sub(r"\$\((\w+)\)", lambda m: env[m[1]], word) for word in words]
        words = [
            str(SCRIPTS / w.removeprefix("/scripts/")) if "/scripts/" in w else w for w in words
        ]
        if words[0] == "python":
            return [sys.executable, *words[1:]]
        return [str(Path(sys.executable).with_name(words[0])), *words[1:]]

    def run(
        self, kind: str, name: str, container: str, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """A container to its end."""
        spec = self.container(kind, name, container)
        env = self.environment_of(spec, self.folder) | changes
        return subprocess.run(
            self.command(spec, env), env=environment(**env), cwd=self.folder,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def launch(self) -> int:
        """A replica, without waiting for it: its init container first, as kubelet does. Returns its port."""
        (port,) = free_ports(1)
        where = self.folder / f"replica-{port}"
        where.mkdir()
        wait = self.container("Deployment", "mlflow", "wait-for-schema")
        env = self.environment_of(wait, where)
        prepared = subprocess.run(
            self.command(wait, env),
            env=environment(**env),
            cwd=where,
            capture_output=True,
            text=True,
        )
        assert prepared.returncode == 0, prepared.stderr
        spec = self.container("Deployment", "mlflow", "mlflow")
        env = self.environment_of(spec, where)
        words = self.command(spec, env)
        assert {"--host=0.0.0.0", "--port=5000"} <= set(words)
        here = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
        with (where / "log.txt").open("wb") as log:
            self.processes[port] = subprocess.Popen(
                [here.get(word, word) for word in words], env=environment(**env), cwd=where,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.replicas.append(port)
        self.service.ports.append(port)
        return port

    def wait_for(self, port: int) -> None:
        end = time.monotonic() + START_S
        log = self.folder / f"replica-{port}" / "log.txt"
        while not self.ready(port):
            assert self.processes[port].poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)

    def ready(self, port: int) -> bool:
        """What the readiness probe finds."""
        spec = self.container("Deployment", "mlflow", "mlflow")
        probe = spec["readinessProbe"]
        words = self.command({"command": probe["exec"]["command"]}, {})
        words = [f"--port={port}" if word == "--port=5000" else word for word in words]
        env = self.environment_of(spec, self.folder)
        try:
            done = subprocess.run(
                words, env=environment(**env), capture_output=True, timeout=probe["timeoutSeconds"]
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def stop(self) -> None:
        self.service.close()
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


def ask(
    port: int, path: str, *, user: str = "", password: str = "", host: str = "mlflow:5000",
    method: str = "GET", origin: str = "",
) -> int:  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Host": host}
    if user:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {token}"
    if origin:
        headers["Origin"] = origin
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture(scope="module")
def generated() -> dict[str, dict[str, str]]:
    """Secrets as the generator prints them."""
    env = {**os.environ, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}
    script = ["bash", str(K8S / "secrets" / "generate.sh")]
    text = subprocess.run(script, env=env, capture_output=True, text=True, check=True).stdout
    docs = [doc for doc in yaml.safe_load_all(text) if doc]
    return {doc["metadata"]["name"]: doc["stringData"] for doc in docs}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def stack(
    generated: dict[str, dict[str, str]], s3: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Buckets made, the empty database migrated by the Job, two replicas started at once."""
    pytest.importorskip("psycopg", reason="the Postgres driver of the tracker's image")
    docs = everything(OVERLAY)
    (pod,) = pods_of(find(docs, "StatefulSet", "postgres"))
    (database,) = pod.containers()
    names = {env["name"]: env.get("value") for env in database["env"]}
    postgres = Postgres(
        str(names["POSTGRES_USER"]), generated["postgres"]["password"], str(names["POSTGRES_DB"]),
        list(database["args"]),
    )  # fmt: skip
    with postgres:
        made = Stack(docs, generated, tmp_path_factory.mktemp("stack"), postgres, s3)
        try:
            buckets = made.container("Job", "buckets", "buckets")
            env = made.environment_of(buckets, made.folder)
            script = str(K8S / "overlays" / OVERLAY / "buckets.py")
            subprocess.run(
                [sys.executable, script, *buckets["args"]], env=environment(**env), check=True
            )
            (name,) = [
                doc["metadata"]["name"] for doc in docs
                if doc["kind"] == "Job" and doc["metadata"]["name"].startswith("mlflow-migrate")
            ]  # fmt: skip
            done = made.run("Job", name, "migrate")
            assert done.returncode == 0, done.stderr[-3000:]
            first, second = made.launch(), made.launch()
            made.wait_for(first)
            made.wait_for(second)
            yield made
        finally:
            made.stop()


def admin(stack: Stack) -> dict[str, str]:
    return {"user": "admin", "password": stack.secrets["mlflow"]["admin-password"]}


def trainer(stack: Stack) -> dict[str, str]:
    client = stack.secrets["mlflow-client"]
    return {
        "user": client["MLFLOW_TRACKING_USERNAME"], "password": client["MLFLOW_TRACKING_PASSWORD"],
    }  # fmt: skip


def test_two_replicas_serve_a_migrated_database(stack: Stack) -> None:
    first, second = stack.replicas
    for port in (first, second):
        assert ask(port, SEARCH, **admin(stack)) == 200
        assert ask(port, SEARCH, **trainer(stack)) == 200
    made = "/api/2.0/mlflow/experiments/create"
    connection = http.client.HTTPConnection("127.0.0.1", first, timeout=20)
    token = base64.b64encode(f"admin:{admin(stack)['password']}".encode()).decode()
    headers = {
        "Host": "mlflow:5000", "Authorization": f"Basic {token}", "Content-Type": "application/json",
    }  # fmt: skip
    connection.request("POST", made, body='{"name": "stack"}', headers=headers)
    assert connection.getresponse().status == 200
    assert ask(second, EXPERIMENT, **admin(stack)) == 200, "what one wrote the other reads"


def test_nothing_is_told_without_a_password(stack: Stack) -> None:
    port = stack.replicas[0]
    for path in (SEARCH, "/", "/api/2.0/mlflow-artifacts/artifacts", "/ajax-api/3.0/jobs"):
        assert ask(port, path) == 401, path
        assert ask(port, path, user="admin", password="password1234") == 401, path
    assert ask(port, "/health") == 200


def test_only_its_own_names_are_answered(stack: Stack) -> None:
    port = stack.replicas[0]
    for host in (
        "mlflow",
        "mlflow:5000",
        "mlflow.efficientdet.svc.cluster.local:5000",
        "localhost:5000",
    ):
        assert ask(port, SEARCH, host=host, **admin(stack)) == 200, host
    for host in ("evil.example", "mlflow.other.svc:5000", "10.1.2.3", "mlflow:80"):
        assert ask(port, SEARCH, host=host, **admin(stack)) == 403, host
    create = "/api/2.0/mlflow/experiments/create"
    assert ask(port, create, method="POST", origin="http://evil.example", **admin(stack)) == 403


def test_jobs_do_not_run_in_the_tracker(stack: Stack) -> None:
    """Its job runner is a way in, and takes more memory than all the rest."""
    names = []
    for process in stack.processes.values():
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(entry.name)) == process.pid:
                    names.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    assert names
    assert not [name for name in names if "huey" in name or "job_runner" in name]


def test_a_training_logs_into_it(stack: Stack, tmp_path: Path) -> None:
    import boto3

    (job,) = [
        doc for doc in stack.docs if doc["kind"] == "RayJob" and "train" in doc["metadata"]["name"]
    ]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    env = stack.environment_of(head, tmp_path)
    assert env["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # a pod's interface
        del env[name]
    output = tmp_path / "out"
    output.mkdir()
    arguments = [
        "--launcher",
        "local",
        "--steps",
        "4",
        "--set",
        "checkpoint.uri=s3://effdet-checkpoints/runs",
    ]
    done = train(output, *settings(), *arguments, **env)
    assert done.code == 0, done.out + done.err
    if "doctor" in done.out:  # a busy machine did not send all of them in time
        command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), "--replay", str(output)]
        subprocess.run(command, env=environment(**env), cwd=tmp_path, check=True, timeout=120)
    run = f"/api/2.0/mlflow/runs/get?run_id={done.report['run_id']}"
    assert ask(stack.replicas[1], run, **trainer(stack)) == 200
    client = boto3.client(
        "s3", endpoint_url=stack.s3, aws_access_key_id="test", aws_secret_access_key="test-secret",
        region_name="us-east-1",
    )  # fmt: skip
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="effdet-mlflow")["Contents"]]
    assert any(key.startswith("artifacts/") and key.endswith("config.yaml") for key in keys)
    steps = [
        item["Key"] for item in client.list_objects_v2(Bucket="effdet-checkpoints")["Contents"]
    ]
    assert any(key.endswith("step_00000004/meta.json") for key in steps)


def test_old_things_are_cleared_away_by_the_cron_jobs(stack: Stack) -> None:
    with ThreadPoolExecutor(2) as pool:
        gc = pool.submit(stack.run, "CronJob", "mlflow-gc", "gc")
        retention = pool.submit(
            stack.run, "CronJob", "checkpoint-retention", "retention", PYTHONPATH=str(ROOT)
        )
    assert gc.result().returncode == 0, gc.result().stderr[-3000:]
    assert retention.result().returncode == 0, retention.result().stderr[-3000:]
    assert "checkpoint(s) removed" in retention.result().stdout


def test_a_changed_secret_is_taken_by_the_job_that_migrates(stack: Stack) -> None:
    before = trainer(stack)
    (name,) = [
        doc["metadata"]["name"] for doc in stack.docs
        if doc["kind"] == "Job" and doc["metadata"]["name"].startswith("mlflow-migrate")
    ]  # fmt: skip
    done = stack.run(
        "Job", name, "migrate", EFFDET_TRAINING_PASSWORD="another-password-of-24-letters"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    port = stack.replicas[0]
    assert ask(port, SEARCH, user="trainer", password="another-password-of-24-letters") == 200
    cached_s = float(
        find(stack.docs, "ConfigMap", "mlflow-config")["data"]["EFFDET_AUTH_CACHE_SECONDS"]
    )
    end = time.monotonic() + cached_s + 10
    while ask(port, SEARCH, **before) != 401:
        assert time.monotonic() < end, "the old password is still taken"
        time.sleep(1)
    assert ask(port, SEARCH, **admin(stack)) == 200
    assert stack.ready(port)


def test_a_dead_database_is_seen_and_its_return_too(stack: Stack) -> None:
    first, second = stack.replicas
    assert stack.ready(first)
    assert stack.ready(second)
    stack.postgres.kill()
    try:
        assert not stack.ready(first)
        assert not stack.ready(second)
        assert ask(first, "/health") == 200, "it lives, so it must not be restarted"
    finally:
        stack.postgres.start()
    end = time.monotonic() + 60
    while not (stack.ready(first) and stack.ready(second)):
        assert time.monotonic() < end, "the tracker did not find its database again"
        time.sleep(0.5)
    assert ask(first, EXPERIMENT, **admin(stack)) == 200
