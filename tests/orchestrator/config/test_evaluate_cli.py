from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.evaluate_cli import EvaluateRequest, parse_evaluate
from orchestrator.errors import ConfigError


def parse(*arguments: str) -> EvaluateRequest:
    return parse_evaluate("", arguments)[0]


def test_defaults() -> None:
    assert parse("runs:/1") == EvaluateRequest("runs:/1")
    assert parse_evaluate("", ["m", "--json"])[1].json


def test_flags_are_settings_left_to_right() -> None:
    found = parse(
        "m", "--against", "n", "--data", "photos", "--set", "data.val.first=9", "--nms", "hard",
        "--score", ".1", "--detections", "5", "--set", "evaluation.iou=0.4", "--phi", "2",
        "--score", "0.2", "--scales", "0.8, 1,1.2", "--flip", "--workers", "3",
        "--threads-per-worker", "2", "--split", "train", "--output", "there", "--no-figures",
    )  # fmt: skip
    assert found.sources == ("m", "n")
    assert found.changes == {
        "data": {"root": "photos", "val": {"first": 9}},
        "evaluation": {"nms": "hard", "score": 0.2, "detections": 5, "iou": 0.4},
        "model": {"phi": 2},
    }
    assert (found.scales, found.flip, found.split) == ((0.8, 1.0, 1.2), True, "train")
    assert (found.workers, found.threads, found.output) == (3, 2, Path("there"))
    assert not found.figures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--set", "optim.momentum=1"],
            "a path in data, evaluation or model, got 'optim.momentum'",
        ),
        (["--set", "data=1"], "a path in data"),
        (["--scales", "1,x"], "--scales: expected positive numbers"),
        (["--scales", "1,-1"], "--scales: expected positive numbers"),
        (["--scales", "1,,2"], "--scales: expected positive numbers"),
        (["--output", "s3://b/x"], "--output: expected a local folder, got s3://b/x"),
        (["--resamples", "0"], "--resamples: expected at least 1"),
        (["--split", "test"], "valid flags"),
        (["--worker", "1"], "did you mean '--workers'?"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse("m", *arguments)
