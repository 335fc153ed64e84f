"""An evaluation scores what the training scored at its end, on any number of workers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import Done, command, environment, settings, train

pytestmark = pytest.mark.integration
ONE_THREAD = ("--threads-per-worker", "1", "--cpus-per-worker", "0.5")
SHORT = [
    *settings(
        data__shapes__num_val=20, evaluation__batch_size=4, launch__threads_per_worker=1,
        train__checkpoint_every="{steps: 1000}", model__anchor_scale=1.5,
    ), "--launcher", "local", "--steps", "12",
]  # fmt: skip
TINY_COCO = Path(__file__).parents[3] / "shared/data/tiny_coco"


def evaluate(run: Done, folder: Path, *arguments: str, timeout_s: float = 300, **env: str) -> Done:
    """jobs/evaluate.py in a process of its own, in the folder of the training."""
    done = subprocess.run(
        command(
            str(run.report["checkpoint"]).removeprefix("file://"), *arguments, "--no-figures",
            "--json", job="evaluate.py",
        ),
        capture_output=True, text=True, timeout=timeout_s, env=environment(**env), cwd=folder,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def assert_as_trained(run: Done, found: Done) -> None:
    assert found.code == 0, found.err + found.out
    report = found.report
    mine: dict[str, Any] = {f"val/{name}": value for name, value in report["metrics"].items()}
    mine |= {f"val_class/{k}": value for k, value in report["classes"].items() if value is not None}
    expected = run.report["metrics"]
    assert mine == pytest.approx(expected, abs=1e-9)
    assert report["step"] == run.report["step"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A short training and the folder it ran in."""
    folder = tmp_path_factory.mktemp("evaluate")
    done = train(folder / "runs", *SHORT)
    assert done.code == 0, done.err + done.out
    assert done.report["metrics"]["val/AP"] > 0, "zeros are easily equal"
    return done, folder


def detections(found: Done) -> bytes:
    return (Path(found.report["output"]) / "detections.json").read_bytes()


def test_two_workers_and_none_find_what_the_training_found(run: tuple[Done, Path]) -> None:
    trained, folder = run
    alone = evaluate(trained, folder, *ONE_THREAD, "--output", "alone")
    assert_as_trained(trained, alone)
    shared = evaluate(trained, folder, *ONE_THREAD, "--output", "shared", "--workers", "2")
    assert_as_trained(trained, shared)
    assert len(json.loads(detections(alone))) > 20
    assert detections(shared) == detections(alone)
    assert "Traceback" not in shared.err + shared.out


@pytest.mark.slow
def test_more_workers_than_there_is_room_for(run: tuple[Done, Path]) -> None:
    trained, folder = run
    too_many = str(2 * len(os.sched_getaffinity(0)) + 90)
    refused = evaluate(trained, folder, "--workers", too_many, "--output", "refused")
    assert refused.code == 2
    (line,) = refused.err.strip().splitlines()
    assert line.startswith("error: --workers: expected at most")
    assert refused.report["status"] == "refused"
    assert not (folder / "refused" / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
def test_one_and_three_workers(run: tuple[Done, Path], workers: str) -> None:
    trained, folder = run
    alone = evaluate(trained, folder, *ONE_THREAD, "--output", f"alone-{workers}")
    shared = evaluate(
        trained, folder, *ONE_THREAD, "--output", f"shared-{workers}", "--workers", workers
    )
    assert_as_trained(trained, shared)
    assert detections(shared) == detections(alone)


@pytest.mark.slow
def test_photographs(tmp_path: Path) -> None:
    """COCO's own pictures, 80 classes, crowds; a named run; and any number of workers."""
    if not TINY_COCO.is_dir():
        pytest.skip("no ../shared/data/tiny_coco beside the repository")
    done = train(
        tmp_path / "runs", *SHORT, "--data", str(TINY_COCO), "--pretrained", "no",
        "--set", "data.val.annotations=" + str(TINY_COCO / "annotations/instances_train2017.json"),
        "--set", "data.val.images=" + str(TINY_COCO / "images/train2017"),
    )  # fmt: skip
    assert done.code == 0, done.err + done.out
    for workers in ("0", "1", "2", "3"):
        found = evaluate(done, tmp_path, *ONE_THREAD, "--output", workers, "--workers", workers)
        assert_as_trained(done, found)
    by_run = subprocess.run(
        command(
            f"runs:/{done.report['run_id']}", *ONE_THREAD, "--no-figures", "--json",
            "--tracking-uri", done.report["tracking_uri"], job="evaluate.py",
        ),
        capture_output=True, text=True, timeout=300, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert_as_trained(done, Done(by_run.returncode, by_run.stdout, by_run.stderr))
