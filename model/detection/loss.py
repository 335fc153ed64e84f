"""Focal loss for classes, Huber for boxes, over one normaliser for the whole global batch.

Shape legend: B images of this device, A anchors, K classes.
The normaliser is (positive anchors of ALL images of the step, on all workers) + 1. A local one
makes the loss depend on how images fall to workers, and jump where one gets no boxes.
Source: arXiv 1911.09070v7 §5.1; google/automl `det_model_fn.py`; reference facts §1.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.detection.matching import Targets


@dataclass(frozen=True)
class LossConfig:
    """alpha: weight of positives; gamma: focus; delta: Huber's switch; box: weight of boxes."""

    alpha: float = 0.25
    gamma: float = 1.5
    delta: float = 0.1
    box: float = 50.0


@dataclass(frozen=True)
class Losses:
    """Scalars of these images, each already over the global normaliser; they add up over workers."""

    total: Tensor
    classes: Tensor
    boxes: Tensor


def detection_loss(
    class_logits: Tensor,
    box_codes: Tensor,
    targets: Targets,
    normaliser: Tensor,
    config: LossConfig,
) -> Losses:
    """class_logits [B, A, K] and box_codes [B, A, 4] float32, normaliser scalar -> Losses.

    Without a positive anchor every parameter still gets a (zero) gradient, so no worker's
    collectives are missing.
    """
    classes = focal_loss(class_logits, targets.labels, config.alpha, config.gamma) / normaliser
    boxes = huber_loss(box_codes, targets.codes, config.delta) / (4.0 * normaliser)
    return Losses(classes + config.box * boxes, classes, boxes)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sum over anchors and classes. logits [B, A, K]; labels int64 [B, A], -1 for background.

    All entries are counted as negatives first, then the labelled ones are exchanged: no one-hot
    tensor is made.
    """
    negatives = (1.0 - alpha) * torch.sigmoid(logits).pow(gamma) * F.softplus(logits)
    positive = labels >= 0
    at_label = logits.gather(2, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    probability = torch.sigmoid(at_label)
    as_positive = alpha * (1.0 - probability).pow(gamma) * F.softplus(-at_label)
    as_negative = (1.0 - alpha) * probability.pow(gamma) * F.softplus(at_label)
    exchange = torch.where(positive, as_positive - as_negative, torch.zeros_like(at_label))
    return negatives.sum() + exchange.sum()


def huber_loss(codes: Tensor, target_codes: Tensor, delta: float) -> Tensor:
    """Sum over the coordinates whose target is not exactly 0 (google/automl's mask)."""
    loss = F.huber_loss(codes, target_codes, reduction="none", delta=delta)
    return torch.where(target_codes != 0.0, loss, torch.zeros_like(loss)).sum()
