"""What a sweep refuses, in one line, before a trial takes anything; and how many run at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.sweep_cli import parse_tune
from orchestrator.errors import ClusterError, ConfigError
from orchestrator.launch.entry import run_job
from orchestrator.search.config import SweepConfig, decode_sweep
from orchestrator.search.sweep_job import concurrency, run_sweep_job

TRAIN = {
    "data": {"shapes": {"num_train": 8, "num_val": 4}, "train": {}, "val": {}},
    "model": {"phi": "0", "backbone": "test_efficientnet", "pretrained": "no",
              "image_size_px": 128},
    "train": {"duration": {"epochs": 2}, "batch_size": 4},
}  # fmt: skip
SWEEP: dict[str, Any] = {
    "train": TRAIN,
    "objective": {"metric": "val/AP"},
    "trials": {"num": 2},
    "space": {"model.fusion": {"choice": ["fast", "sum"]}},
}
Refuse = Callable[..., str]


@pytest.fixture
def refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refuse:
    """The one line of a refusal, given what differs from a good sweep and flags."""

    def run(changes: dict[str, Any], *flags: str) -> str:
        path = tmp_path / "it.yaml"
        path.write_text(yaml.safe_dump({**SWEEP, **changes}))
        argv = ["--config", str(path), "--output", str(tmp_path / "out"), *flags]
        monkeypatch.setattr(sys, "argv", ["tune.py", *argv])
        code = run_job(lambda: parse_tune("", argv), run_sweep_job)
        captured = capsys.readouterr()
        assert code == 2, captured
        assert "Traceback" not in captured.err
        [line] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({"spaec": {}}, (), "spaec: expected a known key, got 'spaec'; did you mean 'space'"),
        ({"space": {}}, (), "space: expected at least one knob, got nothing"),
        (
            {"space": {"model.fuson": {"choice": ["fast"]}}}, (),
            "space.model.fuson: expected a path of the train config, got 'model.fuson'; did you "
            "mean 'model.fusion'",
        ),
        (
            {"space": {"model.fusion": {"choice": ["fats"]}}}, (),
            "space.model.fusion: expected one of",
        ),
        (
            {"objective": {"metric": "val/mAP"}}, (),
            "objective.metric: expected a metric that is reported",
        ),
        (
            {"objective": {"metric": "val_class/zebra"}}, (),
            "objective[0].metric: expected a metric that is reported",
        ),
        ({"trials": {"num": "many"}}, (), "trials.num: expected"),
        ({"trials": {"num": 3}}, (), "trials.num: expected at most the 2 points of the space"),
        (
            {"train": {**TRAIN, "launch": {"launcher": "local"}}}, (),
            "train.launch.launcher: expected ray, got local",
        ),
        ({}, ("--resume",), "--resume: expected a sweep that was begun as 'it', got none in"),
        ({}, ("--extend", "4"), "--extend: expected a sweep that was begun as 'it', got none in"),
        ({}, ("--extend", "0"), "--extend: expected at least 1, got 0"),
        ({}, ("--set", "trials.nmu=3"), "trials.nmu: expected a known key"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    refuse: Refuse, changes: dict[str, Any], flags: tuple[str, ...], expected: str
) -> None:
    assert expected in refuse(changes, *flags)


def test_a_sweep_that_goes_on_is_the_same_one(refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "sweeps" / "it"
    folder.mkdir(parents=True)
    train = {**TRAIN, "run": {"output": str(tmp_path / "out")}}
    begun = decode_sweep({**SWEEP, "train": train, "name": "it"}).to_mapping()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(begun))
    line = refuse({}, "--set", "train.train.batch_size=2")
    assert line.startswith("train: expected what the sweep was begun with, got another: ")
    assert "train.batch_size 2 (was 4)" in line
    # Where it is tracked is nobody's concern, and its password is in no file.
    assert "s3cret" not in json.dumps(
        decode_sweep(
            {**SWEEP, "train": {**TRAIN, "tracking": {"uri": "postgresql://bob:s3cret@db/x"}}}
        ).to_mapping()
    )


def test_flags_reach_into_the_training_job_and_the_space(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    path = tmp_path / "it.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "train": "train.yaml"}))
    request, _ = parse_tune("", [
        "--config", str(path), "--set", "train.optim.lr_per_64=0.5", "--trials", "7",
        "--set", "space.model.fusion={choice: [sum]}",
        "--set", "space.model.scaling.width={choice: [1.2, 1.3]}",
    ])  # fmt: skip
    sweep = decode_sweep(request.mapping | {"trials": {"num": 2}}, folder=request.folder)
    assert request.mapping["trials"]["num"] == 7
    assert sweep.base.optim.lr_per_64 == 0.5
    assert sweep.base.train.batch_size == 4
    assert sweep.space.to_mapping() == {
        "model.fusion": {"choice": ["sum"]}, "model.scaling.width": {"choice": [1.2, 1.3]},
    }  # fmt: skip


def _sweep(**trials: Any) -> SweepConfig:
    sweep = decode_sweep(SWEEP)
    return replace(sweep, trials=replace(sweep.trials, **trials))


@pytest.mark.parametrize(
    ("trials", "room", "expected"),
    [
        ({"num": 48}, 8, 8),
        ({"num": 2}, 8, 2),
        ({"num": 2, "seeds": 3}, 8, 6),
        ({"num": 48, "workers_per_trial": 4}, 10, 2),
        ({"num": 48, "workers_per_trial": 4, "concurrent": 1}, 10, 1),
    ],
)
def test_as_many_at_once_as_there_is_room_for(
    trials: dict[str, Any], room: int, expected: int
) -> None:
    assert concurrency(_sweep(**trials), room) == expected


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"trials.concurrent: expected at most 2: room for 10"):
        concurrency(_sweep(workers_per_trial=4, concurrent=3), 10)
    with pytest.raises(ClusterError, match=r"trials.workers_per_trial: expected at most 3"):
        concurrency(_sweep(workers_per_trial=4), 3)


def test_no_space_left_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        parse_tune("", [])
