"""The process that draws, started and ended as a worker does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from model.data.folder import FolderReader, find_split
from model.data.index import parse_coco
from model.training.evaluation import Evaluation, assess
from orchestrator.records.gallery import Exhibition, Gallery, stepped_name
from orchestrator.records.run import TrackedRun
from orchestrator.records.tracker import Tracker

pytestmark = pytest.mark.integration
PATIENCE_S = 90.0


@pytest.fixture
def exhibition(shapes: Path, tracked: TrackedRun, tmp_path: Path) -> Exhibition:
    found = find_split(shapes, "val")
    assert found is not None
    index = parse_coco(found.annotations.read_bytes(), "val")
    return Exhibition(
        tracked, tmp_path / "records", str(tmp_path / "carried"), index,
        FolderReader(found.images), np.array([0.2, 0.7], dtype=np.float32),
    )  # fmt: skip


def perfect(exhibition: Exhibition) -> Evaluation:
    """As of a model that finds every box."""
    index = exhibition.index
    owner = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    boxes = index.boxes_xyxy.astype(np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    scores = np.full(len(boxes), 0.9)
    return assess(index, np.column_stack([owner, boxes[:, :2], sides, scores, index.labels]))


def test_figures_reach_the_run(
    exhibition: Exhibition, tracker: Tracker, tracked: TrackedRun
) -> None:
    said: list[str] = []
    gallery = Gallery(exhibition.folder, lambda: exhibition, say=said.append)
    evaluation = perfect(exhibition)
    assert evaluation.metrics["val/AP"] == pytest.approx(1.0)
    began = time.monotonic()
    gallery.show(10, evaluation, {"cell0.P4_td.P4_in": 0.5})
    assert time.monotonic() - began < 0.1, "the training does not wait"
    gallery.close(PATIENCE_S)
    assert said == []
    run_id = str(tracked.run_id)
    figures = {file.path for file in tracker.client.list_artifacts(run_id, "figures")}
    assert figures == {
        f"figures/{name}.png"
        for name in (
            "precision_recall", "class_ap", "confusion", "error_kinds", "calibration",
            "anchor_recall", "fusion_weights",
        )
    }  # fmt: skip
    images = [file.path for file in tracker.client.list_artifacts(run_id, "images")]
    assert len(images) == 2 * 4  # fixed, best, worst and weights, each with its small twin
    assert all("+step+10+" in name for name in images)
    assert tracker.client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    table = tracker.read_artifact(run_id, "eval/per_class.json")
    assert table is not None
    assert '["circle", 1.0]' in table


def test_killed_worker_leaves_no_process(exhibition: Exhibition) -> None:
    """The pipe ends with the worker, and the process with the pipe."""
    child = os.fork()
    if child == 0:
        gallery = Gallery(exhibition.folder, lambda: exhibition, say=lambda text: None)
        (exhibition.folder / "pid").write_text(str(gallery._process.pid))
        time.sleep(60)
        os._exit(0)
    pid_file, end = exhibition.folder / "pid", time.monotonic() + 30
    while not pid_file.exists() or not pid_file.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    time.sleep(1.0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    end = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "it outlived its worker"
        time.sleep(0.1)


def test_figure_that_cannot_be_drawn_is_said_and_the_next_is_drawn(
    exhibition: Exhibition, tracker: Tracker, tracked: TrackedRun
) -> None:
    said: list[str] = []
    gallery = Gallery(exhibition.folder, lambda: exhibition, say=said.append)
    broken = Evaluation({}, np.zeros((1, 2)), np.zeros((0, 0, 0), dtype=np.float32))
    gallery.show(1, broken, {})
    end = time.monotonic() + PATIENCE_S
    while "Traceback" not in (exhibition.folder / "figures.log").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    gallery.show(2, perfect(exhibition), {})
    gallery.close(PATIENCE_S)
    assert "figures.log" in said[0]
    images = [file.path for file in tracker.client.list_artifacts(str(tracked.run_id), "images")]
    assert images
    assert all("+step+2+" in name for name in images)


def test_name_of_an_image_is_the_same_when_it_is_sent_again() -> None:
    name = stepped_name("run", "validation best", 7, 123)
    assert name == stepped_name("run", "validation best", 7, 123)
    assert name.startswith("validation best+step+7+timestamp+123+")
    assert name != stepped_name("another", "validation best", 7, 123)
