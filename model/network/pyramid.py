"""The feature pyramid: any topology from data, repeated.

Shape legend: W pyramid channels, L levels, P_l [B, W, h_l, w_l].
Node: resample each input, fuse, swish, 3x3 separable conv, batch norm, no activation after
(google/automl `conv_bn_act_pattern=False`; the paper's prose has another order).
Resample: 1x1 conv + batch norm if the channels differ, then max-pool or nearest up-sampling.
Every edge from a backbone feature has a 1x1 of its own; sharing them is the classic bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.fusion import FUSIONS, Fusion
from model.network.layers import SeparableConv, glorot_uniform, max_pool, resize_to, run, zero_bias
from model.network.scaling import NetworkSpec, Padding
from model.network.topology import TOPOLOGIES, Node, Topology


class Lateral(nn.Sequential):
    """1x1 conv and batch norm, from a backbone's channels to W."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        glorot_uniform(conv.weight)
        zero_bias(conv)
        super().__init__(conv, nn.BatchNorm2d(out_channels))


class FusionNode(nn.Module):
    """Fuses the features of one node; `laterals` holds a 1x1 for each input not yet W wide."""

    def __init__(self, node: Node, in_channels: Sequence[int], spec: NetworkSpec) -> None:
        super().__init__()
        width, bias = spec.fpn_channels, spec.redundant_bias
        self.inputs = node.inputs
        self.padding: Padding = spec.padding
        self.laterals = nn.ModuleDict(
            {
                str(position): Lateral(channels, width, bias=bias)
                for position, channels in enumerate(in_channels)
                if channels != width
            }
        )
        self.fuse = FUSIONS[spec.fusion](len(node.inputs))
        self.conv = SeparableConv(width, width, bias=bias)
        self.conv.init_glorot()
        self.norm = nn.BatchNorm2d(width)

    def forward(self, features: Sequence[Tensor], side: tuple[int, int]) -> Tensor:
        inputs = []
        for position, source in enumerate(self.inputs):
            feature = features[source]
            if str(position) in self.laterals:
                feature = self.laterals[str(position)](feature)
            inputs.append(resize_to(feature, side, self.padding))
        out: Tensor = self.norm(self.conv(F.silu(self.fuse(inputs))))
        return out


class Cell(nn.Module):
    """One repeat of the topology: L features in, L features of width W out."""

    def __init__(self, topology: Topology, in_channels: Sequence[int], spec: NetworkSpec) -> None:
        super().__init__()
        self.outputs = topology.outputs
        self.node_level_index = [node.level - topology.min_level for node in topology.nodes]
        channels = [*in_channels, *[spec.fpn_channels] * len(topology.nodes)]
        self.nodes = nn.ModuleList(
            FusionNode(node, [channels[i] for i in node.inputs], spec) for node in topology.nodes
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        sides = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        known = list(features)
        for node, index in zip(self.nodes, self.node_level_index, strict=True):
            known.append(node(known, sides[index]))
        return [known[i] for i in self.outputs]


class Pyramid(nn.Module):
    """[P_min, ..., P5] of a backbone -> [P_min, ..., P_max], each W channels.

    P6 is the pooled 1x1 of P5, each coarser level the pool of the one before.
    """

    def __init__(
        self, spec: NetworkSpec, in_channels: Sequence[int], *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        width = spec.fpn_channels
        self.graph = graph = TOPOLOGIES[spec.topology](spec.min_level, spec.max_level)
        self.padding: Padding = spec.padding
        self.num_extra = graph.num_levels - len(in_channels)
        self.extra = Lateral(in_channels[-1], width, bias=spec.redundant_bias)
        first = [*in_channels, *[width] * self.num_extra]
        later = [width] * graph.num_levels
        self.cells = nn.ModuleList(
            Cell(graph, first if repeat == 0 else later, spec) for repeat in range(spec.fpn_repeats)
        )

    @torch.no_grad()
    def fusion_weights(self) -> dict[str, float]:
        """ "cell0.P4_td.P5_in" -> share of that input after normalisation; none for plain sums.

        A cell's features are named by their level: P4_in comes in, P4_out goes out, P4_td (top-down)
        lies between; a further one between them is P4_td2.
        """
        found = {}
        names = _feature_names(self.graph)
        for repeat, cell in enumerate(self.cells):
            nodes = cast("Sequence[FusionNode]", cell.nodes)
            for node, name in zip(nodes, names[self.graph.num_levels :], strict=True):
                if isinstance(node.fuse, Fusion):
                    factors = node.fuse.normalise(node.fuse.weights.float()).tolist()
                    for source, factor in zip(node.inputs, factors, strict=True):
                        found[f"cell{repeat}.{name}.{names[source]}"] = float(factor)
        return found

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        features = list(features)
        coarse: Tensor = self.extra(features[-1])
        for _ in range(self.num_extra):
            coarse = max_pool(coarse, 2, self.padding)
            features.append(coarse)
        for cell in self.cells:
            features = run(cell, features, again=self.recompute and self.training)
        return features


def _feature_names(graph: Topology) -> list[str]:
    """Of the inputs, then of each node's output."""
    names = [f"P{graph.min_level + level}_in" for level in range(graph.num_levels)]
    for number, node in enumerate(graph.nodes):
        if graph.num_levels + number in graph.outputs:
            names.append(f"P{node.level}_out")
            continue
        between = sum(name.startswith(f"P{node.level}_td") for name in names)
        names.append(f"P{node.level}_td" + (str(between + 1) if between else ""))
    return names
