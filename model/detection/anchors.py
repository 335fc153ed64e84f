"""Anchor boxes of a network: fixed by its spec alone.

Order: level, then row, then column, then octave scale, then aspect ratio; the heads' output order.
Size: anchor_scale * stride * 2^(octave/num_octaves), times the ratio's (width, height) factors.
The ratios are those of the released weights, (1, 1), (1.4, 0.7), (0.7, 1.4).
Source: google/automl `tf2/anchors.py`; reference facts §1.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.network.scaling import NetworkSpec


def make_anchors(spec: NetworkSpec) -> Tensor:
    """Anchors [A, 4] xyxy in pixels, float32, for square images of `spec.image_size_px`."""
    sides = spec.level_sizes_px()
    levels = []
    for level in range(spec.min_level, spec.max_level + 1):
        stride = spec.image_size_px / sides[level]
        centres = (torch.arange(sides[level], dtype=torch.float64) + 0.5) * stride
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        centre = torch.stack([x, y], dim=-1).view(-1, 1, 2)
        half = torch.tensor(
            [
                (
                    spec.anchor_scale * stride * 2 ** (octave / spec.anchor_octaves) * ratio_w / 2,
                    spec.anchor_scale * stride * 2 ** (octave / spec.anchor_octaves) * ratio_h / 2,
                )
                for octave in range(spec.anchor_octaves)
                for ratio_w, ratio_h in spec.aspect_ratios
            ],
            dtype=torch.float64,
        ).view(1, -1, 2)
        levels.append(torch.cat([centre - half, centre + half], dim=-1).view(-1, 4))
    return torch.cat(levels).float()
