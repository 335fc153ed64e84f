from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.network.backbone import num_parameters
from model.network.detector import Detector
from model.network.footprint import GIB, activation_bytes, network_cost
from model.network.scaling import FusionKind, ModelConfig, NetworkSpec, Phi, resolve

# phi: parameters with 90 classes, 1e9 multiply-accumulates of one image
PUBLISHED: dict[Phi, tuple[int, float]] = {
    "0": (3_880_067, 2.492),
    "1": (6_625_898, 6.003),
    "2": (8_097_039, 10.832),
    "3": (12_032_296, 24.569),
    "4": (20_723_675, 54.584),
    "5": (33_653_315, 134.134),
    "6": (51_871_782, 224.121),
    "7": (51_871_782, 322.732),
    "7x": (77_147_166, 407.628),
}


@pytest.mark.parametrize("phi", PUBLISHED)
def test_published_costs(phi: Phi) -> None:
    spec = resolve(ModelConfig(phi=phi), 90)
    cost = network_cost(spec)
    params, gmacs = PUBLISHED[phi]
    assert cost.params == params
    assert cost.gmacs == pytest.approx(gmacs, rel=1e-3)
    with torch.device("meta"):
        assert num_parameters(Detector(spec)) == params


def test_parts_of_d0() -> None:
    """Backbone, pyramid, class head, box head in 1e9 multiply-accumulates."""
    cost = network_cost(resolve(ModelConfig(), 90))
    parts = [
        part.macs / 1e9 for part in (cost.backbone, cost.pyramid, cost.class_head, cost.box_head)
    ]
    assert parts == pytest.approx([1.901, 0.136, 0.362, 0.092], abs=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(
            backbone="test_efficientnet", fpn_channels=16, fpn_repeats=2, image_size_px=128
        ),
        ModelConfig(backbone="test_efficientnet", fpn_channels=48, fusion="sum", image_size_px=128),
        ModelConfig(fpn_channels=40, head_layers=1, max_level=8, image_size_px=256),
        ModelConfig(max_level=6, fpn_channels=24, anchor_octaves=2, image_size_px=192),
        ModelConfig(backbone="resnet18", fpn_channels=128, fusion="softmax", image_size_px=128),
    ],
)
def test_closed_form_equals_a_counted_network(config: ModelConfig) -> None:
    """fpn_channels 48 and 128 equal a backbone feature's: that edge needs no 1x1."""
    spec = resolve(config, 5)
    with torch.device("meta"):
        detector = Detector(spec).eval()
        image = torch.empty(1, 3, spec.image_size_px, spec.image_size_px)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        detector(image)
    cost = network_cost(spec)
    assert cost.params == num_parameters(detector)
    assert cost.total.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded"])
def test_weighted_fusions_cost_one_parameter_an_edge(fusion: FusionKind) -> None:
    weighted = network_cost(resolve(ModelConfig(fusion=fusion), 90))
    plain = network_cost(resolve(ModelConfig(fusion="sum"), 90))
    assert weighted.params - plain.params == 57  # 3 repeats of 19 edges
    assert weighted.total.macs == plain.total.macs


def test_activations_of_d0_fit_the_measured_half_gib() -> None:
    spec = resolve(ModelConfig(), 90)
    assert activation_bytes(spec) / GIB == pytest.approx(0.51, rel=0.05)


def test_activations_count_what_autograd_keeps(tiny: NetworkSpec) -> None:
    single = activation_bytes(tiny)
    assert activation_bytes(tiny, half_precision=True) == single // 2
    assert activation_bytes(replace(tiny, image_size_px=256)) == pytest.approx(4 * single, rel=0.01)
