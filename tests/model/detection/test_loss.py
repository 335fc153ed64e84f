from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from effdet.loss import huber_loss as effdet_huber
from effdet.loss import new_focal_loss
from torch import Tensor

from model.detection.anchors import make_anchors
from model.detection.loss import LossConfig, detection_loss, focal_loss, huber_loss
from model.detection.matching import Targets, match
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve


def random_case(seed: int) -> tuple[Tensor, Tensor, Targets]:
    """Logits [2, 50, 6], codes and targets; a tenth of the anchors is positive."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 50, 6, generator=generator) * 4
    codes = torch.randn(2, 50, 4, generator=generator)
    labels = torch.randint(0, 6, (2, 50), generator=generator)
    background = torch.rand(2, 50, generator=generator) > 0.1
    labels = labels.masked_fill(background, -1)
    target_codes = torch.randn(2, 50, 4, generator=generator) * 0.5
    target_codes[..., 0] = 0.0  # masked even for a positive anchor, as the peers do
    return logits, codes, Targets(labels, target_codes.masked_fill(background[..., None], 0.0))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 1.5), (0.5, 2.0), (0.25, 0.0)])
def test_focal_equals_effdet(alpha: float, gamma: float) -> None:
    logits, _, targets = random_case(0)
    logits.requires_grad_()
    one_hot = F.one_hot(targets.labels.clamp(min=0), 6) * (targets.labels >= 0).unsqueeze(-1)
    theirs = new_focal_loss(logits, one_hot, alpha, gamma, 1.0, label_smoothing=0.0).sum()
    ours = focal_loss(logits, targets.labels, alpha, gamma)
    torch.testing.assert_close(ours, theirs)
    (our_grad,) = torch.autograd.grad(ours, logits)
    (their_grad,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-5)


def test_focal_by_hand() -> None:
    """One anchor, two classes at probability 1/2, the first is right: ln 2 * 2^-1.5 * (.25 + .75)."""
    loss = focal_loss(torch.zeros(1, 1, 2), torch.tensor([[0]]), 0.25, 1.5)
    assert loss.item() == pytest.approx(0.693147 * 0.353553, rel=1e-4)


def test_huber_equals_effdet_with_its_mask() -> None:
    _, codes, targets = random_case(1)
    mask = targets.codes != 0.0
    theirs = effdet_huber(codes, targets.codes, delta=0.1, weights=mask, size_average=False)
    torch.testing.assert_close(huber_loss(codes, targets.codes, 0.1), theirs)


def test_huber_by_hand() -> None:
    codes, target = torch.tensor([[[0.05, 2.0, 9.0, 1.0]]]), torch.tensor([[[0.1, 1.0, 0.0, 1.0]]])
    # quadratic: .5 * .05^2; linear: .1 * (1 - .05); the third has no target; the fourth is right
    assert huber_loss(codes, target, 0.1).item() == pytest.approx(0.00125 + 0.095)


def test_parts_add_up_with_their_weights() -> None:
    logits, codes, targets = random_case(2)
    normaliser = targets.num_positives() + 1
    config = LossConfig(box=20.0)
    losses = detection_loss(logits, codes, targets, normaliser, config)
    focal = focal_loss(logits, targets.labels, config.alpha, config.gamma)
    torch.testing.assert_close(losses.classes, focal / normaliser)
    huber = huber_loss(codes, targets.codes, config.delta)
    torch.testing.assert_close(losses.boxes, huber / (4 * normaliser))
    torch.testing.assert_close(losses.total, losses.classes + 20.0 * losses.boxes)


def test_losses_of_workers_add_up_to_the_loss_of_one() -> None:
    logits, codes, targets = random_case(3)
    normaliser = targets.num_positives() + 1
    whole = detection_loss(logits, codes, targets, normaliser, LossConfig())
    parts = [
        detection_loss(logits[rows], codes[rows], targets[rows], normaliser, LossConfig())
        for rows in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)


@pytest.mark.parametrize("magnitude", [100.0, 1e4])
def test_extreme_logits_have_finite_loss_and_gradient(magnitude: float) -> None:
    logits = torch.tensor([[[magnitude, -magnitude], [-magnitude, magnitude]]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[0, 0]]), 0.25, 1.5)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_without_boxes_touches_every_parameter(rows: int) -> None:
    """Else a worker's collectives would be missing and all would wait for it."""
    spec = resolve(
        ModelConfig(
            backbone="test_efficientnet",
            fpn_channels=16,
            fpn_repeats=1,
            head_layers=1,
            image_size_px=128,
        ),
        3,
    )
    torch.manual_seed(0)
    detector = Detector(spec)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    labels = torch.full((2, rows), -1)
    targets = match(make_anchors(spec), torch.zeros(2, rows, 4), labels)
    losses = detection_loss(*detector(images), targets, targets.num_positives() + 1, LossConfig())
    losses.total.backward()
    assert losses.total.isfinite()
    assert losses.boxes == 0
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
