"""Box arithmetic. Boxes are xyxy in pixels, float32, unless a name says otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7  # keeps a degenerate side out of log and division
MAX_LOG_SIZE = 10.0  # exp() of a wild code must not overflow when it is decoded


def area(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] -> [...]"""
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def pairwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[..., M, 4] and [..., N, 4] -> intersection over union [..., M, N]; 0 for empty pairs."""
    a, b = a_xyxy.unsqueeze(-2), b_xyxy.unsqueeze(-3)
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = area(a) + area(b) - intersection
    return torch.where(intersection > 0, intersection / union, 0.0)


def encode(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Boxes relative to anchors, [..., 4] each -> codes (ty, tx, th, tw) [..., 4].

    Inverse: `decode`. Source: Faster R-CNN coding without scale factors, google/automl order.
    """
    box_centre, box_size = _centre_size(boxes_xyxy)
    anchor_centre, anchor_size = _centre_size(anchors_xyxy)
    anchor_size = anchor_size + EPSILON
    shift = (box_centre - anchor_centre) / anchor_size
    scale = torch.log((box_size + EPSILON) / anchor_size)
    return torch.cat([shift.flip(-1), scale.flip(-1)], dim=-1)


def decode(codes: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Codes (ty, tx, th, tw) [..., 4] and anchors [..., 4] -> boxes xyxy [..., 4]; see `encode`."""
    anchor_centre, anchor_size = _centre_size(anchors_xyxy)
    centre = codes[..., :2].flip(-1) * anchor_size + anchor_centre
    half = codes[..., 2:].clamp(max=MAX_LOG_SIZE).exp().flip(-1) * anchor_size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def clip(boxes_xyxy: Tensor, height: Tensor | float, width: Tensor | float) -> Tensor:
    """Into the image. height, width: numbers or tensors that broadcast to [...]."""
    x = boxes_xyxy[..., 0::2].clamp(min=0)
    y = boxes_xyxy[..., 1::2].clamp(min=0)
    x = torch.minimum(x, torch.as_tensor(width, dtype=x.dtype, device=x.device)[..., None])
    y = torch.minimum(y, torch.as_tensor(height, dtype=y.dtype, device=y.device)[..., None])
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def _centre_size(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return (low + high) / 2, high - low
