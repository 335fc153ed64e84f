from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from model.training.config import Duration
from orchestrator.config.cli import (
    TRAIN_FLAGS,
    Flag,
    Options,
    benchmark_parser,
    parse_benchmark,
    parse_train,
    train_parser,
)
from orchestrator.config.codec import encode, flatten
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.launch.entry import run_job
from orchestrator.launch.train_job import Outcome

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


def parse(*argv: str) -> tuple[TrainJob, Options]:
    return parse_train(train_parser("train.py", "Train."), argv)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(
        "model: {phi: 2}\ntrain: {batch_size: 8, duration: {epochs: 12}}\noptim: {momentum: 0.5}\n"
    )
    return str(path)


def test_nothing_asked_is_the_default_job() -> None:
    assert parse() == (TrainJob(), Options(dry_run=False, json=False, resume="auto"))


def test_yaml_wins_over_defaults_and_flags_over_yaml(config: str) -> None:
    job, _ = parse("--config", config, "--batch-size", "32")
    assert job.model.phi == "2"
    assert job.train.batch_size == 32
    assert job.optim.momentum == 0.5
    assert job.optim.lr_per_64 == TrainJob().optim.lr_per_64
    assert parse("--batch-size", "32", "--config", config)[0] == job


@pytest.mark.parametrize(
    ("argv", "phi"),
    [
        (["--phi", "3", "--set", "model.phi=4"], "4"),
        (["--set", "model.phi=4", "--phi", "3"], "3"),
        (["--phi", "3", "--phi", "5"], "5"),
        (["--set", "model.phi=4", "--set", "model.phi=7x"], "7x"),
    ],
)
def test_flags_and_set_count_left_to_right(config: str, argv: list[str], phi: str) -> None:
    assert parse("--config", config, *argv)[0].model.phi == phi


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--steps", "5"], Duration(steps=5)),
        (["--set", "train.duration.steps=5"], Duration(steps=5)),
        (["--set", "train.duration={steps: 5}"], Duration(steps=5)),
        (["--steps", "5", "--epochs", "0.5"], Duration(epochs=0.5)),
    ],
)
def test_duration_is_replaced_whole(config: str, argv: list[str], expected: Duration) -> None:
    assert parse("--config", config, *argv)[0].train.duration == expected


@pytest.mark.parametrize("flag", TRAIN_FLAGS, ids=lambda flag: flag.name)
def test_flag_is_bound_to_a_setting_that_exists(flag: Flag) -> None:
    path = flag.path if flag.unit is None else f"{flag.path}.{flag.unit}"
    assert path in flatten(encode(TrainJob()))
    assert flag.path in train_parser("train.py", "Train.").format_help()


def test_flags_are_unique() -> None:
    assert max(Counter(flag.name for flag in TRAIN_FLAGS).values()) == 1


@pytest.mark.parametrize("flag", TRAIN_FLAGS, ids=lambda flag: flag.name)
@pytest.mark.parametrize("how", ["doubled", "dropped", "joined"])
def test_mistyped_flag_suggests_the_one_that_was_meant(flag: Flag, how: str) -> None:
    name = flag.name
    if how == "dropped" and len(name) > 5:
        argv = [name[:3] + name[4:], "1"]
    elif how == "joined":
        argv = [f"{name}{name[-1]}=1"]
    else:
        argv = [name + name[-1], "1"]
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert caught.value.remedy == f"did you mean {name!r}?"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--phi"], "expected one argument"),
        (["--phi", "9"], "model.phi: expected one of 0, 1"),
        (["--batch-size", "many"], "train.batch_size: expected a whole number, got 'many'"),
        (["--set", "optim.momentum"], "--set: expected PATH=VALUE"),
        (["--set", "=5"], "--set: expected PATH=VALUE"),
        (["--set", "optim.momentun=0.9"], "optim.momentun: .*did you mean 'momentum'"),
        (["--set", "optim..momentum=0.9"], "optim.: expected a known key"),
        (["--dry-rum"], "did you mean '--dry-run'"),
        (["stray"], "stray"),
        (["--config", "no/such/file.yaml"], "--config: expected a YAML file"),
    ],
)
def test_mistake_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


def test_broken_config_file_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("model: {phi: 1")
    with pytest.raises(ConfigError, match="YAML"):
        parse("--config", str(path))


@pytest.mark.parametrize(
    ("argv", "resume"),
    [
        ([], "auto"),
        (["--resume"], "must"),
        (["--resume", "--phi", "1"], "must"),
        (["--resume", "0a1b"], "0a1b"),
        (["--fresh"], "never"),
    ],
)
def test_resume(argv: list[str], resume: str) -> None:
    assert parse(*argv)[1].resume == resume


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_shipped_config_is_understood_and_changes_something(path: Path) -> None:
    assert parse("--config", str(path))[0] != TrainJob()


@pytest.mark.parametrize("as_json", [False, True])
def test_job_ends_with_2_and_one_line_after_a_mistake(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--phi", "9", *(["--json"] if as_json else [])]
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    code = run_job(lambda: parse(*argv), lambda job, options: pytest.fail("must not run"))
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: model.phi: expected")
    assert bool(printed.out) == as_json
    if as_json:
        assert json.loads(printed.out)["status"] == "refused"


def test_job_hands_on_its_code_and_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_job(lambda: parse("--json"), lambda job, options: Outcome(130, {"step": 3}))
    assert code == 130
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step": 3}


def test_a_list_flag_is_split_at_commas() -> None:
    job, _ = parse_train(train_parser("train.py", ""), ["--freeze", "backbone, pyramid"])
    assert job.model.freeze == ("backbone", "pyramid")


def test_benchmark_options() -> None:
    arguments = ["--phi", "2", "--rounds", "3", "--model-scale", "64", "--link-gb-per-s", "12.5"]
    job, options = parse_benchmark(benchmark_parser("benchmark.py", ""), arguments)
    assert job.model.phi == "2"
    assert (options.rounds, options.model_scale, options.gb_per_s) == (3, 64, 12.5)
    assert options.latency_us is None


def test_workers_may_be_a_range() -> None:
    for argv, least, most in (
        (["--workers", "4"], 4, None),
        (["--workers", "2:16"], 2, 16),
        (["--workers", "2:16", "--workers", "8"], 8, None),  # takes the range back
    ):
        job, _ = parse(*argv)
        assert (job.launch.workers, job.launch.max_workers) == (least, most)
