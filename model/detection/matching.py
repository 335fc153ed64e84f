"""Which anchor answers for which box, for a whole batch at once.

Shape legend: B images, M boxes (padded with label -1), A anchors.
Rule: an anchor takes the box it overlaps most if IoU >= 0.5, else it is background (no ignore
band); besides, every box takes its best anchor, the lowest box index where two want the same one.
Source: google/automl `anchors.py`, `argmax_matcher.py`; reference facts §1.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.detection.boxes import encode, pairwise_iou

POSITIVE_IOU = 0.5
BACKGROUND = -1
MAX_PAIRS = 2**26  # IoU values alive at once; more images are done in turns


@dataclass(frozen=True)
class Targets:
    """labels int64 [B, A], -1 for background; codes float32 [B, A, 4], 0 for background."""

    labels: Tensor
    codes: Tensor

    def num_positives(self) -> Tensor:
        """Positive anchors in the batch, float32 scalar on the device."""
        return (self.labels >= 0).sum().float()

    def __getitem__(self, images: slice) -> Targets:
        return Targets(self.labels[images], self.codes[images])


@torch.no_grad()
def match(anchors_xyxy: Tensor, boxes_xyxy: Tensor, labels: Tensor) -> Targets:
    """anchors [A, 4], boxes [B, M, 4], labels int64 [B, M] with -1 for padding -> Targets."""
    num_images, num_boxes = labels.shape
    num_anchors = anchors_xyxy.shape[0]
    if num_boxes == 0:
        return Targets(
            labels.new_full((num_images, num_anchors), BACKGROUND),
            anchors_xyxy.new_zeros(num_images, num_anchors, 4),
        )
    turn = max(1, MAX_PAIRS // (num_boxes * num_anchors))
    owner = torch.cat(
        [
            _owner(anchors_xyxy, boxes_xyxy[i : i + turn], labels[i : i + turn] >= 0)
            for i in range(0, num_images, turn)
        ]
    )
    positive = owner >= 0
    index = owner.clamp(min=0)
    matched = boxes_xyxy.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    codes = encode(matched, anchors_xyxy)
    return Targets(
        labels.gather(1, index).masked_fill(~positive, BACKGROUND),
        codes.masked_fill(~positive.unsqueeze(-1), 0.0),
    )


def _owner(anchors_xyxy: Tensor, boxes_xyxy: Tensor, real: Tensor) -> Tensor:
    """Index of the box that each anchor answers for [B, A], -1 for background."""
    iou = pairwise_iou(boxes_xyxy, anchors_xyxy)  # [B, M, A]
    iou = iou.masked_fill(~real.unsqueeze(-1), -1.0)
    best_iou, owner = iou.max(dim=1)
    owner = owner.masked_fill(best_iou < POSITIVE_IOU, BACKGROUND)

    num_boxes = real.shape[1]
    best_anchor = iou.argmax(dim=2)  # [B, M]
    claim = torch.arange(num_boxes, device=real.device).expand_as(real)
    claim = claim.masked_fill(~real, num_boxes)
    forced = torch.full_like(owner, num_boxes).scatter_reduce_(1, best_anchor, claim, "amin")
    return torch.where(forced < num_boxes, forced, owner)
