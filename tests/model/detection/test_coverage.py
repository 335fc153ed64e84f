from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.detection import coverage
from model.detection.anchors import make_anchors
from model.detection.boxes import pairwise_iou
from model.detection.coverage import best_cover, covered_share, try_anchors
from model.network.scaling import ModelConfig, NetworkSpec, resolve


def boxes(size_px: int, number: int = 300) -> NDArray[np.float64]:
    """Of all sizes, some leaving the image, some without area."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-0.1, 0.95, (number, 2)) * size_px
    sides = np.exp(rng.uniform(np.log(2), np.log(size_px), (number, 2)))
    sides[:3] = 0
    return np.concatenate([low, low + sides], axis=1)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"min_level": 2, "max_level": 6}, {"anchor_scale": 2.5, "anchor_octaves": 2}, {"max_level": 8},
    ],
)  # fmt: skip
def test_the_same_as_with_all_anchors_listed(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "BOXES_AT_ONCE", 77)
    spec = replace(resolve(ModelConfig(image_size_px=256), 3), **changes)  # type: ignore[arg-type]
    given = boxes(256)
    listed = pairwise_iou(torch.from_numpy(given).float(), make_anchors(spec)).amax(dim=1)
    np.testing.assert_allclose(best_cover(given, spec), listed.numpy(), atol=2e-5)


def small() -> NetworkSpec:
    return resolve(ModelConfig(), 3)


def test_no_boxes_are_covered_by_nothing() -> None:
    assert covered_share(np.empty((0, 4)), small()) == 0.0


def test_small_boxes_ask_for_smaller_anchors_or_a_larger_image() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.9, (200, 2))
    unit = np.concatenate([low, low + 14 / 512], axis=1)
    trials = {trial.setting: trial for trial in try_anchors(unit, small())}
    now = covered_share(unit * 512, small())
    assert now < 0.2
    assert trials["--image-size 1024"].share > now + 0.3
    assert trials["--image-size 1024"].cost == 4.0
    assert trials["--set model.anchor_scale=2"].share > now + 0.3
    assert trials["--set model.min_level=2"].share > now + 0.3


def test_every_setting_is_one_that_a_network_takes() -> None:
    for trial in try_anchors(boxes(512, 20) / 512, small()):
        if trial.setting.startswith("--image-size"):
            resolve(ModelConfig(image_size_px=int(trial.setting.split()[1])), 3)
        elif trial.setting:
            name, _, value = trial.setting.removeprefix("--set model.").partition("=")
            resolve(
                replace(ModelConfig(), **{name: float(value) if "scale" in name else int(value)}), 3
            )
