from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.data.shapes import ShapesConfig
from model.network.scaling import ModelConfig, ScalingConfig
from model.training.config import Duration, OptimConfig, TrainConfig
from orchestrator import errors
from orchestrator.config.codec import decode, encode, flatten, merge, nest, read_yaml
from orchestrator.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LaunchConfig,
    SplitConfig,
    TrainJob,
)
from orchestrator.errors import ConfigError, UserError

CHANGED = TrainJob(
    model=ModelConfig(phi="7x", pretrained="no", fusion="softmax", scaling=ScalingConfig(1.4, -1)),
    data=DataConfig(
        root="there", train=SplitConfig(annotations="a.json", first=3),
        classes=("cat", "dog"), shapes=ShapesConfig(num_train=5), loader_workers=2,
    ),
    train=TrainConfig(duration=Duration(steps=7), bn_group=4, channels_last=False),
    optim=OptimConfig(lr_per_64=1e-3, warmup=Duration(epochs=0.5)),
    evaluation=EvaluationConfig(batch_size=3),
    checkpoint=CheckpointConfig(uri="s3://bucket/there"),
    launch=LaunchConfig(launcher="local", gpus_per_worker=0.5),
)  # fmt: skip


def value_at(path: str, value: Any) -> Any:
    """What `value` is once decoded at a dotted path."""
    found: Any = decode(TrainJob, nest(path, value))
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("job", [TrainJob(), CHANGED], ids=["defaults", "changed"])
def test_encoding_is_read_back_equal_through_yaml(job: TrainJob) -> None:
    assert decode(TrainJob, encode(job)) == job
    assert decode(TrainJob, yaml.safe_load(yaml.safe_dump(encode(job)))) == job


def test_fields_left_out_keep_their_defaults() -> None:
    job = decode(TrainJob, {"optim": {"momentum": 0.8}})
    assert job == replace(TrainJob(), optim=replace(OptimConfig(), momentum=0.8))


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("modle", "model"),
        ("optim.momentun", "momentum"),
        ("model.scaling.widht", "width"),
        ("train.duration.epoch", "epochs"),
    ],
)
def test_unknown_key_is_named_by_its_path_with_the_nearest_known(path: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(TrainJob, nest(path, 1))
    assert caught.value.where == path
    assert caught.value.remedy == f"did you mean {near!r}?"


def test_key_that_resembles_nothing_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"known: .*epochs, steps"):
        decode(TrainJob, nest("train.duration.zzzzzz", 1))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.batch_size", 1.5, "a whole number"),
        ("train.batch_size", "16", "a whole number"),
        ("train.batch_size", True, "a whole number"),
        ("train.batch_size", None, "a whole number"),
        ("optim.momentum", "high", "a number"),
        ("optim.momentum", False, "a number"),
        ("optim.nesterov", 1, "true or false"),
        ("optim.nesterov", "yes", "true or false"),
        ("data.root", 2017, "text"),
        ("run.name", ["a"], "text"),
        ("data.classes", "cat", "a list"),
        ("data.classes", [1], "text"),
        ("optim", 0.1, "a mapping with lr_per_64"),
        ("train.duration", 300, "a mapping with epochs, steps"),
        ("optim.momentum", {"a": 1}, "a number"),
        ("model.phi", 9, "one of 0, 1"),
        ("model.fusion", "fats", "one of fast"),
        ("train.precision", True, "one of auto"),
    ],
)
def test_wrong_type_is_refused_at_its_path(path: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(TrainJob, nest(path, value))
    assert caught.value.where == path
    assert caught.value.expected.startswith(expected)
    assert "\n" not in str(caught.value)


def test_misspelt_choice_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        decode(TrainJob, nest("model.fusion", "sotfmax"))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model.phi", "6", "6"),
        ("model.phi", "7x", "7x"),
        ("model.phi", "'6'", "6"),
        ("model.pretrained", "yes", "yes"),
        ("model.pretrained", "no", "no"),
        ("model.pretrained", "auto", "auto"),
        ("model.fusion", "null", None),
        ("optim.lr_per_64", "1e-3", 1e-3),  # text in YAML 1.1
        ("optim.lr_per_64", "1", 1.0),
        ("optim.nesterov", "on", True),
        ("train.bn_group", "null", None),
        ("data.classes", "[cat, dog]", ("cat", "dog")),
        ("data.classes", "null", None),
        ("launch.gpus_per_worker", "0", 0.0),
    ],
)
def test_yaml_means_what_its_writer_meant(path: str, text: str, expected: Any) -> None:
    value = value_at(path, yaml.safe_load(text))
    assert value == expected
    assert type(value) is type(expected)


def test_merge_lays_one_mapping_on_the_other() -> None:
    below = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merge(below, {"a": {"y": 4}, "c": 5}) == {"a": {"x": 1, "y": 4}, "b": 3, "c": 5}
    assert below == {"a": {"x": 1, "y": 2}, "b": 3}


def test_merge_replaces_a_duration_whole() -> None:
    below = {"train": {"duration": {"epochs": 300}, "seed": 1}}
    merged = merge(below, {"train": {"duration": {"steps": 5}}})
    assert merged == {"train": {"duration": {"steps": 5}, "seed": 1}}


def test_flatten_undoes_nest() -> None:
    assert flatten(nest("a.b.c", [1])) == {"a.b.c": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "YAML"),
        ("- 1\n- 2", "a mapping, got list"),
        ("just text", "a mapping, got str"),
        (b"\xff\xfe\x00", "YAML"),
    ],
)
def test_broken_file_is_named_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "coco.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean 'coco\.yaml'"):
        read_yaml(tmp_path / "cocoo.yaml")
    assert read_yaml(tmp_path / "coco.yaml") == {}


@pytest.mark.parametrize("below", ["folder", "file"])
def test_path_that_is_no_file_is_a_user_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path if below == "folder" else tmp_path / "file" / "train.yaml"
    with pytest.raises(ConfigError, match=str(path)):
        read_yaml(path)


USER_ERRORS = [
    kind
    for name in errors.__all__
    if isinstance(kind := getattr(errors, name), type) and issubclass(kind, UserError)
]


@pytest.mark.parametrize("kind", USER_ERRORS)
def test_user_error_says_where_what_got_and_remedy_and_travels(kind: type[UserError]) -> None:
    error = kind("model.phi", "0..7", "9", "choose one")
    assert str(error) == "model.phi: expected 0..7, got 9; choose one"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
