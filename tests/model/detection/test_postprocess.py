from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from model.detection.boxes import encode
from model.detection.postprocess import Detections, PostprocessConfig, postprocess, soft_nms


def random_boxes(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 60
    return torch.cat([low, low + 10 + torch.rand(*shape, 2, generator=generator) * 40], dim=-1)


def random_scores(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def slow_soft_nms(boxes: Tensor, scores: Tensor, sigma: float) -> list[tuple[float, int]]:
    """One class, one pair at a time: (decayed score, row) in the order of the picks."""
    left = {row: float(scores[row]) for row in range(len(scores))}
    picked = []
    while left:
        best = max(left, key=lambda row: left[row])
        picked.append((left.pop(best), best))
        for row in left:
            left[row] *= math.exp(-(iou(boxes[best].tolist(), boxes[row].tolist()) ** 2) / sigma)
    return picked


@pytest.mark.parametrize("num_kept", [5, 24, 60])
def test_soft_nms_equals_separate_passes_and_a_merge(num_kept: int) -> None:
    boxes, scores = random_boxes(0, 2, 60), random_scores(1, 2, 60)
    labels = torch.randint(0, 4, (2, 60), generator=torch.Generator().manual_seed(2))
    kept, kept_scores = soft_nms(boxes, scores, labels, 0.5, num_kept)
    for image in range(2):
        merged = []
        for label in range(4):
            rows = (labels[image] == label).nonzero().flatten()
            passed = slow_soft_nms(boxes[image, rows], scores[image, rows], 0.5)
            merged += [(score, int(rows[row])) for score, row in passed]
        merged = sorted(merged, reverse=True)[:num_kept]
        assert kept[image].tolist() == [row for _, row in merged]
        assert kept_scores[image].tolist() == pytest.approx([s for s, _ in merged], rel=1e-4)


def test_soft_nms_by_hand() -> None:
    """Twins decay by exp(-1 / 0.5) in one class; another class is left alone."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0]] * 3])
    kept, scores = soft_nms(
        boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0, 0, 1]]), 0.5, 3
    )
    assert kept.tolist() == [[0, 2, 1]]
    assert scores[0].tolist() == pytest.approx([0.9, 0.7, 0.8 * math.exp(-2)])


def raw_outputs(boxes: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, codes and anchors of a network that predicts exactly these boxes."""
    anchors = torch.tensor([20.0, 20.0, 60.0, 60.0]).expand(boxes.shape[1], 4)
    return torch.logit(probabilities), encode(boxes, anchors.expand_as(boxes)), anchors


def test_hard_nms_equals_torchvision_class_by_class() -> None:
    boxes, probabilities = random_boxes(3, 2, 40), random_scores(4, 2, 40, 3)
    config = PostprocessConfig(nms="hard", candidates=1000, detections=1000)
    size = torch.tensor([[500, 500], [500, 500]])
    results = postprocess(*raw_outputs(boxes, probabilities), size, config)
    for image, result in enumerate(results):
        expected = []
        for label in range(3):
            scores = probabilities[image, :, label]
            kept = nms(boxes[image], scores, 0.5)
            expected += [(float(scores[row]), label, row) for row in kept]
        expected = [row for row in sorted(expected, reverse=True) if row[0] > config.score]
        assert result.labels.tolist() == [label for _, label, _ in expected]
        assert result.scores.tolist() == pytest.approx([s for s, _, _ in expected], rel=1e-4)
        rows = torch.tensor([int(row) for _, _, row in expected])
        torch.testing.assert_close(result.boxes_xyxy, boxes[image][rows], rtol=1e-4, atol=1e-3)


def one_image(config: PostprocessConfig, *, height: int = 100, width: int = 100) -> Detections:
    boxes = torch.tensor([[[-5.0, -5.0, 30.0, 30.0], [50.0, 50.0, 150.0, 90.0]]])
    probabilities = torch.tensor([[[0.9, 0.0005, 0.3], [0.2, 0.6, 0.0001]]])
    raw = raw_outputs(boxes, probabilities)
    return postprocess(*raw, torch.tensor([[height, width]]), config)[0]


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_pairs_of_anchor_and_class_best_first(kind: str) -> None:
    result = one_image(replace(PostprocessConfig(), nms=kind))
    assert result.scores.tolist() == pytest.approx([0.9, 0.6, 0.3, 0.2], rel=1e-4)
    assert result.labels.tolist() == [0, 1, 2, 0], "one anchor may answer with several classes"


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_boxes_are_clipped_to_the_content(kind: str) -> None:
    result = one_image(replace(PostprocessConfig(), nms=kind), height=80, width=120)
    assert result.boxes_xyxy[0].tolist() == pytest.approx([0, 0, 30, 30], abs=1e-3)
    assert result.boxes_xyxy[1].tolist() == pytest.approx([50, 50, 120, 80], abs=1e-3)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_limits(kind: str) -> None:
    base = replace(PostprocessConfig(), nms=kind)
    assert len(one_image(replace(base, score=0.25)).scores) == 3
    assert len(one_image(replace(base, detections=2)).scores) == 2
    assert one_image(replace(base, candidates=3)).scores.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert len(one_image(replace(base, score=0.99)).scores) == 0


def test_images_of_a_batch_do_not_meet() -> None:
    boxes, probabilities = random_boxes(5, 3, 30), random_scores(6, 3, 30, 2)
    logits, codes, anchors = raw_outputs(boxes, probabilities)
    sizes = torch.tensor([[100, 60], [60, 100], [30, 30]])
    config = PostprocessConfig(candidates=40, detections=20)
    together = postprocess(logits, codes, anchors, sizes, config)
    for image in range(3):
        rows = slice(image, image + 1)
        (alone,) = postprocess(logits[rows], codes[rows], anchors, sizes[rows], config)
        torch.testing.assert_close(together[image].boxes_xyxy, alone.boxes_xyxy)
        torch.testing.assert_close(together[image].scores, alone.scores)
        assert torch.equal(together[image].labels, alone.labels)
