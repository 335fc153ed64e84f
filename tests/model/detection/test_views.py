"""Several views of an image against boxes brought back, put together and suppressed one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.detection.postprocess import Candidates, PostprocessConfig, suppress
from model.detection.views import View, in_source, mirror, plan_views, together
from model.errors import ConfigError
from model.network.scaling import ModelConfig, resolve

from .test_postprocess import iou, random_boxes, random_scores

SPEC = resolve(ModelConfig(phi="0"), 3)


def test_sizes_are_what_the_levels_allow() -> None:
    assert plan_views(SPEC) == (View(512),)
    assert plan_views(SPEC, (0.8, 1, 1.2)) == (View(384), View(512), View(640))
    assert plan_views(SPEC, (0.01,)) == (View(128),)
    assert plan_views(SPEC, (1, 1.5), flip=True) == (
        View(512), View(512, True), View(768), View(768, True),
    )  # fmt: skip


@pytest.mark.parametrize("scales", [(), (0.0,), (-1.0,), (math.nan,), (math.inf,), (1.0, 1.05)])
def test_scales_that_make_no_sense(scales: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="--scales"):
        plan_views(SPEC, scales)


def test_mirrored_is_the_content_not_the_padding() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    sizes = torch.tensor([[4.0, 3.0], [2.0, 4.0]])
    mirrored = mirror(images, sizes)
    for image, (height, width) in enumerate(((4, 3), (2, 4))):
        for y in range(4):
            for x in range(4):
                source = width - 1 - x if y < height and x < width else x
                assert torch.equal(mirrored[image, :, y, x], images[image, :, y, source])
    assert torch.equal(mirror(mirrored, sizes), images)


def seen(boxes: Tensor, scale: float, width: float, *, flip: bool) -> Tensor:
    """Source boxes [C, 4] as a view of that scale, whose content is `width` wide, shows them."""
    rows = []
    for x0, y0, x1, y1 in (boxes * scale).tolist():
        rows.append([width - x1, y0, width - x0, y1] if flip else [x0, y0, x1, y1])
    return torch.tensor(rows)


def slow(
    views: list[tuple[Tensor, Tensor, Tensor]], config: PostprocessConfig
) -> list[tuple[float, int, list[float]]]:
    """(score, label, box), one pair at a time, of views that are in source pixels already."""
    left = [
        [float(score), int(label), box.tolist()]
        for boxes, scores, labels in views
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ]
    picked = []
    while left and len(picked) < config.detections:
        best = max(left, key=lambda row: row[0])
        left.remove(best)
        picked.append((best[0], best[1], best[2]))
        for row in [row for row in left if row[1] == best[1]]:
            overlap = iou(best[2], row[2])
            if config.nms == "soft":
                row[0] *= math.exp(-overlap * overlap / config.sigma)
            elif overlap > config.iou:
                left.remove(row)
    return [row for row in picked if row[0] > config.score]


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_equal_to_brute_force(nms: str) -> None:
    """Two sizes, mirrored and not, of two images; every view moves and scores boxes its own way."""
    config = PostprocessConfig(nms=nms, score=0.01, detections=30)
    width_of, height_of = (90.0, 70.0), (60.0, 80.0)
    source = random_boxes(0, 2, 12).double()
    candidates, expected = [], [[], []]
    for number, (scale, flip) in enumerate(((1.0, False), (1.0, True), (1.5, False), (1.5, True))):
        moved = source + random_boxes(number + 1, 2, 12).double() / 30
        scores = random_scores(number, 2, 12).double()
        labels = torch.randint(0, 2, (2, 12), generator=torch.Generator().manual_seed(number))
        sizes = torch.tensor(
            [[h * scale, w * scale] for h, w in zip(height_of, width_of, strict=True)]
        )
        shown = torch.stack([
            seen(moved[image], scale, float(sizes[image, 1]), flip=flip) for image in range(2)
        ]).double()  # fmt: skip
        view = Candidates(shown, scores, labels)
        candidates.append(in_source(view, sizes, torch.tensor([scale, scale]), flip=flip))
        for image in range(2):
            expected[image].append((moved[image], scores[image], labels[image]))
    results = suppress(together(candidates), config)
    for result, views in zip(results, expected, strict=True):
        wanted = slow(views, config)
        assert 5 < len(wanted) <= 30
        assert result.scores.tolist() == pytest.approx([row[0] for row in wanted], rel=1e-6)
        assert result.labels.tolist() == [row[1] for row in wanted]
        torch.testing.assert_close(
            result.boxes_xyxy, torch.tensor([row[2] for row in wanted], dtype=torch.float64),
            rtol=1e-5, atol=1e-4,
        )  # fmt: skip


def test_what_each_view_finds_is_kept_once() -> None:
    box = torch.tensor([[[10.0, 20.0, 50.0, 60.0]]])
    view = Candidates(box, torch.tensor([[0.9]]), torch.tensor([[1]]))
    both = together([view, Candidates(box + 0.5, torch.tensor([[0.8]]), torch.tensor([[1]]))])
    (hard,) = suppress(both, PostprocessConfig(nms="hard"))
    assert hard.scores.tolist() == pytest.approx([0.9])
    (soft,) = suppress(both, PostprocessConfig(nms="soft"))
    assert soft.scores[0] == pytest.approx(0.9)
    assert soft.scores[1] < 0.15
