"""A checkpoint of a small network with random weights that sees something everywhere."""

from __future__ import annotations

from pathlib import Path

import torch

from model.data.index import ClassMap
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve
from model.training.state import Progress, network_config, write_checkpoint

CLASSES = ClassMap((1, 7, 9), ("disc", "box", "star"))


def small_detector(folder: Path, image_size_px: int = 128) -> Path:
    """Uneven weights, so that boxes and scores differ from place to place."""
    config = ModelConfig(
        backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1,
        image_size_px=image_size_px,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    detector = Detector(resolve(config, CLASSES.num_classes))
    state = detector.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.copy_(tensor + 0.05 * torch.randn(tensor.shape, generator=generator))
    state["class_head.predict.pointwise.bias"] += 3.0  # scores from nearly 0 to nearly 1
    folder.mkdir(parents=True)
    write_checkpoint(
        folder, model=state, ema=state, progress=Progress(3, {}, torch.zeros(6)),
        config={"network": network_config(detector.spec), "job": {}}, classes=CLASSES,
        metrics={"val/AP": 0.25},
    )  # fmt: skip
    return folder
