"""The doctor as a job: what it finds in data that were spoiled on purpose, on this machine, in places."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.network.scaling import PHI_TABLE
from model.training.benchmark import Ceilings
from orchestrator.config.cli import DoctorOptions
from orchestrator.config.doctor_cli import CheckUp
from orchestrator.config.schema import CacheConfig, DataConfig, TrainJob
from orchestrator.errors import ConfigError, DataError
from orchestrator.launch import environment_doctor, size_estimate
from orchestrator.launch.dataset_doctor import examine_data, unit_boxes
from orchestrator.launch.doctor_job import DoctorOutcome, run_doctor_job
from orchestrator.launch.environment_doctor import (
    count_as_pinned,
    cpu_quota,
    examine_environment,
    judge_gpus,
    judge_versions,
    read_pins,
)
from orchestrator.launch.places_doctor import examine_storage, examine_tracker
from orchestrator.launch.preflight import Hardware, anchor_ious
from orchestrator.launch.resolve import resolve_job
from orchestrator.launch.size_estimate import estimate_sizes
from orchestrator.records.tracker import Tracker


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of this machine are another test's; the network is the job's small one only."""
    monkeypatch.setattr(size_estimate, "ceilings", lambda *_, **__: Ceilings(0.1, 10.0))
    monkeypatch.setattr(size_estimate, "AROUND", 0)


@pytest.fixture
def root(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "set"))


def ask(
    job: TrainJob, root: Path, **options: Any
) -> tuple[DoctorOutcome, str, dict[str, dict[str, Any]]]:
    """(outcome, text, findings by kind)."""
    out = io.StringIO()
    request = CheckUp(replace(job, data=DataConfig(root=str(root))), data=True, **options)
    done = run_doctor_job(request, DoctorOptions(json=True), out)
    json.dumps(done.report)
    return done, out.getvalue(), {one["kind"]: one for one in done.report["data"]["findings"]}


def test_a_good_set_is_well(job: TrainJob, root: Path) -> None:
    done, text, found = ask(job, root)
    assert (done.code, done.report["status"]) == (0, "well")
    assert not [one for one in found.values() if one["severity"] == "error"]
    data = done.report["data"]
    assert [(one["name"], one["images"], one["looked_at"]) for one in data["splits"]] == [("train", 8, 8), ("val", 4, 4)]  # fmt: skip
    for part in ("8 images", "circle", "training boxes that an anchor covers", "GMACs", "128 px"):
        assert part in text
    assert [one["phi"] for one in data["sizes"]] == ["0"]


def change_json(split: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        path = root / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return do


def corners(document: dict[str, Any]) -> None:
    for row in document["annotations"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, x + w, y + h]


def leak(root: Path) -> None:
    shutil.copy(root / "images/train/train_00003.jpg", root / "images/val/val_00001.jpg")
    with Image.open(root / "images/val/val_00001.jpg") as image:
        width, height = image.size
    change_json("val", lambda d: d["images"][1].update(width=width, height=height))(root)


@pytest.mark.parametrize(
    ("kind", "where", "spoil"),
    [
        ("json", "val", lambda root: (root / "annotations/instances_val.json").write_text("{")),
        (
            "not-coco",
            "train",
            lambda root: (root / "annotations/instances_train.json").write_text("[]"),
        ),
        ("xyxy", "train", change_json("train", corners)),
        ("missing", "train", lambda root: (root / "images/train/train_00003.jpg").unlink()),
        ("damaged", "val", lambda root: (root / "images/val/val_00003.jpg").write_bytes(b"no")),
        ("other-categories", "train, val", change_json("val", lambda d: d["categories"].pop())),
        ("leak-content", "train, val", leak),
        ("no-boxes", "train", change_json("train", lambda d: d["annotations"].clear())),
    ],
)
def test_a_mistake_is_found_and_training_would_suffer(
    job: TrainJob, root: Path, kind: str, where: str, spoil: Callable[[Path], object]
) -> None:
    spoil(root)
    done, text, found = ask(job, root)
    assert done.code == 1
    assert found[kind]["severity"] == "error"
    assert found[kind]["where"] == where
    assert found[kind]["remedy"]
    assert "error" in text


def test_the_sample_and_the_whole(
    job: TrainJob, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.launch.dataset_doctor.SAMPLE", 2)
    (root / "images/train/train_00003.jpg").write_bytes(b"no")
    done, _, found = ask(job, root)
    assert "damaged" not in found
    assert done.report["data"]["splits"][0]["looked_at"] == 2
    _, _, found = ask(job, root, every_image=True)
    assert found["damaged"]["examples"] == ("train_00003.jpg (not an image)",)


def test_one_split_alone_is_a_warning(job: TrainJob, root: Path) -> None:
    (root / "annotations/instances_val.json").unlink()
    done, _, found = ask(job, root)
    assert done.code == 0
    assert found["no-val"]["severity"] == "warning"


@pytest.mark.parametrize("deep", [False, True], ids=["flat names", "names with folders"])
def test_data_on_s3(
    job: TrainJob, root: Path, bucket: str, s3_client: Any, tmp_path: Path, deep: bool
) -> None:
    if deep:
        for split in ("train", "val"):
            change_json(split, lambda d, split=split: [
                row.update(file_name=f"{split}/{row['file_name']}") for row in d["images"]
            ])(root)  # fmt: skip
    (root / "images/train/train_00003.jpg").unlink()
    for path in root.rglob("*"):
        if path.is_file():
            s3_client.upload_file(str(path), bucket, f"set/{path.relative_to(root)}")
    data = DataConfig(root=f"s3://{bucket}/set", cache=CacheConfig(folder=str(tmp_path / "cache")))
    report = examine_data(CheckUp(replace(job, data=data), data=True), io.StringIO())
    (error,) = [one for one in report.findings if one.severity == "error"]
    assert (error.kind, error.count) == ("missing", 1)
    assert report.splits[0].images_folder.startswith("s3://")


def test_a_question_that_is_wrong(job: TrainJob, root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        ask(job, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model\.image_size_px"):
        ask(replace(job, model=replace(job.model, image_size_px=100)), root)
    wanted = replace(job, data=DataConfig(root=str(root), classes=("sircle",)))
    with pytest.raises(DataError, match="did you mean 'circle'"):
        examine_data(CheckUp(wanted, data=True))


def test_coverage_is_what_the_preflight_says(job: TrainJob) -> None:
    report = examine_data(CheckUp(job, data=True), io.StringIO())
    resolved, train, _ = resolve_job(job)
    assert report.anchors[0].share == pytest.approx(
        (anchor_ious(resolved, train) >= 0.5).mean(), abs=1e-6
    )


def test_boxes_are_measured_as_the_network_sees_them(root: Path) -> None:
    from model.data.annotations import read_raw

    raw, _ = read_raw((root / "annotations/instances_train.json").read_bytes(), "train", "x")
    assert raw is not None
    unit = unit_boxes(raw)
    assert unit.shape == (len(raw.owners), 4)
    assert (unit >= 0).all() and (unit <= 1).all()  # noqa: PT018
    longest = raw.sizes_hw[raw.owners].max(axis=1, keepdims=True)
    np.testing.assert_allclose((unit * longest)[:, 2] - (unit * longest)[:, 0], raw.xywh[:, 2])


def test_sizes_grow_with_phi(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_estimate, "AROUND", 1)
    hardware = Hardware(0, 1, "CPU", 8 * 2**30)
    published = TrainJob().model
    sizes, _ = estimate_sizes(published, 80, hardware, torch.device("cpu"))
    assert [one.phi for one in sizes] == list(PHI_TABLE)[:2]
    small, large = sizes
    assert small.asked
    assert large.gmacs > small.gmacs
    assert large.img_per_s < small.img_per_s
    assert small.recomputed_bytes < small.image_bytes
    assert small.images is not None
    assert small.images_recomputed is not None
    assert large.images < small.images < small.images_recomputed  # type: ignore[operator]
    assert small.fixed_bytes + small.images * small.image_bytes <= 8 * 2**30


def test_this_machine_is_described(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_doctor, "driver_and_gpus", lambda: (None, 0))
    found = examine_environment(job)
    rows = dict(found.rows)
    assert torch.__version__.partition("+")[0] in rows["packages"]
    assert found.facts["cores"] == len(os.sched_getaffinity(0))
    assert found.facts["memory_gib"] > 0.5
    assert {"python", "GPUs", "memory", "/dev/shm", "disk"} <= rows.keys()


def test_versions_against_the_pins() -> None:
    pins = {"ray": "2.60.0", "torch": "2.15.0", "timm": "1.0.31"}
    good = {"ray": "2.60.0", "torch": "2.15.0+cu132", "timm": "1.0.31", "unpinned": "1"}
    assert judge_versions(good, pins) == []
    (ray,) = judge_versions(good | {"ray": "2.59.0"}, pins)
    assert (ray.severity, ray.examples) == ("warning", ("ray 2.59.0, pinned 2.60.0",))
    (torch_note,) = judge_versions(good | {"torch": "2.11.0"}, pins)
    assert torch_note.severity == "note"
    (absent,) = judge_versions(good | {"timm": None}, pins)
    assert (absent.severity, absent.examples) == ("error", ("timm",))
    assert count_as_pinned(good, pins) == 3
    assert count_as_pinned(good | {"torch": "2.11.0", "timm": None}, pins) == 1
    assert {"ray", "torch", "mlflow"} <= read_pins().keys()
    assert read_pins(Path("nowhere.txt")) == {}


def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert judge_gpus(2, 2, "580.1", "13.2") == []
    assert judge_gpus(0, 0, None, "13.2") == []
    (old,) = judge_gpus(0, 2, "470.1", "13.2")
    assert (old.severity, old.count) == ("error", 2)
    assert "driver 470.1" in old.what
    (built,) = judge_gpus(0, 1, "580.1", None)
    assert "built for the CPU" in built.what
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert judge_gpus(0, 2, "580.1", "13.2")[0].severity == "note"


def test_a_container_s_share_of_cores(tmp_path: Path) -> None:
    path = tmp_path / "cpu.max"
    path.write_text("150000 100000\n")
    assert cpu_quota(path) == 1.5
    path.write_text("max 100000\n")
    assert cpu_quota(path) is None
    assert cpu_quota(tmp_path / "none") is None


def test_an_output_that_cannot_be_written(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_doctor.os, "access", lambda *_: False)
    kinds = {one.kind for one in examine_environment(job).findings}
    assert "output" in kinds


def test_an_output_that_cannot_be_looked_at(job: TrainJob, tmp_path: Path) -> None:
    """Too long a name is an error of its own to Path, as is a folder that may not be entered."""
    there = replace(job, run=replace(job.run, output=str(tmp_path / ("x" * 300) / "runs")))
    assert "disk" in dict(examine_environment(there).rows)


def test_storage_is_tried_and_left_clean(tmp_path: Path) -> None:
    found = examine_storage(str(tmp_path / "store"))
    assert found.findings == []
    assert found.facts["storage"]["write_mib_per_s"] > 1
    assert set(found.facts["storage"]["seconds"]) == {"write", "read", "list", "delete"}
    assert list((tmp_path / "store").iterdir()) == []


def test_storage_that_does_not_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (wrong,) = examine_storage(str(tmp_path / "file" / "store")).findings
    assert (wrong.severity, wrong.where) == ("error", "storage")
    assert wrong.remedy


def test_storage_on_s3(bucket: str, s3_client: Any) -> None:
    found = examine_storage(f"s3://{bucket}/tmp")
    assert found.findings == []
    assert "Contents" not in s3_client.list_objects_v2(Bucket=bucket)
    (wrong,) = examine_storage(f"s3://{bucket}-nowhere/tmp").findings
    assert "bucket" in wrong.remedy


def test_storage_that_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setattr(LocalFileSystem, "ls", lambda *_, **__: [])
    (wrong,) = examine_storage(str(tmp_path / "store")).findings
    assert "not listed" in wrong.what
    assert list((tmp_path / "store").iterdir()) == []


def test_a_tracker_is_asked(job: TrainJob, tracker: Tracker, closed_port: int) -> None:
    there = replace(job.tracking, uri=tracker.uri, experiment=tracker.experiment)
    found = examine_tracker(replace(job, tracking=there))
    assert found.findings == []
    assert "experiment tests" in dict(found.rows)["tracker"]
    secret = f"http://user:hunter22222@127.0.0.1:{closed_port}"
    away = examine_tracker(replace(job, tracking=replace(job.tracking, uri=secret)))
    (wrong,) = away.findings
    assert wrong.severity == "error"
    assert "hunter22222" not in str(away)


def test_a_tracker_that_fails_meanwhile_does_not_answer(
    job: TrainJob, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Tracker) -> str:
        raise OSError("went away")

    monkeypatch.setattr(Tracker, "artifact_location", fails)
    there = replace(job.tracking, uri=tracker.uri, experiment=tracker.experiment)
    found = examine_tracker(replace(job, tracking=there))
    assert [one.severity for one in found.findings] == ["error"]
    assert "does not work" in dict(found.rows)["tracker"]


def test_data_and_machine_in_one_go(job: TrainJob, root: Path, tmp_path: Path) -> None:
    done, text, _ = ask(job, root, storage=str(tmp_path / "store"))
    assert done.code == 0
    assert set(done.report) == {"status", "environment", "data"}
    assert text.index("environment") < text.index("train")


def test_a_real_dataset() -> None:
    data = Path(__file__).parents[4] / "shared/data/tiny_coco"
    if not data.exists():
        pytest.skip("no ../shared/data/tiny_coco beside the repository")
    job = TrainJob(data=DataConfig(root=str(data)))
    report = examine_data(CheckUp(job, data=True), io.StringIO())
    assert report.well
    assert {one.kind for one in report.findings} >= {"tiny", "untaught-class", "uncovered"}
    assert 0.5 < report.anchors[0].share < 0.8
