"""Focal loss for classes, Huber for boxes, over one normaliser for the whole global batch.

Shape legend: B images of this device, A anchors, K classes.
The normaliser is (positive anchors of ALL images of the step, on all workers) + 1. A local one
makes the loss depend on how images fall to workers, and jump where one gets no boxes.
Source: arXiv 1911.09070v7 §5.1; google/automl `det_model_fn.py`; reference facts §1.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.detection.matching import Targets

PIECE = 2**17  # elements whose temporaries fit a core's cache


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
    tensor is made. The gradient is computed beside the value, in pieces that stay in the cache, so
    that it is the only tensor of this size that is kept.
    """
    return cast(Tensor, _FocalLoss.apply(logits, labels, alpha, gamma))


class _FocalLoss(torch.autograd.Function):
    """With p = sigmoid(x), of a negative: (1 - alpha) p^gamma softplus(x), whose derivative is
    (1 - alpha) p^gamma (gamma (1 - p) softplus(x) + p). A positive is the same of -x, with alpha.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        x = logits.detach().reshape(-1)
        gradient = torch.empty_like(x)
        total = x.new_zeros(())
        piece = PIECE if x.device.type == "cpu" else max(1, x.numel())
        for part, target in zip(x.split(piece), gradient.split(piece), strict=True):
            total += _focal_term(part, 1.0 - alpha, gamma, out=target)
        gradient = gradient.view_as(logits)

        positive = labels >= 0
        index = labels.clamp(min=0).unsqueeze(-1)
        at_label = logits.detach().gather(2, index).squeeze(-1)
        as_negative, slope_negative = _focal(at_label, 1.0 - alpha, gamma)
        as_positive, slope_positive = _focal(-at_label, alpha, gamma)
        total += ((as_positive - as_negative) * positive).sum()
        gradient.scatter_add_(
            2, index, ((-slope_positive - slope_negative) * positive).unsqueeze(-1)
        )
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def _focal_term(x: Tensor, weight: float, gamma: float, *, out: Tensor) -> Tensor:
    """Sum of the loss of negatives x [n]; its derivative goes into `out` [n]."""
    p, softplus = torch.sigmoid(x), F.softplus(x)
    modulator = p.sqrt().mul_(p) if gamma == 1.5 else p.pow(gamma)
    total = torch.dot(modulator, softplus) * weight
    torch.addcmul(softplus, p, softplus, value=-1.0, out=out)
    out.mul_(gamma).add_(p).mul_(modulator).mul_(weight)
    return total


def _focal(x: Tensor, weight: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Loss of each negative x and its derivative, of the same shape."""
    p, softplus = torch.sigmoid(x), F.softplus(x)
    modulator = weight * p.pow(gamma)
    return modulator * softplus, modulator * (gamma * (1.0 - p) * softplus + p)


def huber_loss(codes: Tensor, target_codes: Tensor, delta: float) -> Tensor:
    """Sum over the coordinates whose target is not exactly 0 (google/automl's mask)."""
    loss = F.huber_loss(codes, target_codes, reduction="none", delta=delta)
    return torch.where(target_codes != 0.0, loss, torch.zeros_like(loss)).sum()
