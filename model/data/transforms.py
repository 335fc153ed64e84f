"""Decode and augment one sample: everything random comes from (seed, epoch, image).

Geometry is composed first and applied to the pixels once: the part of the source image that is
seen is read, flipped and resized in one pass, then laid on a canvas of the mean colour, anchored
top left. Boxes follow the same affine map.
Source: google/automl `dataloader.py` (flip, scale jitter [.1, 2] relative to the output, crop, pad).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model.imagenet import MEAN

# Padding is 0 after normalisation: ImageNet's mean colour, rounded.
PAD_RGB = tuple(round(value * 255) for value in MEAN)
MIN_VISIBLE_PX = 1.0


@dataclass(frozen=True)
class AugmentConfig:
    """flip: probability of a horizontal flip; jitter: scale range relative to the network size."""

    enabled: bool = True
    flip: float = 0.5
    jitter_min: float = 0.1
    jitter_max: float = 2.0


@dataclass(frozen=True)
class View:
    """Where the image lands: network pixel = (source pixel * scale) - offset, flipped first.

    size_hw: extent of image content on the canvas.
    """

    scale: float
    offset_xy: tuple[float, float]
    flip: bool
    size_hw: tuple[int, int]


def decode_image(data: bytes, draft_size_px: int | None = None) -> Image.Image:
    """JPEG, PNG and what else Pillow reads -> RGB, rotated as EXIF says.

    draft_size_px: let the JPEG decoder shrink by 2, 4 or 8 while both sides stay above this.

    Raises:
        OSError: not an image, or a damaged one.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:  # a damaged header, or truly that large
        raise OSError(str(error)) from None
    if draft_size_px is not None:
        image.draft("RGB", (draft_size_px, draft_size_px))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16-bit grey: keep the high byte
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*PAD_RGB, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def letterbox_view(height: int, width: int, size_px: int) -> View:
    """The whole image, as large as fits, top left: what evaluation sees."""
    scale = size_px / max(height, width)
    size_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    return View(scale, (0.0, 0.0), False, size_hw)


def random_view(
    height: int, width: int, size_px: int, config: AugmentConfig, rng: np.random.Generator
) -> View:
    """Flip, scale so that the image fits `jitter * size_px`, crop a random window if it is larger."""
    flip = bool(rng.random() < config.flip)
    jitter = rng.uniform(config.jitter_min, config.jitter_max)
    shift = rng.random(2)
    scale = jitter * size_px / max(height, width)
    offset_x = float(max(0.0, width * scale - size_px) * shift[0])
    offset_y = float(max(0.0, height * scale - size_px) * shift[1])
    size_hw = (
        min(size_px, max(1, round(height * scale - offset_y))),
        min(size_px, max(1, round(width * scale - offset_x))),
    )
    return View(scale, (offset_x, offset_y), flip, size_hw)


def apply_to_image(
    image: Image.Image, view: View, size_px: int, source_width: float
) -> NDArray[np.uint8]:
    """RGB image -> uint8 [size_px, size_px, 3], content top left, mean colour elsewhere.

    source_width: of the scene in pixels of `image`. A JPEG decoder that shrinks rounds its picture
    up, so the last column may be partly beyond the scene; a flip is about the scene's middle.
    """
    height, width = view.size_hw
    left, top = view.offset_xy[0] / view.scale, view.offset_xy[1] / view.scale
    right = min(left + width / view.scale, source_width)
    bottom = min(top + height / view.scale, float(image.height))
    if view.flip:
        left, right = source_width - right, source_width - left
    content = image.resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(left, top, right, bottom),
        reducing_gap=2.0,
    )
    pixels = np.asarray(content)
    canvas = np.empty((size_px, size_px, 3), dtype=np.uint8)
    canvas[:] = PAD_RGB
    canvas[:height, :width] = pixels[:, ::-1] if view.flip else pixels
    return canvas


def apply_to_boxes(
    boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], view: View, source_width: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes of the source [m, 4] -> those still visible in the view, clipped to it."""
    boxes = boxes_xyxy.astype(np.float64)
    if view.flip:
        boxes[:, [0, 2]] = source_width - boxes[:, [2, 0]]
    boxes = boxes * view.scale - np.array(view.offset_xy * 2)
    height, width = view.size_hw
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float64))
    visible = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_VISIBLE_PX).all(axis=1)
    return boxes[visible].astype(np.float32), labels[visible]
