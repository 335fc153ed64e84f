from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.data.shapes import CATEGORIES, ShapesConfig
from model.network.scaling import ModelConfig
from model.training.config import Duration
from orchestrator.config.codec import decode, encode, merge, nest
from orchestrator.config.schema import (
    DataConfig,
    LaunchConfig,
    RunConfig,
    SplitConfig,
    TrainJob,
)
from orchestrator.errors import ConfigError, DataError, StorageError
from orchestrator.launch.preflight import check_data
from orchestrator.launch.resolve import ResolvedJob, derive, output_folder, resolve_job

TINY_SHAPES = ShapesConfig(num_train=4, num_val=2, size_px=32)


def changed(job: TrainJob, **settings: Any) -> TrainJob:
    """A job with settings replaced: `__` in a name stands for the dot of its path."""
    mapping = encode(job)
    for name, value in settings.items():
        mapping = merge(mapping, nest(name.replace("__", "."), value))
    return decode(TrainJob, mapping)


def resolved(job: TrainJob, **settings: Any) -> ResolvedJob:
    return resolve_job(changed(job, **settings))[0]


@pytest.fixture
def copied(shapes: Path, tmp_path: Path) -> Path:
    """The tiny dataset, to be changed."""
    return Path(shutil.copytree(shapes, tmp_path / "copied"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_everything_open_is_derived(job: TrainJob, shapes: Path) -> None:
    found, train, val = resolve_job(changed(job, model__image_size_px=None))
    assert (len(train), len(val)) == (8, 4)
    assert found.name == "pictures-d0"
    assert found.notes == ()
    assert found.train.annotations == shapes / "annotations" / "instances_train.json"
    assert found.val.images == shapes / "images" / "val"
    assert found.output.is_absolute()
    recipe = found.recipe
    assert recipe.network.num_classes == len(CATEGORIES)
    assert recipe.network.image_size_px == 512  # of phi 0
    assert recipe.network.fpn_channels == 16  # as asked
    assert recipe.bn_group == 4
    assert recipe.loader_workers == 0


def test_batch_and_schedule_are_derived(job: TrainJob) -> None:
    job = changed(job, train__duration={"epochs": 3}, optim__warmup={"epochs": 0.5})
    derived = derive(resolved(job), num_train=8, num_val=4)
    assert derived.schedule.steps_per_epoch == 2
    assert derived.schedule.total == 6
    assert derived.schedule.warmup == 1
    assert derived.plan.num_groups == 1
    assert derived.cost.params > 0


def test_name_is_taken_as_given(job: TrainJob) -> None:
    assert resolved(job, run__name="mine").name == "mine"


@pytest.mark.parametrize(("asked", "expected"), [("auto", True), ("yes", True), ("no", False)])
def test_own_data_start_from_imagenet(job: TrainJob, asked: str, expected: bool) -> None:
    assert resolved(job, model__pretrained=asked).recipe.pretrained is expected


@pytest.mark.parametrize(("asked", "expected"), [("auto", False), ("yes", True)])
def test_demo_is_drawn_once_and_starts_from_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    job = TrainJob(data=DataConfig(shapes=TINY_SHAPES), model=ModelConfig(pretrained=asked))
    first = resolved(job)
    assert first.recipe.pretrained is expected
    assert first.name == "shapes-d0"
    assert first.output == tmp_path / "runs"
    assert "drawn" in first.notes[0]
    assert "found" in resolved(job).notes[0]


def test_demo_in_the_way_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "data" / "shapes").mkdir(parents=True)
    with pytest.raises(DataError, match=r"^data\.shapes: "):
        resolve_job(TrainJob(run=RunConfig(output=str(tmp_path / "runs"))))


def test_resolved_job_travels(job: TrainJob) -> None:
    found = resolved(job)
    assert pickle.loads(pickle.dumps(found)) == found
    assert json.loads(json.dumps(found.config()))["pretrained"] is False


@pytest.mark.parametrize(
    "settings",
    [
        {"launch__workers": 4},
        {"launch__gpus_per_worker": 1.0},
        {"launch__launcher": "local"},
        {"run__output": "elsewhere"},
        {"tracking__experiment": "other"},
        {"checkpoint__keep_latest": 5},
    ],
)
def test_key_does_not_depend_on_who_runs_it(job: TrainJob, settings: dict[str, Any]) -> None:
    assert resolved(job, **settings).key() == resolved(job).key()


@pytest.mark.parametrize(
    "settings",
    [
        {"run__name": "other"},
        {"model__fpn_channels": 24},
        {"train__seed": 1},
        {"train__batch_size": 8},
        {"train__duration": {"steps": 21}},
        {"optim__lr_per_64": 0.01},
        {"loss__box": 1.0},
        {"data__augment__flip": 0.0},
        {"data__train__first": 5},
    ],
)
def test_key_depends_on_what_is_trained(job: TrainJob, settings: dict[str, Any]) -> None:
    assert resolved(job, **settings).key() != resolved(job).key()


def test_output_of_a_submitted_job_does_not_go_with_rays_copy_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "_ray_pkg_0123"
    package.mkdir()
    monkeypatch.chdir(package)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder, (note,) = output_folder(TrainJob())
    assert folder == tmp_path / "home" / "efficientdet" / "runs"
    assert str(folder) in note
    absolute = TrainJob(run=RunConfig(output=str(tmp_path / "mine")))
    assert output_folder(absolute) == (tmp_path / "mine", [])


def test_missing_folder_is_named(job: TrainJob, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.root: expected a folder, got none at .*/nowhere"):
        resolved(job, data__root=str(tmp_path / "nowhere"))


def test_folder_without_training_json_is_named(job: TrainJob, copied: Path) -> None:
    (copied / "annotations" / "instances_train.json").unlink()
    with pytest.raises(DataError, match=rf"^data\.root: .*train.*json, got none in {copied}"):
        resolved(job, data__root=str(copied))


def test_two_candidates_are_both_named(job: TrainJob, copied: Path) -> None:
    annotations = copied / "annotations"
    shutil.copy(annotations / "instances_train.json", annotations / "instances_train2.json")
    with pytest.raises(DataError) as caught:
        resolved(job, data__root=str(copied))
    assert caught.value.where == "data.train.annotations"
    assert caught.value.got == "instances_train.json, instances_train2.json"
    chosen = str(annotations / "instances_train2.json")
    images = str(copied / "images" / "train")
    job = changed(job, data__train__annotations=chosen, data__train__images=images)
    assert str(resolved(job, data__root=str(copied)).train.annotations) == chosen


def test_without_validation_json_training_images_are_evaluated_and_it_is_said(
    job: TrainJob, copied: Path
) -> None:
    (copied / "annotations" / "instances_val.json").unlink()
    found, train, val = resolve_job(changed(job, data__root=str(copied)))
    assert val is train
    assert any("TRAINING images" in note for note in found.notes)


@pytest.mark.parametrize(
    ("split", "where"),
    [
        (SplitConfig(annotations="no.json"), "data.train.annotations"),
        (SplitConfig(images="no"), "data.train.annotations"),
    ],
)
def test_split_that_is_not_there_is_refused(job: TrainJob, split: SplitConfig, where: str) -> None:
    job = replace(job, data=replace(job.data, train=split))
    with pytest.raises((DataError, ConfigError)) as caught:
        resolve_job(job)
    assert caught.value.where == where


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "at least one image": lambda document: document.update(images=[], annotations=[]),
    "at least one box": lambda document: document.update(annotations=[]),
    "the categories of": lambda document: document["categories"].append({"id": 91, "name": "x"}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_data_nothing_can_be_learnt_from_is_refused(
    job: TrainJob, copied: Path, message: str
) -> None:
    edit(copied / "annotations" / "instances_train.json", BROKEN[message])
    with pytest.raises(DataError, match=message):
        resolved(job, data__root=str(copied))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("launch.workers", 0),
        ("launch.max_failures", -1),
        ("train.log_every_steps", 0),
        ("train.seed", -1),
        ("train.bn_group", 0),
        ("optim.lr_per_64", 0.0),
        ("optim.lr_per_64", float("nan")),
        ("optim.ema_decay", 1.0),
        ("optim.momentum", -0.1),
        ("data.augment.flip", 1.5),
        ("data.train.first", -5),
        ("data.val.first", 0),
        ("data.loader_workers", -1),
        ("evaluation.batch_size", 0),
        ("checkpoint.keep_latest", 0),
        ("model.image_size_px", 130),
        ("model.scaling.backbone", -1),
        ("train.duration", {"steps": 0}),
        ("train.duration", {}),
        ("train.batch_size", 0),
    ],
)
def test_number_out_of_range_is_refused_at_its_path(job: TrainJob, path: str, value: Any) -> None:
    if path == "train.duration":
        job = replace(job, train=replace(job.train, duration=Duration(**value)))
    else:
        job = changed(job, **{path.replace(".", "__"): value})
    with pytest.raises(ConfigError) as caught:
        derive(resolve_job(job)[0], 8, 4)
    assert caught.value.where == path
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"train__batch_size": 9}, "train.batch_size"),  # more than the 8 images
        ({"train__bn_group": 3}, "train.bn_group"),  # no divisor of 4
        ({"launch__workers": 3}, "train.batch_size"),  # 4 images over 3 workers
        ({"train__bn_group": 1}, "train.bn_group"),  # batch norm of one value at P7
    ],
)
def test_batch_that_does_not_fit_is_refused(
    job: TrainJob, settings: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        derive(resolved(job, **settings), 8, 4)
    assert caught.value.where == where


def test_a_published_name_brings_its_variant(job: TrainJob) -> None:
    found = resolved(job, model__init="efficientdet_d0", model__backbone=None)
    assert found.recipe.network.backbone == "efficientnet_b0"
    assert found.recipe.network.padding == "symmetric"
    assert not found.recipe.network.redundant_bias
    assert resolved(job, model__init="tf_efficientdet_d0").recipe.network.padding == "same"


def test_a_published_name_of_another_size_is_refused(job: TrainJob) -> None:
    with pytest.raises(ConfigError, match=r"model\.phi: expected 2, as tf_efficientdet_d2 has"):
        resolve_job(changed(job, model__init="tf_efficientdet_d2"))


def test_initial_weights_replace_pretrained_ones(job: TrainJob, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    own = changed(job, model__init=str(tmp_path / "weights.pth"), model__pretrained="auto")
    assert not resolve_job(own)[0].recipe.pretrained
    assert resolved(job, model__pretrained="auto").recipe.pretrained
    with pytest.raises(ConfigError, match="give one of them"):
        resolve_job(changed(own, model__pretrained="yes"))


def test_initial_weights_of_a_relative_path_stay_the_same_place(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.pth").touch()
    monkeypatch.chdir(tmp_path)
    found = resolved(job, model__init="weights.pth")
    assert found.job.model.init == str(tmp_path / "weights.pth")


def test_frozen_parts_reach_the_recipe(job: TrainJob) -> None:
    assert resolved(job, model__freeze=["backbone", "pyramid"]).recipe.freeze == (
        "backbone",
        "pyramid",
    )
    with pytest.raises(ConfigError, match="backbone"):
        changed(job, model__freeze=["backbon"])


@pytest.mark.integration
def test_a_dataset_on_s3_is_found_like_a_folder(
    job: TrainJob, shapes: Path, bucket: str, s3_client: Any, tmp_path: Path
) -> None:
    for file in shapes.rglob("*.*"):
        s3_client.upload_file(str(file), bucket, f"set/{file.relative_to(shapes)}")
    cache = {"data__cache__folder": str(tmp_path / "cache")}
    found, train, val = resolve_job(changed(job, data__root=f"s3://{bucket}/set", **cache))
    local, local_train, _ = resolve_job(job)
    assert (len(train), len(val)) == (8, 4)
    assert found.recipe.network == local.recipe.network
    remote_set, _ = pickle.loads(pickle.dumps(found)).datasets()
    local_set, _ = local.datasets()
    for image in range(len(local_train)):
        assert (remote_set[(3, image)].pixels == local_set[(3, image)].pixels).all()
    assert found.key() != local.key()
    assert check_data(found.train, train, job) == 8


@pytest.mark.integration
def test_a_bucket_that_is_not_there_is_named(job: TrainJob, s3: str) -> None:
    with pytest.raises(DataError, match="s3://nobody-has-this/set"):
        resolve_job(changed(job, data__root="s3://nobody-has-this/set"))
    with pytest.raises(StorageError, match="a path or a URL fsspec knows"):
        resolve_job(changed(job, data__root="s4://bucket/set"))


def test_every_number_of_workers_of_a_range_must_share_the_batch(job: TrainJob) -> None:
    """A batch of 4 in groups of 2: 1 and 2 workers, 4 with shared groups, but never 3."""
    train = replace(job.train, batch_size=4, bn_group=2)
    asked = replace(job, train=train, launch=LaunchConfig(workers=1, max_workers=4))
    resolved, train_index, val_index = resolve_job(asked)
    with pytest.raises(ConfigError, match=r"launch.max_workers: .*none for 3 .*--workers 1:2, or"):
        derive(resolved, len(train_index), len(val_index))
    fits = replace(resolved, job=replace(asked, launch=LaunchConfig(workers=1, max_workers=2)))
    assert derive(fits, len(train_index), len(val_index)).plan.world_size == 1
