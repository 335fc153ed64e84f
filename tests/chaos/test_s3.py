"""S3 that fails, hangs, goes away and is left in the middle: training goes on, nothing torn is used."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from helpers import Done, settings, train
from helpers.jobs import Job, assert_same

from .conftest import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
STEPS = 200
ARGUMENTS = [*settings(launch__threads_per_worker=1), "--steps", str(STEPS)]
LOCAL = ("--launcher", "local")  # the same storage, without Ray's start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    output.mkdir()
    done = train(output, *ARGUMENTS, *LOCAL)
    assert done.code == 0, done.err
    return done


def to_s3(storage: Storage) -> list[str]:
    return [*ARGUMENTS, "--set", f"checkpoint.uri=s3://{storage.bucket}/checkpoints"]


def final_weights(storage: Storage, done: Done, folder: Path) -> Done:
    """The report with the final checkpoint brought here, so that it can be compared."""
    uri = done.report["checkpoint"]
    prefix = uri.removeprefix(f"s3://{storage.bucket}/")
    here = folder / "final"
    here.mkdir()
    for key in storage.keys(prefix):
        storage.client.download_file(storage.bucket, key, str(here / key.rsplit("/", 1)[-1]))
    return Done(
        done.code, done.out.replace(f'"checkpoint": "{uri}"', f'"checkpoint": "{here}"'), ""
    )


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("local", marks=pytest.mark.slow),
        pytest.param("ray", marks=pytest.mark.chaos),
    ],
)
def test_a_fifth_of_all_calls_fails(
    undisturbed: Done, storage: Storage, tmp_path: Path, launcher: str
) -> None:
    storage.proxy.share = 0.2
    job = Job(tmp_path / "out", *to_s3(storage), "--launcher", launcher, **storage.env)
    done = job.finish()
    assert done.code == 0, done.out
    assert storage.proxy.failed > 20
    assert done.report["interruptions"]["failures"] == 0, "training did not stop"
    storage.proxy.share = 0.0
    assert_same(final_weights(storage, done, tmp_path), undisturbed)


@pytest.mark.slow
def test_killed_in_the_middle_of_an_upload(storage: Storage, tmp_path: Path) -> None:
    """Large files go up in parts; what was uploaded of them is not paid for, for ever."""
    large = [*LOCAL, "--set", "model.fpn_channels=640", "--steps", "60"]
    two = [*to_s3(storage), *large, "--set", "checkpoint.part_mib=5"]
    (tmp_path / "undisturbed").mkdir()
    through = train(tmp_path / "undisturbed", *ARGUMENTS, *large)
    assert through.code == 0, through.err
    job = Job(tmp_path / "out", *two, **storage.env)
    job.wait_for(lambda: storage.steps())
    storage.proxy.part_s = 20.0
    job.wait_for(
        lambda: storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads")
    )
    began = storage.steps()
    job.kill()
    storage.proxy.part_s = 0.0
    assert storage.client.list_multipart_uploads(Bucket=storage.bucket)["Uploads"]
    done = Job(tmp_path / "out", *two, **storage.env).finish()
    assert f"going on from the checkpoint of step {began[-1]}" in done.out
    assert "removed what an earlier process had not finished" in done.out
    assert not storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads")
    assert_same(final_weights(storage, done, tmp_path), through)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("truncated", marks=pytest.mark.chaos),
        pytest.param("bit flipped", marks=pytest.mark.chaos),
        pytest.param("without marker", marks=pytest.mark.slow),
    ],
)
def test_the_newest_checkpoint_is_damaged(
    undisturbed: Done, storage: Storage, tmp_path: Path, damage: str
) -> None:
    asked = [*to_s3(storage), *LOCAL]
    job = Job(tmp_path / "out", *asked, **storage.env)
    job.wait_for(lambda: len(storage.steps()) == 2 and storage.steps()[-1] > 20)
    job.kill()
    before, newest = storage.steps()[-2:]
    (key,) = storage.keys(f"step_{newest:08d}/ema.safetensors")
    data = storage.client.get_object(Bucket=storage.bucket, Key=key)["Body"].read()
    if damage == "without marker":
        storage.client.delete_object(
            Bucket=storage.bucket, Key=key.replace("ema.safetensors", "meta.json")
        )
    else:
        flipped = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        changed = data[: len(data) // 2] if damage == "truncated" else flipped
        storage.client.put_object(Bucket=storage.bucket, Key=key, Body=changed)
    done = Job(tmp_path / "out", *asked, **storage.env).finish()
    said = (
        # One more where the kill fell into an upload.
        r"removed what an earlier process had not finished: [12] checkpoint"
        if damage == "without marker"
        else f"skipped a damaged checkpoint: checkpoint step_{newest:08d}"
    )
    assert re.search(said, done.out), done.out
    assert f"going on from the checkpoint of step {before}" in done.out
    assert_same(final_weights(storage, done, tmp_path), undisturbed)


@pytest.mark.chaos
@pytest.mark.parametrize(("how", "seconds", "steps"), [("hangs", 30, 1500), ("refuses", 120, 4000)])
def test_away_for_a_while(
    storage: Storage, tmp_path: Path, how: str, seconds: int, steps: int
) -> None:
    """Training goes on meanwhile: what it would have saved is saved when the storage is back."""
    long = ["--set", "train.checkpoint_every={steps: 50}", "--steps", str(steps)]
    (tmp_path / "undisturbed").mkdir()
    through = train(tmp_path / "undisturbed", *ARGUMENTS, *long, *LOCAL, timeout_s=900)
    assert through.code == 0, through.err
    job = Job(tmp_path / "out", *to_s3(storage), *long, **storage.env)
    job.wait_for(lambda: storage.steps())
    if how == "hangs":
        storage.proxy.hang_s = float(seconds)
    else:
        storage.proxy.away = True
    before = job.text()
    time.sleep(seconds)
    assert job.process.poll() is None, "the run must be longer than the outage"
    assert job.text() != before, "training did not stop"
    storage.proxy.hang_s, storage.proxy.away = 0.0, False
    done = job.finish(900)
    assert done.code == 0, done.out
    assert "the checkpoint of step" in done.out
    assert done.report["interruptions"]["failures"] == 0, "training did not stop"
    assert_same(final_weights(storage, done, tmp_path), through)
