from __future__ import annotations

import pytest

from orchestrator.config.predict_cli import PredictOptions, PredictRequest, parse_predict
from orchestrator.errors import ConfigError


def test_flags() -> None:
    request, options = parse_predict(
        "",
        ["m", "a.jpg", "b/", "--score", ".5", "--no-draw", "--json", "--workers", "3", "--every-s", "2"],
    )  # fmt: skip
    assert request == PredictRequest(
        "m", ("a.jpg", "b/"), score=0.5, draw=False, workers=3, every_s=2.0
    )
    assert options == PredictOptions(json=True)
    request, options = parse_predict("", ["m", "a.jpg", "--draw", "--fresh", "--workers", "auto"])
    assert request == PredictRequest("m", ("a.jpg",), draw=True, workers=None)
    assert options == PredictOptions(json=False, fresh=True)
    assert parse_predict("", ["m", "i"])[0] == PredictRequest("m", ("i",))


@pytest.mark.parametrize(
    "bad",
    [
        ["--score", "1.5"], ["--score", "nan"], ["--batch-size", "0"], ["--score", "high"],
        ["--workers", "many"], ["--workers", "-1"], ["--format", "xml"], ["--draw", "--no-draw"],
        ["--frames-every", "2", "--every-s", "1"],
    ],
)  # fmt: skip
def test_refusals(bad: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_predict("", ["m", "a.jpg", *bad])
