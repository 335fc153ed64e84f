from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.convert_cli import parse_convert
from orchestrator.config.doctor_cli import CheckUp, ReplayRequest, parse_doctor
from orchestrator.errors import ConfigError


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def parse(*argv: str) -> CheckUp:
    request, _ = parse_doctor("", argv)
    assert isinstance(request, CheckUp)
    return request


def test_nothing_asked_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse()
    assert (found.environment, found.data, found.storage, found.tracker) == (
        True,
        False,
        None,
        False,
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert parse().tracker, "the one that training would take"
    assert not parse("--data", "shapes").tracker


def test_what_is_asked_is_looked_at_and_nothing_else() -> None:
    found = parse("--data", "d", "--phi", "3", "--all", "--tiny-px", "4")
    assert (found.data, found.environment, found.every_image, found.tiny_px) == (
        True,
        False,
        True,
        4.0,
    )
    assert (found.job.data.root, found.job.model.phi) == ("d", "3")
    found = parse("--storage", "s3://b/x", "--tracking-uri", "http://t")
    assert (found.data, found.environment, found.storage, found.tracker) == (
        False,
        False,
        "s3://b/x",
        True,
    )
    found = parse("--environment", "--data", "d", "--storage", "x")
    assert (found.environment, found.data, found.storage) == (True, True, "x")


def test_settings_and_configuration_files(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {root: here}\nmodel: {phi: 1}\n")
    found = parse("--config", str(config), "--set", "model.anchor_scale=2", "--image-size", "640")
    assert found.data
    assert (found.job.model.phi, found.job.model.anchor_scale, found.job.model.image_size_px) == (
        "1",
        2.0,
        640,
    )


def test_records_are_replayed_alone() -> None:
    request, options = parse_doctor(
        "", ["--replay", "a", "b", "--tracking-uri", "http://t", "--json"]
    )
    assert request == ReplayRequest(("a", "b"), "http://t")
    assert options.json
    assert parse_doctor("", ["--replay"])[0] == ReplayRequest(("runs",), None)


@pytest.mark.parametrize(
    ("argv", "where"),
    [
        (["--replay", "--data", "d"], "--replay"),
        (["--replay", "--environment"], "--replay"),
        (["--phi", "3"], "--data"),
        (["--all"], "--data"),
        (["--data", "d", "--tiny-px", "-1"], "--tiny-px"),
        (["--dat", "d"], "command line"),
        (["--data", "d", "--phi", "9"], "model.phi"),
        (["--data", "d", "--set", "=3"], "--set"),
    ],
)
def test_questions_that_make_no_sense(argv: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_doctor("", argv)
    assert caught.value.where == where


def test_conversions() -> None:
    request, options = parse_convert(
        "", ["voc", "VOC2012", "--output", "o", "--copy", "--train-set", "trainval"]
    )
    here = Path.cwd()
    assert (request.kind, request.source, request.output) == ("voc", here / "VOC2012", here / "o")
    assert (request.copy, request.train_set, request.val_set, options.json) == (
        True,
        "trainval",
        None,
        False,
    )
    for argv in (
        ["coco", "x", "--output", "o"], ["voc", "x"], ["voc"],
        ["voc", "s3://b/x", "--output", "o"], ["voc", "x", "--output", "s3://b/o"],
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_convert("", argv)
