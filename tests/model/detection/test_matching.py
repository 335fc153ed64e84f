from __future__ import annotations

import pytest
import torch
from effdet.anchors import AnchorLabeler, Anchors
from torch import Tensor

from model.detection import matching
from model.detection.anchors import make_anchors
from model.detection.boxes import decode, encode
from model.detection.matching import Targets, match
from model.network.scaling import ModelConfig, NetworkSpec, resolve

SPEC = resolve(ModelConfig(image_size_px=128), 7)


def random_batch(seed: int, images: int = 5, most: int = 6) -> tuple[Tensor, Tensor]:
    """Boxes of all sizes; a random number of rows is padding, the first image has no box at all."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.exp(torch.rand(images, most, 2, generator=generator) * 3.4 + 1.2)  # 3 to 100 px
    low = torch.rand(images, most, 2, generator=generator) * (128 - side).clamp(min=1)
    labels = torch.randint(0, 7, (images, most), generator=generator)
    number = torch.randint(1, most + 1, (images, 1), generator=generator)
    number[0] = 0
    padding = torch.arange(most) >= number
    boxes = torch.cat([low, low + side], dim=-1).masked_fill(padding.unsqueeze(-1), 0.0)
    return boxes, labels.masked_fill(padding, -1)


def effdet_targets(spec: NetworkSpec, boxes_xyxy: Tensor, labels: Tensor) -> Targets:
    ratios, size = spec.aspect_ratios, (spec.image_size_px, spec.image_size_px)
    anchors = Anchors(3, spec.max_level, spec.anchor_octaves, ratios, spec.anchor_scale, size)
    labeler = AnchorLabeler(anchors, spec.num_classes)
    classes = torch.where(labels >= 0, labels + 1, labels).float()  # theirs count from 1
    out, codes, _ = labeler.batch_label_anchors(boxes_xyxy[..., [1, 0, 3, 2]], classes)
    images = len(labels)
    return Targets(
        torch.cat([level.reshape(images, -1) for level in out], dim=1),
        torch.cat([level.reshape(images, -1, 4) for level in codes], dim=1),
    )


def brute_force(anchors: Tensor, boxes: Tensor, labels: Tensor) -> Targets:
    """One image, one pair at a time, in plain python."""

    def iou(a: list[float], b: list[float]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        if width <= 0 or height <= 0:
            return 0.0
        both = width * height
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)

    real = [row for row in range(len(labels)) if labels[row] >= 0]
    table = {row: [iou(boxes[row].tolist(), anchor) for anchor in anchors.tolist()] for row in real}
    owner = [-1] * len(anchors)
    for anchor in range(len(anchors)):
        best = max(real, key=lambda row: (table[row][anchor], -row), default=-1)
        if best >= 0 and table[best][anchor] >= 0.5:
            owner[anchor] = best
    for row in reversed(real):  # so that the lowest row has the last word
        owner[table[row].index(max(table[row]))] = row
    targets = Targets(torch.full((len(anchors),), -1), torch.zeros(len(anchors), 4))
    for anchor, row in enumerate(owner):
        if row >= 0:
            targets.labels[anchor] = labels[row]
            targets.codes[anchor] = encode(boxes[row], anchors[anchor])
    return targets


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_effdet(seed: int) -> None:
    boxes, labels = random_batch(seed)
    ours, theirs = match(make_anchors(SPEC), boxes, labels), effdet_targets(SPEC, boxes, labels)
    assert torch.equal(ours.labels, theirs.labels)
    torch.testing.assert_close(ours.codes, theirs.codes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_a_brute_force_twin(seed: int) -> None:
    boxes, labels = random_batch(seed, images=3)
    anchors = make_anchors(SPEC)[::7]
    targets = match(anchors, boxes, labels)
    for image in range(3):
        twin = brute_force(anchors, boxes[image], labels[image])
        assert torch.equal(targets.labels[image], twin.labels)
        torch.testing.assert_close(targets.codes[image], twin.codes)


def test_rules_by_hand() -> None:
    anchors = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],
            [0.0, 0.0, 10.0, 5.0],  # exactly IoU 0.5 with the first box
            [0.0, 0.0, 10.0, 4.9],  # just below: background, no ignore band
            [50.0, 50.0, 90.0, 90.0],  # the best of the small box inside, though IoU is 0.01
            [200.0, 200.0, 210.0, 210.0],
        ]
    )
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [60.0, 60.0, 64.0, 64.0]])
    targets = match(anchors, boxes[None], torch.tensor([[4, 2]]))
    assert targets.labels.tolist() == [[4, 4, -1, 2, -1]]
    assert targets.num_positives() == 3
    positive = targets.labels[0] >= 0
    assert (targets.codes[0][~positive] == 0).all()
    decoded = decode(targets.codes[0], anchors)[positive]
    torch.testing.assert_close(decoded, boxes[[0, 0, 1]], rtol=1e-4, atol=1e-3)


def test_two_boxes_that_want_one_anchor_the_lower_index_wins() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [500.0, 500.0, 510.0, 510.0]])
    worse, better = [2.0, 2.0, 8.0, 8.0], [0.0, 0.0, 10.0, 10.0]
    labels = torch.tensor([[5, 6]])
    assert match(anchors, torch.tensor([[worse, better]]), labels).labels.tolist() == [[5, -1]]
    assert match(anchors, torch.tensor([[better, worse]]), labels).labels.tolist() == [[5, -1]]


@pytest.mark.parametrize("rows", [0, 3])
def test_batch_without_boxes(rows: int) -> None:
    boxes, labels = torch.zeros(2, rows, 4), torch.full((2, rows), -1)
    targets = match(make_anchors(SPEC), boxes, labels)
    assert targets.labels.shape == (2, len(make_anchors(SPEC)))
    assert (targets.labels == -1).all()
    assert (targets.codes == 0).all()
    assert targets.num_positives() == 0


def test_padding_and_turns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """More padding, images one at a time, or a small memory limit: the same targets."""
    boxes, labels = random_batch(9)
    anchors = make_anchors(SPEC)
    whole = match(anchors, boxes, labels)
    wide = match(
        anchors,
        torch.cat([boxes, torch.full((5, 4, 4), 50.0)], dim=1),
        torch.cat([labels, torch.full((5, 4), -1)], dim=1),
    )
    monkeypatch.setattr(matching, "MAX_PAIRS", 2 * boxes.shape[1] * len(anchors))
    turns = match(anchors, boxes, labels)
    for other in (wide, turns):
        assert torch.equal(other.labels, whole.labels)
        assert torch.equal(other.codes, whole.codes)
    for image in range(5):
        rows = slice(image, image + 1)
        alone = match(anchors, boxes[rows], labels[rows])
        assert torch.equal(alone.labels, whole[rows].labels)
        assert torch.equal(alone.codes, whole[rows].codes)
