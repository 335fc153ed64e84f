"""From raw outputs to detections: best (anchor, class) pairs, decode, suppress, keep the top.

Shape legend: B images, A anchors, K classes, C candidates, N detections kept.
Source: google/automl `postprocess.py` (5000 pairs in, 100 out, Gaussian soft-NMS sigma 0.5,
threshold 0.001); rwightman/efficientdet-pytorch uses hard NMS at 0.5 instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from model.detection.boxes import clip, decode, pairwise_iou


@dataclass(frozen=True)
class PostprocessConfig:
    """nms: "soft" is the paper's, "hard" is quicker; iou is hard NMS's, sigma soft NMS's."""

    nms: Literal["soft", "hard"] = "soft"
    iou: float = 0.5
    sigma: float = 0.5
    score: float = 0.001
    candidates: int = 5000
    detections: int = 100


@dataclass(frozen=True)
class Candidates:
    """Before suppression. boxes_xyxy [B, C, 4] pixels, scores [B, C], labels int64 [B, C]."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Detections:
    """Best first. boxes_xyxy [N, 4] pixels, scores [N], labels int64 [N]; one image, on the CPU."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor


@torch.no_grad()
def postprocess(
    class_logits: Tensor,
    box_codes: Tensor,
    anchors_xyxy: Tensor,
    sizes_hw: Tensor,
    config: PostprocessConfig,
) -> list[Detections]:
    """class_logits [B, A, K], box_codes [B, A, 4], sizes_hw [B, 2] of the scaled image content.

    Boxes are clipped to the content (not to the padding) and stay in network pixels.
    """
    return suppress(best_pairs(class_logits, box_codes, anchors_xyxy, sizes_hw, config), config)


def best_pairs(
    class_logits: Tensor,
    box_codes: Tensor,
    anchors_xyxy: Tensor,
    sizes_hw: Tensor,
    config: PostprocessConfig,
) -> Candidates:
    """The config's number of (anchor, class) pairs of each image, best first; see `postprocess`."""
    num_images, num_anchors, num_classes = class_logits.shape
    take = min(config.candidates, num_anchors * num_classes)
    logits, pairs = class_logits.reshape(num_images, -1).topk(take, dim=1)
    anchors, labels = pairs // num_classes, pairs % num_classes
    codes = box_codes.gather(1, anchors.unsqueeze(-1).expand(-1, -1, 4))
    boxes = decode(codes, anchors_xyxy[anchors])
    sizes = sizes_hw.to(boxes.dtype)
    return Candidates(clip(boxes, sizes[:, :1], sizes[:, 1:]), logits.sigmoid(), labels)


@torch.no_grad()
def suppress(candidates: Candidates, config: PostprocessConfig) -> list[Detections]:
    """What is left of each image's candidates, in their pixels."""
    boxes, scores, labels = candidates.boxes_xyxy, candidates.scores, candidates.labels
    if config.nms == "soft":
        keep, scores = soft_nms(boxes, scores, labels, config.sigma, config.detections)
        boxes = boxes.gather(1, keep.unsqueeze(-1).expand(-1, -1, 4))
        labels = labels.gather(1, keep)
        results = list(zip(boxes, scores, labels, strict=True))
    else:
        results = [
            _hard_nms(b, s, k, config) for b, s, k in zip(boxes, scores, labels, strict=True)
        ]
    return [Detections(*(t[s > config.score].cpu() for t in (b, s, k))) for b, s, k in results]


def _hard_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, config: PostprocessConfig
) -> tuple[Tensor, Tensor, Tensor]:
    keep = batched_nms(boxes, scores, labels, config.iou)[: config.detections]
    return boxes[keep], scores[keep], labels[keep]


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, sigma: float, num_kept: int
) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS within each class, for a batch: kept indices [B, N] and decayed scores.

    boxes [B, C, 4], scores [B, C], labels [B, C]. Each round takes the best that is left and
    multiplies the scores of its class by exp(-iou^2 / sigma). One greedy pass over all classes
    picks what separate passes and a merge would: a pick changes only scores of its own class.
    """
    left = scores.clone()
    rows = torch.arange(boxes.shape[0], device=boxes.device)
    kept_indices, kept_scores = [], []
    for _ in range(min(num_kept, boxes.shape[1])):
        best, index = left.max(dim=1)
        kept_indices.append(index)
        kept_scores.append(best)
        iou = pairwise_iou(boxes[rows, index].unsqueeze(1), boxes).squeeze(1)
        iou = iou * (labels == labels[rows, index].unsqueeze(1))
        left = left * torch.exp(-(iou * iou) / sigma)
        left[rows, index] = -1.0
    return torch.stack(kept_indices, dim=1), torch.stack(kept_scores, dim=1)
