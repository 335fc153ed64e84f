"""Images that the ranges of int8 are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.data.transforms import View, apply_to_image
from model.predictor import read_image
from orchestrator.errors import DataError, UserError
from orchestrator.export.graph import Graph, as_arrays
from orchestrator.storage.images import ImageFile, list_images


def choose_images(sources: Sequence[str], number: int) -> list[ImageFile]:
    """So many of the images there, evenly over all of them.

    Raises:
        DataError, StorageError: a place that has none, or cannot be listed.
    """
    try:
        images = [image for image in list_images(sources) if not image.is_video]
    except UserError as error:
        raise type(error)("--calibrate", error.expected, error.got, error.remedy) from None
    if sources and not images:
        raise DataError("--calibrate", "images", "videos only", "give images")
    take = min(number, len(images))
    return [images[i * len(images) // take] for i in range(take)]


def calibration_inputs(
    images: Sequence[ImageFile], graph: Graph
) -> Iterator[dict[str, NDArray[Any]]]:
    """Inputs of the graph by name, one image at a time.

    Raises:
        DataError: an image that cannot be read.
    """
    for image in images:
        try:
            picture = read_image(image.read())
        except DataError as error:
            where = f"--calibrate {image.place.uri}"
            raise DataError(where, error.expected, error.got, "take it out") from None
        canvas, size_hw = on_canvas(picture, graph.native_hw)
        pixels = torch.from_numpy(canvas).permute(2, 0, 1).unsqueeze(0).contiguous()
        arrays = as_arrays(graph.arguments(pixels, torch.tensor([size_hw])))
        yield dict(zip(graph.inputs, arrays, strict=True))


def on_canvas(
    picture: Image.Image, canvas_hw: tuple[int, int]
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """uint8 [H, W, 3] with the whole picture as large as fits, top left; its height and width there."""
    height, width = canvas_hw
    scale = min(height / picture.height, width / picture.width)
    size_hw = (
        min(height, max(1, round(picture.height * scale))),
        min(width, max(1, round(picture.width * scale))),
    )
    view = View(scale, (0.0, 0.0), False, size_hw)
    canvas = apply_to_image(picture, view, max(canvas_hw))[:height, :width]
    return np.ascontiguousarray(canvas), size_hw
