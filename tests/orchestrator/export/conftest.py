"""A nano network with statistics that a trained one could have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.peer import randomise

from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve
from orchestrator.export.graph import Graph

CONFIG = PostprocessConfig(candidates=400, detections=20)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def detector() -> Detector:
    config = ModelConfig(
        backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1,
        image_size_px=128,
    )  # fmt: skip
    made = Detector(resolve(config, 5)).eval().requires_grad_(False)
    randomise(made)
    return made


@pytest.fixture(scope="session")
def graph(detector: Detector) -> Graph:
    return Graph("onnx", detector.spec, CONFIG, "detections", "uint8", None)


@pytest.fixture(scope="session")
def raw_graph(graph: Graph) -> Graph:
    return replace(graph, content="network")
