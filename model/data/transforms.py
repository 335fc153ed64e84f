"""Decode and augment one sample: everything random comes from (seed, epoch, image).

Geometry is composed first and applied to the pixels once: the part of the source image that is
seen is resized in one pass, mirrored, then laid on a canvas of the mean colour, anchored top left.
Boxes follow the same affine map.
Source: google/automl `dataloader.py` (flip, scale jitter [.1, 2] relative to the output, crop, pad).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
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
    """Where the image lands: network pixel = (source pixel * scale) - offset, then mirrored.

    size_hw: extent of image content on the canvas; `flip` mirrors within it.
    """

    scale: float
    offset_xy: tuple[float, float]
    flip: bool
    size_hw: tuple[int, int]


def decode_image(
    data: bytes, draft_size_px: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """JPEG, PNG and what else Pillow reads -> RGB, rotated as EXIF says; of several, the first.

    draft_size_px: let the JPEG decoder shrink by 2, 4 or 8 while both sides stay above this.
    formats: Pillow's names of those to try (None: all).

    Raises:
        OSError: not an image, or a damaged one.
        SyntaxError, ValueError: a damaged PNG or TIFF, as Pillow reports some of them.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
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
    """Flip, scale so that the image fits `jitter * size_px`, crop a random window if it is larger.

    A window begins at a whole pixel, also of a picture that its decoder shrinks by `shrink(scale)`.
    """
    flip = bool(rng.random() < config.flip)
    jitter = rng.uniform(config.jitter_min, config.jitter_max)
    shift = rng.random(2)
    scale = jitter * size_px / max(height, width)
    grid = scale * shrink(scale)
    offset_x, offset_y = (
        float(max(0.0, side * scale - size_px) * share // grid * grid)
        for side, share in zip((width, height), shift, strict=True)
    )
    size_hw = (
        min(size_px, max(1, round(height * scale - offset_y))),
        min(size_px, max(1, round(width * scale - offset_x))),
    )
    return View(scale, (offset_x, offset_y), flip, size_hw)


def shrink(scale: float) -> int:
    """What a JPEG decoder may leave out for a view of this scale: 1, 2, 4 or 8 pixels in one."""
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor * scale <= 1.0)


def apply_to_image(image: Image.Image, view: View, size_px: int) -> NDArray[np.uint8]:
    """RGB image -> uint8 [size_px, size_px, 3], content top left, mean colour elsewhere.

    Torch's resize has Pillow's filter in vector instructions: three times quicker, same pixels.
    """
    (left, right, out_w), (top, bottom, out_h) = (
        _span(side, offset / view.scale, content, view.scale)
        for side, offset, content in zip(
            image.size, view.offset_xy, reversed(view.size_hw), strict=True
        )
    )
    if (right - left, bottom - top) != image.size:
        image = image.crop((left, top, right, bottom))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    if (out_w, out_h) != image.size:
        pixels = F.interpolate(pixels, size=(out_h, out_w), mode="bilinear", antialias=True)
    height, width = view.size_hw
    content = pixels[..., :height, :width]
    if view.flip:
        content = content.flip(3)
    canvas = empty_canvas(size_px)
    canvas[:height, :width] = content[0].permute(1, 2, 0).numpy()
    return canvas


def _span(side: int, offset: float, content: int, scale: float) -> tuple[int, int, int]:
    """First and last + 1 of the pixels that are seen, and how many they become (at least `content`)."""
    first = min(round(offset), side - 1)
    last = min(side, first + max(1, math.ceil(content / scale - 1e-6)))
    return first, last, max(content, round((last - first) * scale))


def empty_canvas(size_px: int) -> NDArray[np.uint8]:
    """Padding all over. Copying one is many times quicker than filling one with three values."""
    return _padding(size_px).copy()


@cache
def _padding(size_px: int) -> NDArray[np.uint8]:
    canvas = np.empty((size_px, size_px, 3), dtype=np.uint8)
    canvas[:] = PAD_RGB
    canvas.flags.writeable = False
    return canvas


def apply_to_boxes(
    boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], view: View
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes of the source [m, 4] -> those still visible in the view, clipped to it."""
    boxes = boxes_xyxy.astype(np.float64) * view.scale - np.array(view.offset_xy * 2)
    height, width = view.size_hw
    if view.flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float64))
    visible = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_VISIBLE_PX).all(axis=1)
    return boxes[visible].astype(np.float32), labels[visible]
