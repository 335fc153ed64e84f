from __future__ import annotations

import pytest
import torch
from effdet.anchors import Anchors

from model.detection.anchors import make_anchors
from model.network.scaling import ModelConfig, NetworkSpec, Phi, resolve


def effdet_anchors(spec: NetworkSpec) -> torch.Tensor:
    """The peer's anchors, turned from yxyx to xyxy."""
    peer = Anchors(
        spec.min_level,
        spec.max_level,
        spec.anchor_octaves,
        spec.aspect_ratios,
        spec.anchor_scale,
        (spec.image_size_px, spec.image_size_px),
    )
    return peer.boxes[:, [1, 0, 3, 2]]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(phi="7", image_size_px=256),  # anchor scale 5
        ModelConfig(phi="7x", image_size_px=512),  # P8
        ModelConfig(image_size_px=384, max_level=6, anchor_octaves=2, anchor_scale=3.0),
    ],
)
def test_equal_to_effdet(config: ModelConfig) -> None:
    spec = resolve(config, 90)
    torch.testing.assert_close(make_anchors(spec), effdet_anchors(spec), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("phi", "number"), [("0", 49_104), ("1", 76_725), ("3", 150_381)])
def test_number_of_anchors(phi: Phi, number: int) -> None:
    assert make_anchors(resolve(ModelConfig(phi=phi), 90)).shape == (number, 4)


def test_anchors_listed_by_hand() -> None:
    """D0, first cell of P3 (stride 8, centre (4, 4), side 32), then its neighbour and the last."""
    anchors = make_anchors(resolve(ModelConfig(), 90))
    first_cell = [
        [-12.0, -12.0, 20.0, 20.0],
        [-18.4, -7.2, 26.4, 15.2],
        [-7.2, -18.4, 15.2, 26.4],
        [-16.1587, -16.1587, 24.1587, 24.1587],  # 32 * 2^(1/3) = 40.3175
        [-24.2222, -10.1111, 32.2222, 18.1111],
        [-10.1111, -24.2222, 18.1111, 32.2222],
        [-21.3984, -21.3984, 29.3984, 29.3984],  # 32 * 2^(2/3) = 50.7968
        [-31.5578, -13.7789, 39.5578, 21.7789],
        [-13.7789, -31.5578, 21.7789, 39.5578],
    ]
    torch.testing.assert_close(anchors[:9], torch.tensor(first_cell), rtol=0, atol=1e-3)
    assert anchors[9].tolist() == [-4.0, -12.0, 28.0, 20.0], "the next column comes next"
    assert anchors[9 * 64].tolist() == [-12.0, -4.0, 20.0, 28.0], "then the next row"
    assert anchors[-9].tolist() == [192.0, 192.0, 704.0, 704.0], "the last cell of P7, side 512"
