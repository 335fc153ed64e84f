"""Pixels to detections as one graph: what `Detector` and `postprocess` compute, for other programs.

Shape legend: B images, H and W pixels, A anchors, K classes, C candidates, N detections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.detection.anchors import make_anchors
from model.detection.boxes import clip, decode, pairwise_iou
from model.detection.postprocess import PostprocessConfig
from model.network.exported import ExportedNetwork
from model.network.scaling import NetworkSpec

Suppress = Callable[[Tensor, Tensor, Tensor, PostprocessConfig], tuple[Tensor, Tensor]]
"""boxes [B, C, 4], scores [B, C], labels [B, C] -> indices [B, N] and scores [B, N] of the kept."""


class AnchorGrid(nn.Module):
    """`model.detection.anchors.make_anchors` for any size: [A, 4] xyxy pixels, to a last digit."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.strides = tuple(2**level for level in range(spec.min_level, spec.max_level + 1))
        one_cell = replace(spec, image_size_px=self.strides[-1])
        # Of an image of one coarsest cell: the first cell of each level, moved to its own centre.
        anchors, per_cell, start = make_anchors(one_cell).double(), spec.anchors_per_cell, 0
        for stride in self.strides:
            shape = anchors[start : start + per_cell] - stride / 2
            self.register_buffer(f"shape_{stride}", shape.float(), persistent=False)
            start += per_cell * (self.strides[-1] // stride) ** 2

    def forward(self, height_px: int, width_px: int) -> Tensor:
        levels = []
        for stride in self.strides:
            shape = getattr(self, f"shape_{stride}")
            y = (torch.arange(height_px // stride, device=shape.device) + 0.5) * stride
            x = (torch.arange(width_px // stride, device=shape.device) + 0.5) * stride
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            centre = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1).reshape(-1, 1, 4)
            levels.append((centre + shape).reshape(-1, 4))
        return torch.cat(levels)


class ExportedDetector(nn.Module):
    """images [B, 3, H, W], sizes_hw float32 [B, 2] -> boxes, scores, labels, count; best first.

    sizes_hw: height and width of the picture in its canvas, which boxes are clipped to.
    boxes_xyxy float32 [B, N, 4] network pixels; scores float32 [B, N]; labels int64 [B, N];
    count int64 [B]: how many of the N are detections; the others are 0, 0 and -1.
    """

    anchors_xyxy: Tensor | None

    def __init__(
        self,
        network: ExportedNetwork,
        spec: NetworkSpec,
        config: PostprocessConfig,
        suppress: Suppress,
        size_hw: tuple[int, int] | None,
    ) -> None:
        """size_hw: the one size there is, or None for any."""
        super().__init__()
        self.network, self.config, self.suppress = network, config, suppress
        self.grid = AnchorGrid(spec)
        anchors = None if size_hw is None else self.grid(*size_hw)
        self.register_buffer("anchors_xyxy", anchors, persistent=False)
        # Of the smallest image: where even it has candidates enough, none need to be made up.
        smallest = len(self.grid(*(size_hw or (2**spec.max_level, 2**spec.max_level))))
        self.num_missing = max(0, config.candidates - smallest * spec.num_classes)

    def forward(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        anchors = self.anchors_xyxy
        if anchors is None:
            anchors = self.grid(images.shape[2], images.shape[3])
        class_logits, box_codes = self.network(images)
        boxes, scores, labels = self.candidates(class_logits, box_codes, anchors, sizes_hw)
        keep, scores = self.suppress(boxes, scores, labels, self.config)
        found = scores > self.config.score
        boxes = boxes.gather(1, keep.unsqueeze(-1).expand(-1, -1, 4)) * found.unsqueeze(-1)
        labels = torch.where(found, labels.gather(1, keep), -1)
        return boxes, scores * found, labels, found.long().sum(dim=1)

    def candidates(
        self, class_logits: Tensor, box_codes: Tensor, anchors_xyxy: Tensor, sizes_hw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best C pairs of anchor and class: boxes [B, C, 4], scores [B, C], labels [B, C]."""
        num_classes = class_logits.shape[2]
        logits = class_logits.flatten(1)
        if self.num_missing:
            nothing = torch.full_like(logits[:, :1], float("-inf")).expand(-1, self.num_missing)
            logits = torch.cat([logits, nothing], dim=1)
        best, pairs = logits.topk(self.config.candidates, dim=1)
        if self.num_missing:
            pairs = torch.where(best > float("-inf"), pairs, 0)
        anchors = torch.div(pairs, num_classes, rounding_mode="floor")
        labels = pairs - anchors * num_classes
        codes = box_codes.gather(1, anchors.unsqueeze(-1).expand(-1, -1, 4))
        boxes = decode(codes, anchors_xyxy[anchors])
        return clip(boxes, sizes_hw[:, :1], sizes_hw[:, 1:]), best.sigmoid(), labels


def nms_of(config: PostprocessConfig) -> tuple[str, float, int]:
    """What `suppress_rounds` takes after the candidates."""
    limit = config.sigma if config.nms == "soft" else config.iou
    return config.nms, limit, config.detections


def suppress_rounds(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, nms: str, limit: float, num_kept: int
) -> tuple[Tensor, Tensor]:
    """Hard or soft NMS in `num_kept` rounds of `suppress_once`: indices [B, N], scores [B, N].

    limit: hard NMS's IoU or soft NMS's sigma. Picks beyond the candidates have score -1.
    """
    left = scores
    indices: list[Tensor] = []
    kept: list[Tensor] = []
    for _ in range(num_kept):
        left, index, best = suppress_once(left, boxes_xyxy, labels, nms, limit)
        indices.append(index)
        kept.append(best)
    return torch.cat(indices, dim=1), torch.cat(kept, dim=1)


def suppress_once(
    left: Tensor, boxes_xyxy: Tensor, labels: Tensor, nms: str, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the best that is left: scores left [B, C], its index [B, 1], its score [B, 1].

    Hard NMS is the same greedy pass as soft NMS, with a step for a decay: N rounds give its first N.
    """
    best, index = left.max(dim=1, keepdim=True)
    picked = boxes_xyxy.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    iou = pairwise_iou(picked, boxes_xyxy).squeeze(1)
    iou = torch.where(labels == labels.gather(1, index), iou, 0.0)
    if nms == "soft":
        left = left * torch.exp(-(iou * iou) / limit)
    else:
        left = torch.where(iou > limit, -1.0, left)
    return left.scatter(1, index, -1.0), index, best
