"""What the pods run besides the jobs: datasets in, old checkpoints out, nodes announced, buckets made."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import boto3
import pytest
from fsspec.implementations.local import LocalFileSystem
from helpers import ROOT, environment
from helpers.manifests import K8S, pods
from s3fs import S3FileSystem

from orchestrator.storage.filesystems import Place

SCRIPTS = K8S / "base" / "platform" / "scripts"
DAY_S = 86400.0


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def retain() -> ModuleType:
    return load(SCRIPTS / "retain_checkpoints.py")


@pytest.fixture(scope="module")
def prefetch() -> ModuleType:
    return load(SCRIPTS / "prefetch.py")


@pytest.fixture(scope="module")
def drain() -> ModuleType:
    return load(SCRIPTS / "drain.py")


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client; the bucket `bucket` is there and empty."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=item["Key"])
    return client


def keys(client: Any) -> dict[str, int]:
    found = client.list_objects_v2(Bucket="bucket").get("Contents", ())
    return {item["Key"]: item["Size"] for item in found}


def archive(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return str(path)


@pytest.mark.slow
def test_archives_are_unpacked_into_the_bucket_once(
    prefetch: ModuleType, s3: Any, tmp_path: Path
) -> None:
    files = {
        "annotations/a.json": b"{}" * 50,
        **{f"val2017/{n:03}.jpg": bytes([n]) * n for n in range(1, 40)},
    }
    source = archive(tmp_path / "coco.zip", files)
    place = prefetch.open_place("s3://bucket/coco", "--to")
    assert prefetch.unpack(source, place, threads=4) == (40, 0)
    assert keys(s3) == {f"coco/{name}": len(content) for name, content in files.items()}
    s3.put_object(Bucket="bucket", Key="coco/val2017/005.jpg", Body=b"torn")
    s3.delete_object(Bucket="bucket", Key="coco/val2017/007.jpg")
    assert prefetch.unpack(source, place, threads=4) == (2, 38)
    body = s3.get_object(Bucket="bucket", Key="coco/val2017/005.jpg")["Body"].read()
    assert body == files["val2017/005.jpg"]


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd", "a/../../b"])
def test_an_archive_that_points_outside_is_refused(prefetch: ModuleType, name: str) -> None:
    with zipfile.ZipFile(io.BytesIO(), "w") as opened:
        opened.writestr(name, b"x")
        with pytest.raises(SystemExit, match="leaves"):
            prefetch.members(opened)


def test_a_source_that_is_no_archive_is_said_in_one_line(
    prefetch: ModuleType, tmp_path: Path, closed_port: int
) -> None:
    torn = tmp_path / "torn.zip"
    torn.write_bytes(b"half of an archive")
    for source, why in (
        (str(torn), "got something else"),
        (str(tmp_path / "none.zip"), "found nothing"),
        (f"http://127.0.0.1:{closed_port}/coco.zip", "found nothing: .*onnect"),
    ):
        with pytest.raises(SystemExit, match=f"{source}: expected a zip archive, {why}"):
            prefetch.open_archive(source)


@pytest.mark.slow
def test_buckets_are_made_once(s3: Any) -> None:
    buckets = load(K8S / "overlays" / "local" / "buckets.py")
    for _ in range(2):
        buckets.make(["bucket", "another-one"], patience_s=5)
    assert {"bucket", "another-one"} <= {found["Name"] for found in s3.list_buckets()["Buckets"]}


def run_of(status: str = "FINISHED", ended_days_ago: float | None = 40.0) -> Any:
    ended = None if ended_days_ago is None else (time.time() - ended_days_ago * DAY_S) * 1000
    return SimpleNamespace(info=SimpleNamespace(status=status, end_time=ended))


@pytest.mark.parametrize(
    ("run", "written_days_ago", "gone"),
    [
        (run_of(), 40, [1, 3]),
        (run_of(ended_days_ago=10), 10, []),
        (run_of("FAILED"), 400, []),
        (run_of("RUNNING", None), 400, []),
        (run_of("KILLED"), 400, []),
        (None, 40, []),
        (None, 100, [1, 2, 3, 4]),
    ],
)
def test_only_what_nobody_needs_goes(
    retain: ModuleType, run: Any, written_days_ago: float, gone: list[int]
) -> None:
    """Step 2 is the best, step 4 the newest."""
    values = {1: 0.1, 2: 0.5, 3: None, 4: 0.3}
    steps = tuple((f"step_{step:08}", value) for step, value in values.items())
    now = time.time()
    found = retain.Found(None, now - written_days_ago * DAY_S, steps)
    names = retain.superfluous(found, run, now=now, finished_s=30 * DAY_S, orphan_s=90 * DAY_S)
    assert names == [f"step_{step:08}" for step in gone]


@pytest.mark.slow
def test_checkpoints_of_a_finished_run_go_with_their_entries(
    retain: ModuleType, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'm.db'}")
    client = MlflowClient()
    experiment = client.create_experiment("retention", str(tmp_path / "artifacts"))
    run = client.create_run(experiment, tags={"effdet.run_key": "old-run"})
    client.set_terminated(run.info.run_id, "FINISHED", int((time.time() - 40 * DAY_S) * 1000))
    client.create_run(experiment, tags={"effdet.run_key": "live-run"})
    for name in ("old-run", "live-run", "unknown-run"):
        for step, value in ((1, 0.5), (2, 0.4), (3, 0.1), (4, 0.3)):
            base = f"runs/{name}/step_{step:08}"
            s3.put_object(Bucket="bucket", Key=f"{base}/model.safetensors", Body=b"w")
            meta = f'{{"metrics": {{"val/AP": {value}}}}}'.encode()
            s3.put_object(Bucket="bucket", Key=f"{base}/meta.json", Body=meta)
    s3.put_object(Bucket="bucket", Key="runs/ray/notes.json", Body=b"{}")
    before = keys(s3)

    days = {"finished_days": 30.0, "orphan_days": 90.0}
    assert retain.run("s3://bucket/runs", **days, dry_run=True) == retain.Tally(2)
    assert keys(s3) == before
    assert retain.run("s3://bucket/runs", **days, dry_run=False) == retain.Tally(2)
    gone = {
        key for key in before if "old-run/step_00000002" in key or "old-run/step_00000003" in key
    }
    assert set(before) - set(keys(s3)) == gone
    assert retain.run("s3://bucket/runs", **days, dry_run=False) == retain.Tally()


class Guarded(LocalFileSystem):  # type: ignore[misc]
    """A store that lets nobody remove anything of one folder."""

    cachable = False

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.kept = kept

    def rm_file(self, path: str) -> None:
        if f"/{self.kept}/" in path:
            raise PermissionError("Access Denied")
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        if path.endswith(self.kept):
            raise PermissionError("Access Denied")
        super().rm(path, recursive, maxdepth)


def test_what_may_not_be_removed_stays_whole_and_the_others_go(
    retain: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"step_{step:08}" for step in (1, 2, 3)]
    for name in names:
        (tmp_path / name).mkdir()
        for file in ("meta.json", "model.safetensors"):
            (tmp_path / name / file).write_text("{}")
    place = Place(f"file://{tmp_path}", Guarded(names[1]), str(tmp_path))
    found = retain.Found(place, 0.0, tuple((name, None) for name in names))
    tally = retain.clear(None, None, found, names)
    assert tally == retain.Tally(2, (f"file://{tmp_path}/{names[1]}",))
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "meta.json", "model.safetensors", names[1]
    ]  # fmt: skip
    assert f"kept file://{tmp_path}/{names[1]}: Access Denied" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_removed_while_the_tracker_is_away(
    retain: ModuleType, s3: Any, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    s3.put_object(Bucket="bucket", Key="runs/a/step_00000001/meta.json", Body=b"{}")
    before = keys(s3)
    with pytest.raises(Exception, match=r"(?i)connection|retries"):
        retain.run("s3://bucket/runs", finished_days=0, orphan_days=0, dry_run=False)
    assert keys(s3) == before


@pytest.mark.parametrize(
    ("titles", "busy"),
    [
        (["bash", "ray start --block", "ray::IDLE"], False),
        (["raylet", "ray::RayTrainWorker.execute"], True),
        ([], False),
    ],
)
def test_a_node_is_busy_while_it_works(
    drain: ModuleType, titles: list[str], busy: bool, tmp_path: Path
) -> None:
    for number, title in enumerate(titles, 100):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_text(title)
    assert drain.busy(tmp_path) is busy


def test_waiting_ends_with_the_work_or_the_time(drain: ModuleType) -> None:
    began = time.monotonic()
    drain.wait(30, working=lambda: False)
    drain.wait(0.1, working=lambda: True)
    assert time.monotonic() - began < 5


def hooks() -> list[tuple[str, ...]]:
    """What pods run before they end, but for sleeping."""
    found = {
        tuple(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ()))
        for pod in pods() for container in pod.containers()
    }  # fmt: skip
    return sorted(words for words in found if words[:1] == ("python",))


def test_a_pods_end_is_not_held_up_where_nothing_works_or_by_an_error(tmp_path: Path) -> None:
    (words,) = hooks()
    folder, _, script = words[1].rpartition("/")
    assert folder == "/scripts"
    env = environment(HOME=str(tmp_path))  # without the address that a pod has
    done = subprocess.run([sys.executable, str(SCRIPTS / script), *words[2:]], env=env, timeout=60)
    assert done.returncode == 0


@pytest.mark.slow
def test_ray_hears_that_its_node_goes(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
import ray, drain
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
         runtime_env={{"env_vars": {{"OMP_NUM_THREADS": "1"}}}})
@ray.remote
def work(): time.sleep(60)
task = work.remote()
end = time.monotonic() + 60
while not drain.busy() and time.monotonic() < end: time.sleep(0.2)
print("busy", drain.busy())
print("accepted", drain.announce(ray.get_runtime_context().gcs_address, 3600))
"""
    env = environment(HOME=str(tmp_path), RAY_AUTH_MODE="disabled")
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert "busy True" in done.stdout
    assert "accepted True" in done.stdout, done.stdout + done.stderr
