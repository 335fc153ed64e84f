from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import nn

from model.errors import ConfigError
from model.network.backbone import Backbone
from model.network.detector import Detector
from model.network.head import Head
from model.network.scaling import NetworkSpec


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub client's own switch, and an empty cache; no connection is tried."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def test_shapes_types_and_the_first_probability(tiny: NetworkSpec) -> None:
    torch.manual_seed(0)
    detector = Detector(tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        classes, boxes = detector(torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8))
    num_anchors = 9 * sum((128 >> level) ** 2 for level in range(3, 8))
    assert classes.shape == (2, num_anchors, 3)
    assert boxes.shape == (2, num_anchors, 4)
    assert classes.dtype == boxes.dtype == torch.float32
    assert classes.sigmoid().median().item() == pytest.approx(0.01, rel=0.3)


def test_normalisation_takes_uint8_pixels(tiny: NetworkSpec) -> None:
    pixels = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    normalised = Detector(tiny).normalise(pixels)
    assert normalised.abs().max() < 0.01, "ImageNet's mean colour is 0"
    white = Detector(tiny).normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    assert white.flatten().tolist() == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-3)


def test_head_output_order_by_hand() -> None:
    """Level, row, column, anchor, then value: the order of the anchors."""
    head = Head(width=1, layers=0, num_levels=2, anchors_per_cell=2, out_per_anchor=3)
    nn.init.zeros_(head.predict.depthwise.weight)
    with torch.no_grad():
        head.predict.depthwise.weight[0, 0, 1, 1] = 1.0
        head.predict.pointwise.weight.fill_(1.0)
        assert head.predict.pointwise.bias is not None
        head.predict.pointwise.bias.copy_(100.0 * torch.arange(6))
    fine, coarse = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[[[9.0]]]])
    out = head([fine, coarse])
    assert out[0, :3].tolist() == [[1, 101, 201], [301, 401, 501], [2, 102, 202]]
    assert out[0, :, 0].tolist() == [1, 301, 2, 302, 3, 303, 4, 304, 9, 309]


def test_heads_share_convolutions_but_not_norms_across_levels(tiny: NetworkSpec) -> None:
    detector = Detector(tiny)
    assert len(detector.class_head.convs) == tiny.head_layers
    assert [len(norms) for norms in detector.box_head.norms] == [5] * tiny.head_layers


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_batch_norms_have_one_momentum_and_tfs_epsilon(tiny: NetworkSpec, momentum: float) -> None:
    detector = Detector(tiny, bn_momentum=momentum)
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(momentum, 1e-3)}
    assert [m for m in detector.backbone.modules() if isinstance(m, nn.BatchNorm2d)]


def test_tfs_momentum_is_the_default(tiny: NetworkSpec) -> None:
    norms = [m for m in Detector(tiny).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.01}


def test_the_same_seed_builds_the_same_network(tiny: NetworkSpec) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(Detector(tiny).state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_b0"])
def test_pretrained_weights_that_cannot_be_had(tiny: NetworkSpec, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Detector(replace(tiny, backbone=name), pretrained=True)
    assert caught.value.where == "model.pretrained"
    assert "--pretrained no" in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_pretrained_weights_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        Backbone("tf_efficientnet_b0.nonsense", pretrained=True, drop_path=0.0)


@pytest.mark.parametrize(
    ("name", "drop_path", "message"),
    [
        ("tf_eficientnet_b0", 0.0, "did you mean 'tf_efficientnet_b0'"),
        ("test_vit", 0.0, r"strides \(16, 16, 16\)"),
        ("test_convnext", 0.0, "fewer than five stages"),
        ("ghostnet_050", 0.2, "model.drop_path: expected 0"),
    ],
)
def test_backbones_that_do_not_fit(name: str, drop_path: float, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        Backbone(name, pretrained=False, drop_path=drop_path)
