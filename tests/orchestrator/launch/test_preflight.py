from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.data.index import parse_coco
from model.detection.anchors import make_anchors
from model.network.footprint import GIB, activations
from model.network.scaling import Phi
from orchestrator.config.schema import CheckpointConfig, DataConfig, LaunchConfig, TrainJob
from orchestrator.errors import ClusterError, ConfigError, DataError, StorageError
from orchestrator.launch.preflight import (
    BASE_BYTES,
    COPIES_OF_WEIGHTS,
    Hardware,
    anchor_ious,
    as_params,
    check_data,
    check_memory,
    check_space,
    choose_hardware,
    describe_data,
    describe_model,
    out_of_memory,
)
from orchestrator.launch.resolve import Derived, ResolvedJob, derive, resolve_job
from orchestrator.storage.filesystems import open_place

Ready = tuple[ResolvedJob, Derived]


@pytest.fixture
def keeping(job: TrainJob) -> TrainJob:
    """The job with its activations kept, so that memory alone decides."""
    return replace(job, train=replace(job.train, checkpoint_activations="no"))


@pytest.fixture
def ready(keeping: TrainJob) -> Ready:
    resolved, train, val = resolve_job(keeping)
    return resolved, derive(resolved, len(train), len(val))


def bytes_for(ready: Ready, images: float) -> int:
    """Memory in which that many images fit at once."""
    resolved, derived = ready
    fixed = derived.cost.params * 4 * COPIES_OF_WEIGHTS + BASE_BYTES
    return int(fixed + images * activations(resolved.recipe.network).total(recompute=False))


def cpu(memory_bytes: int | None) -> Hardware:
    return Hardware(0.0, 1.0, "CPU", memory_bytes)


def test_enough_memory_is_described(ready: Ready) -> None:
    resolved, text = check_memory(*ready, cpu(bytes_for(ready, 4.1)), 1)
    assert not resolved.recipe.checkpoint_activations
    assert "4 at once" in text
    assert f"{bytes_for(ready, 4.1) / GIB:.1f} GiB there (CPU)" in text


def test_too_little_memory_names_the_number_that_fits(ready: Ready) -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(*ready, cpu(bytes_for(ready, 3.5)), 1)
    assert caught.value.where == "train.bn_group"
    assert caught.value.remedy.startswith("3 image(s) fit: set train.bn_group 3 or lower")


def test_the_number_that_fits_does_fit(keeping: TrainJob, ready: Ready) -> None:
    memory = cpu(bytes_for(ready, 2.5))
    with pytest.raises(ConfigError, match=r"2 image\(s\) fit"):
        check_memory(*ready, memory, 1)
    resolved, train, val = resolve_job(replace(keeping, train=replace(keeping.train, bn_group=2)))
    check_memory(resolved, derive(resolved, len(train), len(val)), memory, 1)


def test_not_even_one_image_asks_for_a_smaller_network(ready: Ready) -> None:
    with pytest.raises(ConfigError, match="smaller --phi or --image-size"):
        check_memory(*ready, cpu(bytes_for(ready, 0.5)), 1)


def test_workers_of_one_node_share_its_memory_but_not_their_gpus(ready: Ready) -> None:
    memory = bytes_for(ready, 4.1)
    with pytest.raises(ConfigError):
        check_memory(*ready, cpu(memory), 2)
    check_memory(*ready, replace(cpu(memory), device_kind="GPU"), 2)


def test_activations_are_computed_again_where_they_would_not_fit(job: TrainJob) -> None:
    resolved, train, val = resolve_job(job)
    ready = resolved, derive(resolved, len(train), len(val))
    roomy, text = check_memory(*ready, cpu(bytes_for(ready, 4.1)), 1)
    assert not roomy.recipe.checkpoint_activations
    assert "again" not in text
    tight, text = check_memory(*ready, cpu(bytes_for(ready, 3.5)), 1)
    assert tight.recipe.checkpoint_activations
    assert "activations computed again" in text


@pytest.mark.parametrize(("phi", "recompute"), [("4", False), ("5", True), ("7x", True)])
def test_activations_of_large_networks_where_memory_is_not_known(
    job: TrainJob, phi: Phi, recompute: bool
) -> None:
    """The network of the test keeps its size, whatever phi it says it came from."""
    small = replace(job.model, phi=phi, max_level=6, fusion="fast", drop_path=0.0)
    resolved, train, val = resolve_job(replace(job, model=small))
    decided, _ = check_memory(resolved, derive(resolved, len(train), len(val)), cpu(None), 1)
    assert decided.recipe.checkpoint_activations == recompute


def test_unknown_memory_refuses_nothing(ready: Ready) -> None:
    _, text = check_memory(*ready, cpu(None), 1)
    assert "there" not in text


@pytest.mark.parametrize(
    ("launch", "gpus", "expected"),
    [
        (LaunchConfig(workers=2), 2, (1.0, "GPU")),
        (LaunchConfig(workers=2), 0, (0.0, "CPU")),
        (LaunchConfig(workers=2, gpus_per_worker=0), 2, (0.0, "CPU")),
        (LaunchConfig(workers=2, gpus_per_worker=0.5), 1, (0.5, "GPU")),
    ],
)
def test_hardware_is_chosen(launch: LaunchConfig, gpus: float, expected: tuple[float, str]) -> None:
    found = choose_hardware(TrainJob(launch=launch), cpus=8, gpus=gpus, local=False)
    assert (found.gpus_per_worker, found.device_kind) == expected


@pytest.mark.parametrize(
    ("launch", "where", "expected"),
    [
        (LaunchConfig(workers=3), "launch.gpus_per_worker", "at most 2 GPUs for 3 worker"),
        (LaunchConfig(gpus_per_worker=4), "launch.gpus_per_worker", "at most 2 GPUs"),
        (LaunchConfig(workers=9, gpus_per_worker=0), "launch.workers", "at most 8 CPUs"),
        (LaunchConfig(workers=2, cpus_per_worker=5), "launch.workers", "at most 8 CPUs"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    launch: LaunchConfig, where: str, expected: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        choose_hardware(TrainJob(launch=launch), cpus=8, gpus=2, local=False)
    assert caught.value.where == where
    assert caught.value.expected.startswith(expected)


def test_local_processes_may_share_cores() -> None:
    job = TrainJob(launch=LaunchConfig(launcher="local", workers=4, gpus_per_worker=0))
    assert choose_hardware(job, cpus=1, gpus=0, local=True).device_kind == "CPU"


@pytest.mark.parametrize("damage", ["missing", "unreadable"])
def test_missing_or_unreadable_image_is_named(
    job: TrainJob, shapes: Path, tmp_path: Path, damage: str
) -> None:
    root = Path(shutil.copytree(shapes, tmp_path / "copied"))
    image = root / "images" / "train" / "train_00003.jpg"
    if damage == "missing":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:200])
    job = replace(job, data=DataConfig(root=str(root)))
    resolved, train, _ = resolve_job(job)
    with pytest.raises(DataError, match=r"^image train_00003\.jpg: ") as caught:
        check_data(resolved.train, train, job)
    assert ("1 of 8 images are missing" in str(caught.value)) == (damage == "missing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("check", "decoded"), [("sample", 8), ("all", 8), ("none", 0)])
def test_images_are_decoded_as_asked(job: TrainJob, check: Any, decoded: int) -> None:
    job = replace(job, data=replace(job.data, check=check))
    resolved, train, _ = resolve_job(job)
    assert check_data(resolved.train, train, job) == decoded
    name, text = describe_data(resolved.train, train, "train data", decoded)
    assert name == "train data"
    assert "8 images" in text
    assert "6 classes" in text
    assert ("decoded" in text) == (decoded > 0)


def test_every_derived_number_is_told(ready: Ready) -> None:
    rows = dict(describe_model(*ready))
    assert rows["network"].startswith("custom, from EfficientDet-D0: test_efficientnet (random")
    for part in ("128 px", "16 channels", "fusion fast", "levels P3-P7"):
        assert part in rows["network"]
    assert f"{ready[1].cost.params:,} parameters" in rows["cost"]
    assert rows["schedule"].startswith("20 steps of 4 images (10.0 epochs of 2 steps)")
    assert rows["learning rate"].startswith("0.005 (0.08 for 64 images)")
    assert rows["batch"] == ready[1].plan.describe()


def test_published_network_is_called_by_its_name(job: TrainJob) -> None:
    job = replace(job, model=TrainJob().model)
    resolved, train, val = resolve_job(job)
    rows = dict(describe_model(resolved, derive(resolved, len(train), len(val))))
    assert rows["network"].startswith("EfficientDet-D0: tf_efficientnet_b0 (ImageNet), 512 px")


def test_tracked_parameters_are_flat_and_hold_what_was_derived(ready: Ready) -> None:
    params = as_params(*ready)
    assert params["model.backbone"] == "test_efficientnet"
    assert params["train.duration.steps"] == 20
    assert params["network.fpn_channels"] == 16
    assert params["derived.total_steps"] == 20
    assert params["derived.params"] == ready[1].cost.params
    assert not any(isinstance(value, dict) for value in params.values())


@pytest.mark.parametrize(("kind", "expected"), [("anchors", 1.0), ("specks", 0.0), ("half", 0.5)])
def test_anchor_recall(ready: Ready, kind: str, expected: float) -> None:
    """Boxes that are anchors are all covered, boxes of a pixel never, a crowd does not count."""
    resolved, _ = ready
    x0, y0, x1, y1 = make_anchors(resolved.recipe.network).T
    inside = ((x0 >= 0) & (y0 >= 0) & (x1 <= 128) & (y1 <= 128)).nonzero().flatten()[:4].tolist()
    assert inside
    good = [[float(v) for v in (x0[i], y0[i], x1[i] - x0[i], y1[i] - y0[i])] for i in inside]
    bad = [[5.0 * i, 9.0, 1.0, 1.0] for i in range(len(good))]
    boxes = {"anchors": good, "specks": bad, "half": good + bad}[kind]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]  # fmt: skip
    annotations.append(annotations[0] | {"id": 99, "bbox": [60.0, 3.0, 2.0, 2.0], "iscrowd": 1})
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 128, "height": 128}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    index = parse_coco(json.dumps(document).encode(), "train.json")
    assert (anchor_ious(resolved, index) >= 0.5).mean() == pytest.approx(expected)


def test_checkpoints_need_room(tmp_path: Path) -> None:
    place = open_place(str(tmp_path), "run.output")
    config = CheckpointConfig()
    said = check_space(place, 10_000_000, config)
    assert said is not None
    assert said.startswith("114 MiB a checkpoint, at most 6 of them; ")
    with pytest.raises(
        StorageError, match=r"checkpoint.uri: expected room for two checkpoints of .* MiB"
    ):
        check_space(place, 10**14, config)
    assert check_space(open_place("memory://x", "w"), 10**14, config) is None


@pytest.mark.parametrize(
    ("batch", "group", "fits"), [(8, 8, "set train.bn_group 4,"), (4, 1, "compute activations")]
)
def test_after_running_out_of_memory_the_number_that_fits_is_named(
    job: TrainJob, batch: int, group: int, fits: str
) -> None:
    train = replace(job.train, batch_size=batch, bn_group=group)
    resolved, _, _ = resolve_job(replace(job, train=train))
    error = out_of_memory(resolved, 1)
    assert f"out of memory with {group} image(s) at once" in str(error)
    assert fits in error.remedy


def test_a_worker_says_which_batch_fits(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The device's own error, with what to do instead of an address and a number of bytes."""
    from model.training.runtime import LocalRuntime, NoSink
    from orchestrator.launch import worker
    from orchestrator.storage.background import BackgroundStore
    from orchestrator.storage.checkpoints import CheckpointStore

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(worker, "fit", full)
    place = open_place(str(tmp_path / "checkpoints"), "test")
    store = BackgroundStore(CheckpointStore(place, job.checkpoint, say=print))
    resolved, _, _ = resolve_job(job)
    run = worker.TrackedRun("sqlite://", "0", None, "run", "key", "run-1", 0)
    assignment = worker.Assignment(resolved, run, place.uri, {}, np.empty(0, dtype=np.float32))
    runtime = LocalRuntime(store=store, sink=NoSink())
    with pytest.raises(ConfigError, match=r"out of memory with 4 image.* set train.bn_group 2,"):
        worker.train(assignment, runtime, store)
