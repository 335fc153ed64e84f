from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.network.backbone import num_parameters
from model.network.detector import Detector
from model.network.footprint import GIB, Cost, activations, network_cost
from model.network.scaling import FusionKind, ModelConfig, NetworkSpec, Phi, TopologyKind, resolve

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
        ModelConfig(topology="nas_fpn", fpn_channels=24, image_size_px=128),
        ModelConfig(topology="fully_connected", min_level=2, fpn_channels=24, image_size_px=128),
        ModelConfig(topology="fpn", variant="pytorch", fpn_channels=24, image_size_px=128),
        ModelConfig(backbone="test_efficientnet", min_level=2, fpn_channels=16, image_size_px=128),
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


# Table 5 of the paper: parameters and multiply-accumulates of the feature network, as a share of
# the repeated FPN + PANet's.
TABLE_5: dict[TopologyKind, tuple[float, float]] = {
    "fpn": (1.0, 1.0),
    "panet": (1.0, 1.0),
    "nas_fpn": (0.71, 0.72),
    "fully_connected": (1.24, 1.21),
    "bifpn": (0.88, 0.67),
}


@pytest.mark.parametrize("topology", TABLE_5)
def test_cost_ratios_of_table_5(topology: TopologyKind) -> None:
    """D3's pyramid, whose 12 M parameters and 24 G are the model of Table 4.

    The paper repeats each network "multiple times"; the top-down FPN, half a PANet, twice as often.
    """

    def cost(kind: TopologyKind, repeats: int) -> Cost:
        config = ModelConfig(phi="3", topology=kind, fpn_repeats=repeats, fusion="sum")
        return network_cost(resolve(config, 90)).pyramid

    panet, this = cost("panet", 6), cost(topology, 12 if topology == "fpn" else 6)
    params, macs = TABLE_5[topology]
    assert this.params / panet.params == pytest.approx(params, abs=0.05)
    assert this.macs / panet.macs == pytest.approx(macs, abs=0.05)


@pytest.mark.parametrize(
    ("phi", "params_90", "params_80"),
    [
        ("0", 3_877_763, 3_871_913),
        ("1", 6_622_026, 6_614_016),
        ("2", 8_091_215, 8_081_045),
        ("3", 12_022_376, 12_007_886),
        ("4", 20_723_675, 20_703_425),
        ("5", 33_653_315, 33_627_305),
    ],
)
def test_parameters_of_the_pytorch_variant(phi: Phi, params_90: int, params_80: int) -> None:
    config = ModelConfig(phi=phi, variant="pytorch")
    assert network_cost(resolve(config, 90)).params == params_90
    assert network_cost(resolve(config, 80)).params == params_80


def test_activations_of_d0_fit_the_measured_half_gib() -> None:
    spec = resolve(ModelConfig(), 90)
    assert activations(spec).total(recompute=False) / GIB == pytest.approx(0.51, rel=0.05)


def test_activations_count_what_autograd_keeps(tiny: NetworkSpec) -> None:
    single = activations(tiny).total(recompute=False)
    half = activations(tiny, half_precision=True).total(recompute=False)
    assert half == pytest.approx(single / 2, rel=0.001)
    larger = activations(replace(tiny, image_size_px=256)).total(recompute=False)
    assert larger == pytest.approx(4 * single, rel=0.01)


@pytest.mark.parametrize("phi", ["0", "4"])
def test_recomputation_keeps_a_fraction(phi: Phi) -> None:
    traced = activations(resolve(ModelConfig(phi=phi), 90))
    assert traced.total(recompute=True) < 0.4 * traced.total(recompute=False)
