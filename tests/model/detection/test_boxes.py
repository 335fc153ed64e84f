from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from model.detection.boxes import area, clip, decode, encode, pairwise_iou


def random_boxes(*shape: int, seed: int = 0, span: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * span
    size = torch.rand(*shape, 2, generator=generator) * span / 2 + 0.5
    return torch.cat([corner, corner + size], dim=-1)


def test_area() -> None:
    boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, 3.0, 3.0, 9.0], [5.0, 5.0, 1.0, 1.0]])
    assert area(boxes).tolist() == [18.0, 0.0, 0.0]


def test_iou_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    b = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],
            [5.0, 0.0, 15.0, 10.0],
            [10.0, 0.0, 20.0, 10.0],  # touches
            [2.0, 2.0, 4.0, 4.0],
            [3.0, 3.0, 3.0, 3.0],  # a point
        ]
    )
    torch.testing.assert_close(pairwise_iou(a, b)[0], torch.tensor([1, 50 / 150, 0, 0.04, 0]))
    point = b[4:]
    assert pairwise_iou(point, point).item() == 0.0, "0 / 0 must not be NaN"


def test_iou_equals_torchvision_for_a_batch() -> None:
    a, b = random_boxes(3, 20, seed=1), random_boxes(3, 30, seed=2)
    expected = torch.stack([box_iou(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(pairwise_iou(a, b), expected)


def test_codes_by_hand() -> None:
    anchor = torch.tensor([10.0, 20.0, 30.0, 60.0])  # centre (20, 40), 20 x 40
    box = torch.tensor([20.0, 20.0, 60.0, 40.0])  # centre (40, 30), 40 x 20
    expected = torch.tensor([-0.25, 1.0, -0.693147, 0.693147])  # ty, tx, th, tw
    torch.testing.assert_close(encode(box, anchor), expected)
    assert encode(anchor, anchor).tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_decode_inverts_encode() -> None:
    boxes, anchors = random_boxes(4, 200, seed=3), random_boxes(200, seed=4)
    codes = encode(boxes, anchors)
    torch.testing.assert_close(decode(codes, anchors), boxes, rtol=1e-4, atol=1e-3)


def test_degenerate_boxes_have_finite_codes() -> None:
    point = torch.tensor([5.0, 5.0, 5.0, 5.0])
    assert encode(point, torch.tensor([0.0, 0.0, 10.0, 10.0])).isfinite().all()
    assert encode(torch.tensor([0.0, 0.0, 10.0, 10.0]), point).isfinite().all()


def test_wild_codes_decode_to_finite_boxes() -> None:
    anchors = torch.tensor([0.0, 0.0, 512.0, 512.0])
    assert decode(torch.tensor([0.0, 0.0, 1000.0, 1000.0]), anchors).isfinite().all()


def test_clip_by_hand() -> None:
    boxes = torch.tensor(
        [[-5.0, -6.0, 50.0, 70.0], [10.0, 20.0, 30.0, 40.0], [90.0, 5.0, 95.0, 8.0]]
    )
    expected = torch.tensor(
        [[0.0, 0.0, 40.0, 60.0], [10.0, 20.0, 30.0, 40.0], [40.0, 5.0, 40.0, 8.0]]
    )
    assert torch.equal(clip(boxes, height=60.0, width=40.0), expected)


def test_clip_takes_a_size_for_each_image() -> None:
    boxes = torch.tensor([0.0, 0.0, 100.0, 100.0]).expand(2, 3, 4)
    height, width = torch.tensor([[50.0], [80.0]]), torch.tensor([[90.0], [30.0]])
    clipped = clip(boxes, height, width)
    assert clipped[0, 0].tolist() == [0.0, 0.0, 90.0, 50.0]
    assert clipped[1, 2].tolist() == [0.0, 0.0, 30.0, 80.0]
