"""What a network costs, without building it where closed forms exist.

Parameters and multiply-accumulates of b0..b7 networks come from arithmetic on the published block
table alone (a sweep can reject a sample in microseconds). MACs count convolutions, as the paper's
"FLOPs" do. Saved activations come from tracing one image on the meta device: no memory, no data.

Shape legend: W pyramid channels, n_l cells of level l, C_l channels of backbone feature l.
Source: arXiv 1905.11946 tables 1 and 2 (b0 blocks, compound coefficients);
reference facts §1.3 (closed forms of pyramid and heads).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.network.scaling import NetworkSpec
from model.network.topology import TOPOLOGIES

# expand ratio, kernel, stride, channels, repeats
B0_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
# width, depth multipliers of b0..b7
MULTIPLIERS = (
    (1.0, 1.0),
    (1.0, 1.1),
    (1.1, 1.2),
    (1.2, 1.4),
    (1.4, 1.8),
    (1.6, 2.2),
    (1.8, 2.6),
    (2.0, 3.1),
)
STEM_CHANNELS = 32
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Trainable parameters and multiply-accumulates for one image."""

    params: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs)


@dataclass(frozen=True)
class NetworkCost:
    backbone: Cost
    pyramid: Cost
    class_head: Cost
    box_head: Cost

    @property
    def total(self) -> Cost:
        return self.backbone + self.pyramid + self.class_head + self.box_head

    @property
    def params(self) -> int:
        return self.total.params

    @property
    def gmacs(self) -> float:
        return self.total.macs / 1e9


def backbone_index(name: str) -> int | None:
    """0..7 for `(tf_)efficientnet_bN`, None for any other timm network."""
    match = re.fullmatch(r"(?:tf_)?efficientnet_b([0-7])", name.split(".")[0])
    return int(match.group(1)) if match else None


def round_channels(channels: float) -> int:
    """To a multiple of 8, never below 90 % (the EfficientNet rule)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def backbone_cost(index: int, image_size_px: int) -> tuple[Cost, tuple[int, ...]]:
    """Cost of b0..b7 up to P5 (no classifier head) and the channels of P2 to P5."""
    width, depth = MULTIPLIERS[index]
    in_channels = round_channels(STEM_CHANNELS * width)
    side = (image_size_px + 1) // 2
    params = 27 * in_channels + 2 * in_channels
    macs = 27 * in_channels * side * side
    channels_by_stage: list[int] = []
    for expand, kernel, stage_stride, stage_channels, repeats in B0_STAGES:
        out_channels = round_channels(stage_channels * width)
        for repeat in range(math.ceil(repeats * depth)):
            stride = stage_stride if repeat == 0 else 1
            middle = in_channels * expand
            squeezed = round(in_channels * 0.25)
            out_side = -(-side // stride)
            if expand > 1:
                params += in_channels * middle + 2 * middle
                macs += in_channels * middle * side * side
            params += kernel * kernel * middle + 2 * middle
            macs += kernel * kernel * middle * out_side * out_side
            params += 2 * middle * squeezed + squeezed + middle
            macs += 2 * middle * squeezed
            params += middle * out_channels + 2 * out_channels
            macs += middle * out_channels * out_side * out_side
            in_channels, side = out_channels, out_side
        channels_by_stage.append(out_channels)
    return Cost(params, macs), tuple(channels_by_stage[stage] for stage in (1, 2, 4, 6))


def pyramid_cost(spec: NetworkSpec, channels: tuple[int, ...]) -> Cost:
    """All repeats of the topology, the 1x1 of P6 and of every edge from a backbone feature."""
    topology = TOPOLOGIES[spec.topology](spec.min_level, spec.max_level)
    width, sides = spec.fpn_channels, spec.level_sizes_px()
    levels = topology.feature_levels()
    first = [*channels, *[width] * (topology.num_levels - len(channels) + len(topology.nodes))]
    later = [width] * len(first)
    p5_cells = sides[5] ** 2
    # Of a 1x1 or separable convolution: its bias, if it has one, and batch norm's two.
    per_channel = 3 if spec.redundant_bias else 2
    params = channels[-1] * width + per_channel * width
    macs = channels[-1] * width * p5_cells
    weights_per_edge = 0 if spec.fusion == "sum" else 1
    for repeat in range(spec.fpn_repeats):
        sources = first if repeat == 0 else later
        for node in topology.nodes:
            params += 9 * width + width * width + per_channel * width
            params += weights_per_edge * len(node.inputs)
            macs += (9 * width + width * width) * sides[node.level] ** 2
            for source in node.inputs:
                if sources[source] != width:
                    params += sources[source] * width + per_channel * width
                    macs += sources[source] * width * sides[levels[source]] ** 2
    return Cost(params, macs)


def head_cost(spec: NetworkSpec, out_per_anchor: int) -> Cost:
    width, layers = spec.fpn_channels, spec.head_layers
    out = spec.anchors_per_cell * out_per_anchor
    sides = spec.level_sizes_px()
    cells = sum(sides[level] ** 2 for level in range(spec.min_level, spec.max_level + 1))
    bias = width if spec.redundant_bias else 0
    params = layers * (9 * width + width * width + bias)
    params += 2 * width * layers * spec.num_levels + 9 * width + width * out + out
    macs = cells * (layers * (9 * width + width * width) + 9 * width + width * out)
    return Cost(params, macs)


def network_cost(spec: NetworkSpec) -> NetworkCost:
    """Closed form for b0..b7; for another timm backbone that part is counted on the meta device."""
    index = backbone_index(spec.backbone)
    if index is not None:
        cost, all_channels = backbone_cost(index, spec.image_size_px)
        channels = all_channels[spec.min_level - 2 :]
    else:
        cost, channels = _meta_backbone_cost(spec)
    return NetworkCost(
        cost, pyramid_cost(spec, channels), head_cost(spec, spec.num_classes), head_cost(spec, 4)
    )


def _meta_backbone_cost(spec: NetworkSpec) -> tuple[Cost, tuple[int, ...]]:
    from model.network.backbone import Backbone, num_parameters

    with torch.device("meta"):
        backbone = Backbone(
            spec.backbone, pretrained=False, drop_path=0.0, min_level=spec.min_level
        ).eval()
        image = torch.empty(1, 3, spec.image_size_px, spec.image_size_px)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        backbone(image)
    return Cost(num_parameters(backbone), counter.get_total_flops() // 2), backbone.channels


@dataclass(frozen=True)
class Activations:
    """Bytes for one training image. saved: kept for the backward pass, by stage; passed: what goes
    from stage to stage.
    """

    saved: dict[str, int]
    passed: int

    def total(self, *, recompute: bool) -> int:
        """With `recompute` what is passed, and the largest stage while it is computed again."""
        if recompute:
            return self.passed + max(self.saved.values())
        return sum(self.saved.values())


def activations(spec: NetworkSpec, *, half_precision: bool = False) -> Activations:
    """What autograd keeps while one image is trained on, parameters excluded.

    Traced in float32 on the meta device; bfloat16 autocast keeps about half.
    """
    from model.network.detector import Detector

    with torch.device("meta"):
        detector = Detector(spec).train()
        # Two, and half of the sum: batch norm refuses a single value, and the top level may be 1x1.
        images = torch.empty(2, 3, spec.image_size_px, spec.image_size_px)
    parameters = {id(p) for p in detector.parameters()}
    owner: dict[tuple[int, int], tuple[str, int]] = {}
    outputs: dict[int, int] = {}
    alive: list[Tensor] = []  # until the count is done, so that no storage is counted twice
    stage = "between"

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters and tensor.numel() > 1:
            storage = tensor.untyped_storage()
            owner.setdefault((storage._cdata, tensor.data_ptr()), (stage, storage.nbytes()))
        alive.append(tensor)
        return tensor

    def enter(name: str) -> None:
        nonlocal stage
        stage = name

    def leave(result: Tensor | list[Tensor]) -> None:
        enter("between")
        for tensor in [result] if isinstance(result, Tensor) else result:
            outputs[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor)

    for name, module in detector.stages().items():
        module.register_forward_pre_hook(lambda _, __, name=name: enter(name))
        module.register_forward_hook(lambda _, __, result: leave(result))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        detector(images)
    share = 4 if half_precision else 2  # two images, and half the bytes
    saved: dict[str, int] = {}
    for name, size in owner.values():
        saved[name] = saved.get(name, 0) + size // share
    return Activations(saved, sum(outputs.values()) // share)
