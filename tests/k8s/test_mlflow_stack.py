"""The tracker as its manifests start it, with Postgres and S3, and what else runs beside it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from helpers import ROOT, environment, settings, train
from helpers.manifests import K8S, Doc, everything, find, pods_of
from helpers.postgres import Postgres
from helpers.tracker_stack import Stack, ask

pytestmark = pytest.mark.slow

OVERLAY = "local"
README = (K8S / "README.md").read_text()
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
EXPERIMENT = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=stack"


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
            done = made.run("Job", migration(made), "migrate")
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


def head_container(stack: Stack) -> Doc:
    """Of the training's cluster: where its driver runs."""
    job = find(stack.docs, "RayJob", "effdet-train")
    found: Doc = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return found


def head_environment(stack: Stack, where: Path) -> dict[str, str]:
    env = stack.environment_of(head_container(stack), where)
    assert env["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # a pod's interface
        del env[name]
    return env


def migration(stack: Stack) -> str:
    (name,) = [
        doc["metadata"]["name"] for doc in stack.docs
        if doc["kind"] == "Job" and doc["metadata"]["name"].startswith("mlflow-migrate")
    ]  # fmt: skip
    return str(name)


def bucket(stack: Stack) -> Any:
    return boto3.client(
        "s3", endpoint_url=stack.s3, aws_access_key_id="test", aws_secret_access_key="test-secret",
        region_name="us-east-1",
    )  # fmt: skip


def objects(stack: Stack, name: str) -> list[str]:
    return [item["Key"] for item in bucket(stack).list_objects_v2(Bucket=name)["Contents"]]


def test_two_replicas_serve_a_migrated_database(stack: Stack) -> None:
    first, second = stack.replicas
    for port in (first, second):
        assert ask(port, SEARCH, **admin(stack)) == 200
        assert ask(port, SEARCH, **trainer(stack)) == 200
    assert post(stack, "/api/2.0/mlflow/experiments/create", {"name": "stack"}) == 200
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
    env = head_environment(stack, tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    arguments = [
        "--launcher", "local", "--steps", "4",
        "--set", "checkpoint.uri=s3://effdet-checkpoints/runs",
    ]  # fmt: skip
    done = train(output, *settings(), *arguments, **env)
    assert done.code == 0, done.out + done.err
    if "doctor" in done.out:  # a busy machine did not send all of them in time
        command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), "--replay", str(output)]
        subprocess.run(command, env=environment(**env), cwd=tmp_path, check=True, timeout=120)
    run = f"/api/2.0/mlflow/runs/get?run_id={done.report['run_id']}"
    assert ask(stack.replicas[1], run, **trainer(stack)) == 200
    artifacts = objects(stack, "effdet-mlflow")
    assert any(key.startswith("artifacts/") and key.endswith("config.yaml") for key in artifacts)
    checkpoints = objects(stack, "effdet-checkpoints")
    assert any(key.endswith("step_00000004/meta.json") for key in checkpoints)


def test_the_doctor_of_the_readme_finds_tracker_and_store_well(
    stack: Stack, tmp_path: Path
) -> None:
    (command,) = re.findall(r"python (jobs/doctor\.py --cluster \S+)`", README)
    done = subprocess.run(
        [sys.executable, *shlex.split(command), "--json"], cwd=ROOT, capture_output=True, text=True,
        env=environment(**head_environment(stack, tmp_path)), timeout=300,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    (node,) = report["nodes"]
    assert node["tracker"] is None
    assert node["store"] is None
    assert node["tracker_s"] > 0
    assert min(node["mib_per_s"]) > 0
    table = re.sub(r"[\s│]+", " ", done.stdout)
    assert re.search(r"tracker answers in \d+ ms", table), done.stdout


def old_run(stack: Stack, tmp_path: Path, key: str, who: dict[str, str]) -> str:
    """A run of three checkpoints that somebody finished 40 days ago; the id of its experiment."""
    base = "s3://effdet-checkpoints/runs"
    code = """
import sys, time
from mlflow.tracking import MlflowClient
key, base = sys.argv[1:]
client, ended_ms = MlflowClient(), int((time.time() - 40 * 86400) * 1000)
experiment = client.create_experiment(key)
run = client.create_run(experiment, start_time=ended_ms - 1000, tags={"effdet.run_key": key})
for step in (1, 2, 3):
    uri = f"{base}/{key}/step_{step:08}"
    client.create_logged_model(
        experiment, f"step-{step}", run.info.run_id, tags={"effdet.checkpoint_uri": uri}
    )
client.set_terminated(run.info.run_id, "FINISHED", ended_ms)
print(experiment)
"""
    env = head_environment(stack, tmp_path) | {
        "MLFLOW_TRACKING_USERNAME": who["user"], "MLFLOW_TRACKING_PASSWORD": who["password"],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, key, base], env=environment(**env), cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (1, 2, 3):
        for name in ("meta.json", "model.safetensors"):
            bucket(stack).put_object(
                Bucket="effdet-checkpoints", Key=f"runs/{key}/step_{step:08}/{name}", Body=b"{}"
            )
    return done.stdout.split()[-1]


def steps(stack: Stack, key: str) -> set[str]:
    return {
        path.split("/")[2][-1] for path in objects(stack, "effdet-checkpoints")
        if path.startswith(f"runs/{key}/")
    }  # fmt: skip


def test_old_things_are_cleared_away_by_the_cron_jobs(stack: Stack, tmp_path: Path) -> None:
    """What the jobs' user may not remove is named and stays, until it may."""
    theirs = old_run(stack, tmp_path, "an-administrators", admin(stack))
    old_run(stack, tmp_path, "a-trainers", trainer(stack))
    with ThreadPoolExecutor(2) as pool:
        gc = pool.submit(stack.run, "CronJob", "mlflow-gc", "gc")
        waiting = pool.submit(retention, stack)
    assert gc.result().returncode == 0, gc.result().stderr[-3000:]
    done = waiting.result()
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    place = "s3://effdet-checkpoints/runs"
    for step in (1, 2):
        assert f"kept {place}/an-administrators/step_{step:08}: the tracker's model" in done.stdout
        assert f"removed {place}/a-trainers/step_{step:08}" in done.stdout
    assert "2 thing(s) may not be removed and were kept" in done.stderr
    assert "MANAGE" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps(stack, "an-administrators") == {"1", "2", "3"}
    assert steps(stack, "a-trainers") == {"3"}

    ((path, body),) = re.findall(r"localhost:5000(/api/\S+/grant) .* -d '(.*)'", README)
    asked = {**json.loads(body), "resource_id": theirs}
    assert post(stack, path, asked) == 200
    again = retention(stack)
    assert again.returncode == 0, again.stdout + again.stderr[-3000:]
    assert steps(stack, "an-administrators") == {"3"}


def retention(stack: Stack) -> subprocess.CompletedProcess[str]:
    return stack.run("CronJob", "checkpoint-retention", "retention", PYTHONPATH=str(ROOT))


def post(stack: Stack, path: str, content: dict[str, str]) -> int:
    """By the administrator."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.replicas[0], timeout=20)
    token = base64.b64encode(f"admin:{admin(stack)['password']}".encode()).decode()
    headers = {
        "Host": "mlflow:5000", "Authorization": f"Basic {token}", "Content-Type": "application/json",
    }  # fmt: skip
    connection.request("POST", path, body=json.dumps(content), headers=headers)
    return connection.getresponse().status


def test_a_changed_secret_is_taken_by_the_job_that_migrates(stack: Stack) -> None:
    before = trainer(stack)
    done = stack.run(
        "Job",
        migration(stack),
        "migrate",
        EFFDET_TRAINING_PASSWORD="another-password-of-24-letters",
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
