"""How long a file takes, beside PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.detection.postprocess import postprocess
from model.predictor import Predictor
from orchestrator.export.check import anchors_of, pictures
from orchestrator.export.graph import Graph, Run, as_arrays

WARM_UP, ROUNDS = 2, 10


@dataclass(frozen=True)
class Latency:
    """Medians for one image of the native size, milliseconds."""

    file_ms: float
    pytorch_ms: float


def measure(run: Run, graph: Graph, predictor: Predictor) -> Latency:
    """The file and PyTorch by turns, so that what else the machine does falls on both."""
    images = pictures(1, *graph.native_hw, seed=0)
    sizes = torch.tensor([graph.native_hw])
    arrays = as_arrays(graph.arguments(images, sizes))
    anchors = anchors_of(graph, *graph.native_hw)

    @torch.no_grad()
    def pytorch() -> None:
        logits, codes = predictor.detector(images)
        if graph.content == "detections":
            postprocess(logits, codes, anchors, sizes, graph.config)

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM_UP + ROUNDS):
        times[0].append(_milliseconds(lambda: run(*arrays)))
        times[1].append(_milliseconds(pytorch))
    return Latency(*(round(statistics.median(one[WARM_UP:]), 2) for one in times))


def _milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3
