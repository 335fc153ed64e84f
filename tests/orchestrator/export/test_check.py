"""The check passes what PyTorch computes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.detection.exported import nms_of, suppress_rounds
from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from orchestrator.export.check import BOX_PX, RAW, SCORE, cases_of, check, pictures, try_out
from orchestrator.export.graph import Graph, Run

CASES = [(1, 128, 128), (2, 128, 256)]
Outputs = list[NDArray[Any]]
Change = Callable[[Outputs], None]


def rounds(
    boxes: Tensor, scores: Tensor, labels: Tensor, config: PostprocessConfig
) -> tuple[Tensor, Tensor]:
    return suppress_rounds(boxes, scores, labels, *nms_of(config))


def file_of(graph: Graph, detector: Detector, change: Change = lambda outputs: None) -> Run:
    """What a file of this graph would answer, but for a change."""
    module = graph.module(detector, rounds)

    @torch.no_grad()
    def run(*arrays: NDArray[Any]) -> Outputs:
        found = [t.numpy().copy() for t in module(*(torch.from_numpy(a) for a in arrays))]
        change(found)
        return found

    return run


def moved(position: int, by: float, where: tuple[int, ...] = (0, 0)) -> Change:
    def change(outputs: Outputs) -> None:
        outputs[position][where] += by

    return change


def lacking(outputs: Outputs) -> None:
    """Without its third detection."""
    for array in outputs[:3]:
        array[0, 2:-1] = array[0, 3:]
    outputs[3][0] -= 1


def doubled(outputs: Outputs) -> None:
    for array in outputs[:3]:
        array[0, 3:] = array[0, 2:-1]


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_the_same_passes(graph: Graph, detector: Detector, nms: Any) -> None:
    of_nms = replace(graph, config=replace(graph.config, nms=nms))
    found = check(file_of(of_nms, detector), of_nms, detector, cases_of(of_nms))
    assert found.passed
    assert (found.unexplained, found.rounding) == (0, 0)
    assert found.score < 1e-7  # two passes of the same network may round differently
    assert found.box_px < 1e-4
    assert found.compared > 60
    assert found.cases[1] == "2 x 128 x 256 px"


@pytest.mark.parametrize(
    ("change", "unexplained"),
    [
        (moved(0, 2 * BOX_PX), True),
        (moved(1, 3 * SCORE), True),
        (moved(2, 1), True),
        (moved(0, 0.3 * BOX_PX), False),
        (moved(1, 0.3 * SCORE), False),
        (lacking, True),
        (doubled, True),
    ],
    ids=["box", "score", "label", "box a little", "score a little", "lacking", "doubled"],
)
def test_a_difference_is_found(
    graph: Graph, detector: Detector, change: Change, unexplained: bool
) -> None:
    found = check(file_of(graph, detector, change), graph, detector, CASES)
    assert found.passed != unexplained, found
    assert (found.unexplained > 0) == unexplained
    said = found.line(graph)
    assert ("WITHOUT a counterpart" in said) == unexplained


def test_nothing_found_at_all_is_not_passed(graph: Graph, detector: Detector) -> None:
    deaf = replace(graph, config=replace(graph.config, score=0.9999))
    assert not check(file_of(deaf, detector), deaf, detector, CASES).passed


def test_another_order_of_equals_is_no_difference(graph: Graph, detector: Detector) -> None:
    """Logits moved by a few last digits: soft NMS takes some pairs in another order."""
    generator = torch.Generator().manual_seed(3)
    dense = replace(graph, config=replace(graph.config, candidates=5000, detections=100))
    module = dense.module(detector, rounds)

    class Noisy(torch.nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            logits, codes = detector(images)
            return logits + 5e-7 * torch.randn(logits.shape, generator=generator), codes

    module.network = Noisy()

    @torch.no_grad()
    def run(*arrays: NDArray[Any]) -> Outputs:
        return [t.numpy() for t in module(*(torch.from_numpy(a) for a in arrays))]

    assert check(run, dense, detector, [(2, 256, 256)]).passed


def test_raw_outputs(raw_graph: Graph, detector: Detector) -> None:
    good = check(file_of(raw_graph, detector), raw_graph, detector, CASES)
    assert good.passed
    assert good.raw == 0
    assert "raw outputs to 0.0e+00" in good.line(raw_graph)
    for position in (0, 1):
        bad = moved(position, 100 * RAW, (0, 5, 2))
        assert not check(file_of(raw_graph, detector, bad), raw_graph, detector, CASES).passed

    def cut(outputs: Outputs) -> None:
        outputs[0] = outputs[0][:, :-1]

    def no_number(outputs: Outputs) -> None:
        outputs[1][0, 0, 0] = np.nan

    for change in (cut, no_number):
        assert not check(file_of(raw_graph, detector, change), raw_graph, detector, CASES).passed


def test_less_than_fp32_has_to_run_and_give_numbers(graph: Graph, detector: Detector) -> None:
    far = try_out(file_of(graph, detector, moved(0, 50.0)), graph, CASES)
    assert far.passed
    assert "said as AP" in far.line(graph)
    wrong = try_out(file_of(graph, detector, moved(0, np.inf)), graph, CASES)
    assert not wrong.passed
    assert "NO numbers" in wrong.line(graph)


def test_cases_and_pictures(graph: Graph) -> None:
    shapes = cases_of(graph)
    assert (1, 128, 128) in shapes
    assert {number for number, _, _ in shapes} == {1, 2, 3}
    assert all(side % graph.multiple == 0 for _, *sides in shapes for side in sides)
    assert any(height > width for _, height, width in shapes)
    assert any(height < width for _, height, width in shapes)
    fixed = cases_of(replace(graph, size_hw=(256, 384)))
    assert {case[1:] for case in fixed} == {(256, 384)}
    found = pictures(2, 128, 256, seed=0)
    assert found.shape == (2, 3, 128, 256)
    assert found.dtype == torch.uint8
    assert not torch.equal(found[0], found[1])
