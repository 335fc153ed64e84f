"""Detections as one graph are those of `postprocess`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.peer import randomise
from torch import Tensor

from model.detection.anchors import make_anchors
from model.detection.exported import AnchorGrid, ExportedDetector, nms_of, suppress_rounds
from model.detection.postprocess import Detections, PostprocessConfig, postprocess
from model.network.detector import Detector
from model.network.exported import ExportedNetwork
from model.network.scaling import ModelConfig, resolve

SOFT = PostprocessConfig(candidates=300, detections=40, sigma=0.4)
HARD = replace(SOFT, nms="hard", iou=0.4)


@pytest.fixture(scope="module")
def detector() -> Detector:
    config = ModelConfig(
        backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1,
        image_size_px=128,
    )  # fmt: skip
    made = Detector(resolve(config, 5)).eval()
    randomise(made)
    return made


def exported(
    detector: Detector, config: PostprocessConfig, size_hw: tuple[int, int] | None = None
) -> ExportedDetector:
    def rounds(
        boxes: Tensor, scores: Tensor, labels: Tensor, config: PostprocessConfig
    ) -> tuple[Tensor, Tensor]:
        return suppress_rounds(boxes, scores, labels, *nms_of(config))

    return ExportedDetector(ExportedNetwork(detector), detector.spec, config, rounds, size_hw)


def pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("changes", [{}, {"min_level": 2}, {"max_level": 8}, {"anchor_octaves": 2}])
def test_the_grid_is_the_anchors_at_any_size(changes: dict[str, int]) -> None:
    spec = resolve(ModelConfig(image_size_px=256, **changes), 3)  # type: ignore[arg-type]
    grid = AnchorGrid(spec)
    for side in (256, 768):
        expected = make_anchors(replace(spec, image_size_px=side))
        torch.testing.assert_close(grid(side, side), expected, rtol=0, atol=2e-4)


def test_an_oblong_grid_has_its_columns_before_its_rows() -> None:
    spec = resolve(ModelConfig(image_size_px=128), 3)
    boxes = AnchorGrid(spec)(128, 256)
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:: spec.anchors_per_cell]
    assert centres[:2].tolist() == [[4, 4], [12, 4]]
    assert centres[32].tolist() == [4, 12], "32 columns of stride 8"
    assert centres[-2:].tolist() == [[64, 64], [192, 64]], "the last level has two cells"


@pytest.mark.parametrize("config", [SOFT, HARD], ids=["soft", "hard"])
@pytest.mark.parametrize("size_hw", [(128, 128), (256, 128), (128, 384)])
@torch.no_grad()
def test_equal_to_postprocess(
    detector: Detector, config: PostprocessConfig, size_hw: tuple[int, int]
) -> None:
    images = pixels(2, 3, *size_hw)
    sizes = torch.tensor([[size_hw[0], 77.0], [90.0, size_hw[1]]])
    anchors = AnchorGrid(detector.spec)(*size_hw)
    expected = postprocess(*detector(images), anchors, sizes, config)
    for made in (exported(detector, config), exported(detector, config, size_hw)):
        boxes, scores, labels, count = made(images, sizes)
        assert boxes.shape == (2, config.detections, 4)
        for image, theirs in enumerate(expected):
            n = int(count[image])
            assert n == len(theirs.scores) > 10
            assert torch.equal(boxes[image, :n], theirs.boxes_xyxy)
            assert torch.equal(scores[image, :n], theirs.scores)
            assert torch.equal(labels[image, :n], theirs.labels)


@torch.no_grad()
def test_what_was_not_found_is_padding(detector: Detector) -> None:
    images, sizes = pixels(1, 3, 128, 128), torch.tensor([[128.0, 128.0]])
    everything = exported(detector, SOFT)(images, sizes)[1]
    limit = float((everything[0, 6] + everything[0, 7]) / 2)
    boxes, scores, labels, count = exported(detector, replace(SOFT, score=limit))(images, sizes)
    assert count.tolist() == [7]
    assert (labels[0, :7] >= 0).all()
    assert scores[0, :7].min() > limit
    assert labels[0, 7:].eq(-1).all()
    assert not scores[0, 7:].any()
    assert not boxes[0, 7:].any()


@pytest.mark.parametrize("nms", ["soft", "hard"])
@torch.no_grad()
def test_fewer_pairs_than_candidates(detector: Detector, nms: str) -> None:
    """Anchors of the smallest image times classes: 3,069 x 5 here."""
    config = replace(SOFT, nms=nms, candidates=20_000, detections=30)
    images, sizes = pixels(1, 3, 128, 128), torch.tensor([[128.0, 128.0]])
    boxes, scores, labels, count = exported(detector, config)(images, sizes)
    theirs = Detections(boxes[0], scores[0], labels[0])
    (expected,) = postprocess(*detector(images), make_anchors(detector.spec), sizes, config)
    assert count.tolist() == [30]
    torch.testing.assert_close(theirs.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=1e-3)
    torch.testing.assert_close(theirs.scores, expected.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_nothing_is_found_twice_when_all_are_taken(nms: str) -> None:
    """Three candidates, five rounds: the last two find nothing."""
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [50.0, 50.0, 60.0, 60.0], [0.0, 0.0, 9.0, 9.0]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0, 0, 1]])
    keep, kept = suppress_rounds(boxes, scores, labels, nms, 0.5, 5)
    assert keep[0, :3].tolist() == [0, 1, 2]
    assert (kept[0, 3:] < 0).all()
