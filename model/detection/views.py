"""Several looks at one image: other sizes, mirrored. Their candidates meet before suppression.

Shape legend: B images, C candidates of a view, V views.
A view's candidates are brought into source pixels, where those of all views are put together and
suppressed once, so an object that each view finds is kept once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.detection.postprocess import Candidates
from model.errors import ConfigError
from model.network.scaling import NetworkSpec


@dataclass(frozen=True)
class View:
    """The image letterboxed to a square of image_size_px, as it is or mirrored left to right."""

    image_size_px: int
    flip: bool = False


def plan_views(
    spec: NetworkSpec, scales: Sequence[float] = (1.0,), *, flip: bool = False
) -> tuple[View, ...]:
    """The network's own size times each scale, as near as its levels allow; each mirrored too.

    Raises:
        ConfigError: a scale that is no positive number, or two that come to the same size.
    """
    multiple = 2**spec.max_level
    sizes: list[int] = []
    for scale in scales:
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError("--scales", "positive numbers", f"{scale:g}", "as in 0.8,1,1.2")
        size = max(multiple, round(spec.image_size_px * scale / multiple) * multiple)
        if size in sizes:
            raise ConfigError(
                "--scales", f"different multiples of {multiple} px near {spec.image_size_px} px times each",
                f"{size} px twice", "space them further",
            )  # fmt: skip
        sizes.append(size)
    if not sizes:
        raise ConfigError("--scales", "at least one", "none", "as in 0.8,1,1.2")
    mirrored = (False, True) if flip else (False,)
    return tuple(View(size, flip) for size in sizes for flip in mirrored)


def mirror(images: Tensor, sizes_hw: Tensor) -> Tensor:
    """images [B, 3, R, R] with their content (sizes_hw [B, 2]) mirrored, still at the top left."""
    mirrored = images.clone()
    for image, (height, width) in enumerate(sizes_hw.long().tolist()):
        mirrored[image, :, :height, :width] = images[image, :, :height, :width].flip(-1)
    return mirrored


def in_source(
    candidates: Candidates, sizes_hw: Tensor, scales: Tensor, *, flip: bool
) -> Candidates:
    """A view's candidates in pixels of the source, unmirrored.

    sizes_hw [B, 2] of the content and scales [B]: network pixels, and how many of them a source
    pixel has.
    """
    boxes = candidates.boxes_xyxy
    if flip:
        width = sizes_hw[:, 1].to(boxes.dtype)[:, None]
        x0, y0, x1, y1 = boxes.unbind(-1)
        boxes = torch.stack([width - x1, y0, width - x0, y1], dim=-1)
    boxes = boxes / scales.to(boxes.dtype)[:, None, None]
    return Candidates(boxes, candidates.scores, candidates.labels)


def together(views: Sequence[Candidates]) -> Candidates:
    """[B, C] of each view -> [B, V * C]."""
    return Candidates(
        torch.cat([view.boxes_xyxy for view in views], dim=1),
        torch.cat([view.scores for view in views], dim=1),
        torch.cat([view.labels for view in views], dim=1),
    )
