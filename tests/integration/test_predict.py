"""jobs/predict.py as users run it: killed, resumed, on several workers; held to the training's AP."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT, Done, command, descendants, environment, settings, train

from orchestrator.config.predict_cli import PredictOptions, PredictRequest
from orchestrator.launch.predict_job import PredictOutcome, run_predict_job

pytestmark = pytest.mark.integration
IMAGES = 480
PARTS_BEFORE_A_KILL = 4
TINY_COCO = ROOT.parent / "shared" / "data" / "tiny_coco"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Long enough to find something."""
    output = tmp_path_factory.mktemp("predict") / "runs"
    output.mkdir()
    changes = settings(
        train__duration="{steps: 120}", train__evaluate_every="{steps: 120}",
        data__shapes__num_val=24, launch__threads_per_worker=1,
    )  # fmt: skip
    done = train(output, *changes, "--launcher", "local")
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def crowd(trained: Done, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same few images under many names, and one that is none."""
    folder = tmp_path_factory.mktemp("crowd")
    sources = sorted(dataset(trained).glob("images/val/*.jpg"))
    for number in range(1, IMAGES):
        os.link(sources[number % len(sources)], folder / f"{number:06d}.jpg")
    (folder / "000000.jpg").write_text("no image")
    return folder


def dataset(trained: Done) -> Path:
    (found,) = Path(trained.report["tracking_uri"].removeprefix("sqlite:///")).parent.rglob(
        "instances_val.json"
    )
    return found.parents[1]


def checkpoint(trained: Done) -> str:
    return str(trained.report["checkpoint"].removeprefix("file://"))


def predict_here(trained: Done, images: Path, output: Path, score: float) -> PredictOutcome:
    """In this process."""
    request = PredictRequest(
        checkpoint(trained), (str(images),), str(output), score=score, draw=False, workers=0
    )
    return run_predict_job(request, PredictOptions(json=False), io.StringIO())


class Started:
    """A prediction in the background."""

    def __init__(self, trained: Done, output: Path, *more: str) -> None:
        self.output = output
        self.process = subprocess.Popen(
            command(
                checkpoint(trained), *more, "--output", str(output), "--json", job="predict.py"
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

    def wait_for(self, parts: int) -> None:
        end = time.monotonic() + 120
        while len(list((self.output / "parts").glob("*.json"))) < parts:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def wait_for_workers(self, number: int) -> list[int]:
        """Their processes."""
        end = time.monotonic() + 60
        while True:
            below = descendants(self.process.pid)
            found = [pid for pid, line in below if "ray::FleetWorker" in line]
            if len(found) == number:
                return found
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def finish(self) -> Done:
        out, err = self.process.communicate(timeout=300)
        return Done(self.process.returncode, out, err)


def average_precision(truth: Path, detections: Path) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluator = COCOeval(coco, coco.loadRes(str(detections)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    found = zip(names, map(float, evaluator.stats), strict=False)
    return {f"val/{name}": value for name, value in found if value >= 0}


def assert_same_ap(trained: Done, truth: Path, images: Path, folder: Path) -> None:
    """Predictions above evaluation's threshold have evaluation's AP, by the book."""
    numbered = folder / "numbered"
    numbered.mkdir()
    for image in json.loads(truth.read_text())["images"]:
        name = Path(image["file_name"])
        (numbered / f"{image['id']:012d}{name.suffix}").symlink_to(images / name)
    done = predict_here(trained, numbered, folder / "out", score=0.001)
    assert done.code == 0
    assert done.report["image_ids"] == "the file name's number"
    found = average_precision(truth, folder / "out" / "detections.json")
    expected = trained.report["metrics"]
    assert found["val/AP50"] > 0.0  # else any two would be equal
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)


def test_predictions_have_the_aps_of_the_training(trained: Done, tmp_path: Path) -> None:
    data = dataset(trained)
    truth = data / "annotations" / "instances_val.json"
    assert_same_ap(trained, truth, data / "images" / "val", tmp_path)


def test_killed_and_resumed_on_other_workers_leaves_the_same_bytes(
    trained: Done, crowd: Path, tmp_path: Path
) -> None:
    """The driver is killed once, then a worker; the reference was left in peace, in one process."""
    whole = predict_here(trained, crowd, tmp_path / "whole", score=0.05)
    assert (whole.code, whole.report["failed"]) == (1, 1)
    assert whole.report["detections"] > IMAGES

    asked = (str(crowd), "--score", "0.05", "--no-draw")
    alone = Started(trained, tmp_path / "killed", *asked, "--workers", "0")
    alone.wait_for(PARTS_BEFORE_A_KILL)
    alone.process.kill()
    alone.finish()
    left = len(list((tmp_path / "killed" / "parts").glob("*.json")))
    two = Started(trained, tmp_path / "killed", *asked, "--workers", "2")
    two.wait_for(left + PARTS_BEFORE_A_KILL)
    os.kill(two.wait_for_workers(2)[0], signal.SIGKILL)
    below = [pid for pid, _ in descendants(two.process.pid)]
    resumed = two.finish()
    assert resumed.code == 1, resumed.err
    assert f"goes on: {left} of " in resumed.out
    assert "its process died; another takes its place" in resumed.out
    mine, expected = (
        (tmp_path / name / "detections.json").read_bytes() for name in ("killed", "whole")
    )
    assert mine == expected
    failed = json.loads((tmp_path / "killed" / "failed.json").read_text())
    assert [one["file_name"] for one in failed] == ["000000.jpg"]
    same = ("images", "failed", "detections", "image_ids")
    assert {key: resumed.report[key] for key in same} == {key: whole.report[key] for key in same}
    assert not [pid for pid in below if is_ours(pid)]


@pytest.mark.slow
def test_stopped_with_workers_it_ends_as_at_ctrl_c(
    trained: Done, crowd: Path, tmp_path: Path
) -> None:
    """Ray, started in between, has a say in what SIGTERM does."""
    started = Started(trained, tmp_path / "out", str(crowd), "--no-draw", "--workers", "2")
    started.wait_for(1)
    below = [pid for pid, _ in descendants(started.process.pid)]
    started.process.terminate()
    done = started.finish()
    assert done.code == 130, done.err
    assert done.report["status"] == "interrupted"
    assert done.report["shards_done"] < done.report["shards"]
    assert "interrupted: the same command goes on with the " in done.out
    assert "Traceback" not in done.err
    assert not [pid for pid in below if is_ours(pid)]


def is_ours(pid: int) -> bool:
    try:
        return b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
def test_more_workers_than_there_is_room_for_are_one_line(
    trained: Done, crowd: Path, tmp_path: Path
) -> None:
    done = Started(trained, tmp_path / "out", str(crowd), "--workers", "999").finish()
    assert done.code == 2
    assert done.err.startswith("error: --workers: expected at most ")
    assert done.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not TINY_COCO.is_dir(), reason="the small part of COCO is not there")
def test_real_images_have_the_aps_of_the_training(tmp_path: Path) -> None:
    """Scored on what it was trained on: so few images teach nothing of others."""
    output = tmp_path / "runs"
    output.mkdir()
    truth = TINY_COCO / "annotations" / "instances_train2017.json"
    images = TINY_COCO / "images" / "train2017"
    changes = settings(
        data__root=TINY_COCO, data__val__images=images, data__val__annotations=truth,
        data__augment__enabled="false", train__duration="{steps: 200}",
        train__evaluate_every="{steps: 200}", model__image_size_px=128, model__pretrained="no",
        launch__threads_per_worker=1,
    )  # fmt: skip
    done = train(output, *changes, "--launcher", "local")
    assert done.code == 0, done.err
    assert_same_ap(done, truth, images, tmp_path)
