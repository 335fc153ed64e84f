"""What is exported: one module, the names and meaning of what goes in and out, and its sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.detection.exported import ExportedDetector, Suppress
from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from model.network.exported import ExportedNetwork
from model.network.scaling import NetworkSpec
from model.predictor import Predictor
from orchestrator.config.export_cli import Content, ExportRequest, Format, Pixels
from orchestrator.errors import ConfigError

IMAGES, SIZES = "images", "sizes_hw"
INPUTS: dict[Content, tuple[str, ...]] = {"network": (IMAGES,), "detections": (IMAGES, SIZES)}
OUTPUTS: dict[Content, tuple[str, ...]] = {
    "network": ("class_logits", "box_codes"),
    "detections": ("boxes_xyxy", "scores", "labels", "count"),
}
DTYPES: dict[Pixels, torch.dtype] = {"uint8": torch.uint8, "float32": torch.float32}

Run = Callable[..., list[NDArray[Any]]]
"""A file that has been opened: input arrays in the order of its inputs -> output arrays."""

T = TypeVar("T")


@dataclass(frozen=True)
class Graph:
    """What a file holds. size_hw: the one size it takes, None for multiples of 2^max_level."""

    kind: Format
    spec: NetworkSpec
    config: PostprocessConfig
    content: Content
    pixels: Pixels
    size_hw: tuple[int, int] | None

    @property
    def multiple(self) -> int:
        return 1 << self.spec.max_level

    @property
    def native_hw(self) -> tuple[int, int]:
        """The size it is checked and timed at first."""
        return self.size_hw or (self.spec.image_size_px, self.spec.image_size_px)

    @property
    def inputs(self) -> tuple[str, ...]:
        return INPUTS[self.content]

    @property
    def outputs(self) -> tuple[str, ...]:
        return OUTPUTS[self.content]

    def module(
        self, detector: Detector, suppress: Suppress, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """The traceable module. suppress: NMS as the file's format can hold it."""
        network = ExportedNetwork(detector, dtype)
        if self.content == "network":
            return network.eval()
        return ExportedDetector(network, self.spec, self.config, suppress, self.size_hw).eval()

    def arguments(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
        """Of the module, from uint8 images and the pictures' sizes in them."""
        pixels = images.to(DTYPES[self.pixels])
        return (pixels,) if self.content == "network" else (pixels, sizes_hw.float())

    def example(self) -> tuple[Tensor, ...]:
        """Two images, higher than wide, so that no side or number could be taken for another."""
        height, width = self.size_hw or (3 * self.multiple, 2 * self.multiple)
        images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
        return self.arguments(images, torch.tensor([[height, width]] * 2))


def plan(predictor: Predictor, request: ExportRequest) -> Graph:
    """Raises ConfigError: a size that the network cannot have."""
    spec, config = predictor.spec, predictor.config
    if request.nms is not None:
        config = replace(config, nms=request.nms)
    graph = Graph(request.format, spec, config, request.content, request.pixels, request.size_hw)
    for side in request.size_hw or ():
        if side == 0 or side % graph.multiple:
            above = -(-max(side, 1) // graph.multiple) * graph.multiple
            raise ConfigError(
                "--image-size", f"multiples of {graph.multiple} (2^max_level)", str(side),
                f"the next that is one is {above}",
            )  # fmt: skip
    if (
        request.format == "pt2"
        and graph.size_hw is None
        and graph.native_hw == (graph.multiple,) * 2
    ):
        raise ConfigError(
            "--format", f"onnx or torchscript, or one size, at {graph.multiple} px, where the "
            f"coarsest level is one cell", "pt2 for any size", f"--image-size {graph.multiple}",
        )  # fmt: skip
    return graph


def as_arrays(tensors: Sequence[Tensor]) -> list[NDArray[np.generic]]:
    return [tensor.numpy() for tensor in tensors]
