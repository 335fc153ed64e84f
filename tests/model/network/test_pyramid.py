from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ConfigError
from model.network.layers import SeparableConv, max_pool, max_pool_same, resize_to
from model.network.pyramid import FusionNode, Lateral, Pyramid
from model.network.scaling import ModelConfig, NetworkSpec, TopologyKind, resolve
from model.network.topology import Node


def padded_pool(x: Tensor, stride: int) -> Tensor:
    """TF's SAME in slow words: pad with minus infinity, the odd row or column at the far end."""
    pads: list[int] = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max(0, (-(-side // stride) - 1) * stride + stride + 1 - side)
        pads += [total // 2, total - total // 2]
    return F.max_pool2d(F.pad(x, pads, value=-torch.inf), stride + 1, stride)


@pytest.mark.parametrize("height", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_max_pool_same(height: int, width: int) -> None:
    torch.manual_seed(height * 10 + width)
    x = -torch.rand(2, 3, height, width) - 1.0  # negative: a zero border would win
    pooled = max_pool_same(x)
    assert pooled.shape[-2:] == ((height + 1) // 2, (width + 1) // 2)
    torch.testing.assert_close(pooled, padded_pool(x, 2), rtol=0, atol=0)
    assert (pooled < 0).all()


def test_max_pool_same_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert max_pool_same(x).flatten().tolist() == [10, 11, 14, 15]
    assert max_pool_same(x[..., :3, :3]).flatten().tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize("side", [7, 8, 9])
def test_max_pool_same_of_other_strides(side: int) -> None:
    torch.manual_seed(side)
    x = -torch.rand(1, 2, side, side) - 1.0
    torch.testing.assert_close(max_pool_same(x, 3), padded_pool(x, 3), rtol=0, atol=0)


def test_resize_to() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert resize_to(x, (2, 2)) is x
    rows = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert resize_to(x, (4, 4))[0, 0].tolist() == rows
    assert resize_to(x, (1, 1)).item() == 4.0


def small_spec(**changes: Any) -> NetworkSpec:
    config = ModelConfig(fpn_channels=8, fpn_repeats=2, fusion="fast", image_size_px=256)
    return resolve(replace(config, **changes), 3)


def small_pyramid(**changes: Any) -> Pyramid:
    torch.manual_seed(0)
    spec = small_spec(**changes)
    return Pyramid(spec, (4, 6, 10) if spec.min_level == 3 else (2, 4, 6, 10)).eval()


def features_of(size_px: int, channels: tuple[int, ...] = (4, 6, 10)) -> list[Tensor]:
    return [
        torch.randn(1, width, size_px >> level, size_px >> level)
        for level, width in enumerate(channels, start=3)
    ]


@pytest.mark.parametrize("max_level", [6, 7, 8])
def test_pyramid_shapes(max_level: int) -> None:
    pyramid = small_pyramid(max_level=max_level)
    outputs = pyramid(features_of(256))
    sides = [(8, 256 >> level, 256 >> level) for level in range(3, max_level + 1)]
    assert [tuple(feature.shape[1:]) for feature in outputs] == sides


def test_every_edge_from_the_backbone_has_its_own_1x1() -> None:
    """P3 once, P4 and P5 twice in the first cell, and P5 once more for P6; none later."""
    pyramid = small_pyramid()
    channels = [
        module[0].in_channels for module in pyramid.modules() if isinstance(module, Lateral)
    ]
    assert sorted(channels) == [4, 6, 6, 10, 10, 10]
    assert not [m for m in pyramid.cells[1].modules() if isinstance(m, Lateral)]


@pytest.mark.parametrize("topology", get_args(TopologyKind))
@pytest.mark.parametrize("levels", [(3, 7), (2, 7), (3, 8), (2, 6)])
def test_every_topology_at_every_level_range(
    topology: TopologyKind, levels: tuple[int, int]
) -> None:
    """Right shapes, and every input matters to some output, twice repeated."""
    if topology == "nas_fpn" and levels[1] - levels[0] != 4:
        with pytest.raises(ConfigError, match="five levels"):
            small_pyramid(topology=topology, min_level=levels[0], max_level=levels[1])
        return
    pyramid = small_pyramid(topology=topology, min_level=levels[0], max_level=levels[1])
    finest = levels[0]
    channels = (4, 6, 10) if finest == 3 else (2, 4, 6, 10)
    features = [
        torch.randn(1, width, 256 >> level, 256 >> level, requires_grad=True)
        for level, width in enumerate(channels, start=finest)
    ]
    outputs = pyramid(features)
    sides = [(8, 256 >> level, 256 >> level) for level in range(finest, levels[1] + 1)]
    assert [tuple(feature.shape[1:]) for feature in outputs] == sides
    total = torch.stack([output.square().sum() for output in outputs]).sum()
    for grad in torch.autograd.grad(total, features):
        assert grad.abs().sum() > 0


def test_symmetric_padding_pools_around_the_middle() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert max_pool(x, 2, "symmetric").flatten().tolist() == [5, 7, 13, 15]
    assert max_pool(x, 2, "same").flatten().tolist() == [10, 11, 14, 15]
    assert torch.equal(max_pool(x, 4, "symmetric"), max_pool(x, 4, "same"))


def test_a_node_is_fuse_swish_conv_norm() -> None:
    torch.manual_seed(0)
    node = FusionNode(Node(4, (0, 1)), (8, 8), small_spec(fusion="sum")).eval()
    same, coarse = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 2)
    out = node([same, coarse], (4, 4))
    fused = same + coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected = node.norm(node.conv(fused * torch.sigmoid(fused)))
    torch.testing.assert_close(out, expected)
    assert (out < 0).any(), "no activation after the norm"


def test_information_crosses_all_levels_both_ways() -> None:
    """One cell carries P7's news to P3 and P3's to P7."""
    pyramid = small_pyramid(fpn_repeats=1)
    features = [feature.requires_grad_() for feature in features_of(128)]
    outputs = pyramid(features)
    for output in outputs:
        grads = torch.autograd.grad(output.square().sum(), features, retain_graph=True)
        assert all(grad.abs().sum() > 0 for grad in grads)


def test_initial_weights() -> None:
    """Pyramid: TF's Glorot uniform; heads: normal of variance 1/fan_in; biases zero."""
    torch.manual_seed(0)
    conv = SeparableConv(64, 64)
    conv.init_glorot()
    depthwise, pointwise = (6.0 / (9 + 9)) ** 0.5, (6.0 / (64 + 64)) ** 0.5
    for weight, limit in ((conv.depthwise.weight, depthwise), (conv.pointwise.weight, pointwise)):
        assert weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
    conv.init_variance_scaling(bias=-2.0)
    assert conv.depthwise.weight.std().item() == pytest.approx(1 / 3, rel=0.1)
    assert conv.pointwise.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert conv.pointwise.bias is not None
    assert (conv.pointwise.bias == -2.0).all()


@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded", "sum"])
def test_fusion_weights_are_the_shares_by_name(fusion: str) -> None:
    config = ModelConfig(phi="0", fusion=fusion, fpn_repeats=2)  # type: ignore[arg-type]
    pyramid = Pyramid(resolve(config, 6), [40, 112, 320])
    found = pyramid.fusion_weights()
    if fusion == "sum":
        assert found == {}
        return
    assert len(found) == 2 * (5 * 2 + 3 * 3)  # of 8 nodes, the middle ones going up have 3 inputs
    weights = pyramid.cells[1].nodes[0].fuse.weights  # type: ignore[union-attr, index]
    with torch.no_grad():
        weights.copy_(torch.tensor([3.0, 2.0]))  # type: ignore[operator]
    changed = pyramid.fusion_weights()
    shares = [changed["cell1.P6_td.P6_in"], changed["cell1.P6_td.P7_in"]]
    expected = {"fast": [0.6, 0.4], "softmax": [0.731, 0.269], "unbounded": [3.0, 2.0]}[fusion]
    assert shares == pytest.approx(expected, abs=1e-3)
    assert {key for key in found if changed[key] != found[key]} == {
        "cell1.P6_td.P6_in", "cell1.P6_td.P7_in",
    }  # fmt: skip
    assert "cell0.P5_out.P5_td" in found
    assert "cell0.P7_out.P6_out" in found


@pytest.mark.parametrize("topology", get_args(TopologyKind))
def test_features_of_a_cell_have_names_of_their_own(topology: TopologyKind) -> None:
    spec = resolve(ModelConfig(phi="0", topology=topology, fpn_repeats=1), 6)
    found = Pyramid(spec, [40, 112, 320]).fusion_weights()
    nodes = {key.rpartition(".")[0] for key in found}
    graph = Pyramid(spec, [40, 112, 320]).graph
    assert len(nodes) == len(graph.nodes)
    assert len(found) == graph.num_edges
