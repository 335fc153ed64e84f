"""A detector's network as a graph for other programs: any batch, any size, no decision at run time.

Sides are multiples of 2^max_level, so every level is exactly half of the one before: TensorFlow's
SAME padding is then the same number of pixels at any size, and features are resampled by whole
factors. `Detector` asks the shapes instead; a tracer would write down the answers of one size.

Shape legend: B images, H and W pixels, A anchors, K classes, P_l [B, C, H/2^l, W/2^l].
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from model.network.detector import Detector
from model.network.pyramid import Cell, FusionNode, Pyramid
from model.network.scaling import Padding

Module = TypeVar("Module", bound=nn.Module)


class ExportedNetwork(nn.Module):
    """images [B, 3, H, W] pixels in 0..255, any type -> class logits [B, A, K], box codes [B, A, 4].

    H, W: multiples of 2^max_level, not checked. Outputs are float32, as `Detector` computes them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector, dtype: torch.dtype = torch.float32) -> None:
        """A copy of the detector. dtype: of weights and activations; pixels are normalised in float32."""
        super().__init__()
        detector = copy.deepcopy(detector).cpu().eval().requires_grad_(False)
        # Another layout of the weights would be written down as a condition on the shapes.
        detector = detector.to(memory_format=torch.contiguous_format)
        self.dtype = dtype
        self.backbone = with_fixed_padding(detector.backbone).to(dtype)
        self.pyramid = ExportedPyramid(detector.pyramid).to(dtype)
        self.class_head = detector.class_head.to(dtype)
        self.box_head = detector.box_head.to(dtype)
        self.register_buffer("mean", detector.mean)
        self.register_buffer("std", detector.std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((images.float() - self.mean) / self.std).to(self.dtype)
        features = self.pyramid(self.backbone(pixels))
        return self.class_head(features).float(), self.box_head(features).float()


class ExportedPyramid(nn.Module):
    """`model.network.pyramid.Pyramid` with its weights, resampling by level instead of by shape."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.padding: Padding = pyramid.padding
        self.num_extra, self.extra = pyramid.num_extra, pyramid.extra
        levels = pyramid.graph.feature_levels()
        self.cells = nn.ModuleList(
            _ExportedCell(cast(Cell, cell), levels) for cell in pyramid.cells
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        known = list(features)
        coarse: Tensor = self.extra(known[-1])
        for _ in range(self.num_extra):
            coarse = resample(coarse, 1, self.padding)
            known.append(coarse)
        for cell in self.cells:
            known = cell(known)
        return known


class _ExportedCell(nn.Module):
    def __init__(self, cell: Cell, feature_levels: Sequence[int]) -> None:
        """feature_levels: of the cell's inputs, then of each node's output."""
        super().__init__()
        self.outputs = cell.outputs
        num_inputs = len(feature_levels) - len(cell.nodes)
        self.nodes = nn.ModuleList(
            _ExportedNode(cast(FusionNode, node), level, feature_levels)
            for node, level in zip(cell.nodes, feature_levels[num_inputs:], strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        known = list(features)
        for node in self.nodes:
            known.append(node(known))
        return [known[i] for i in self.outputs]


class _ExportedNode(nn.Module):
    def __init__(self, node: FusionNode, level: int, feature_levels: Sequence[int]) -> None:
        super().__init__()
        self.inputs, self.padding = node.inputs, node.padding
        self.steps = [level - feature_levels[source] for source in node.inputs]
        self.laterals, self.fuse, self.conv, self.norm = (
            node.laterals, node.fuse, node.conv, node.norm,
        )  # fmt: skip

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        inputs = []
        for position, (source, steps) in enumerate(zip(self.inputs, self.steps, strict=True)):
            feature = features[source]
            if str(position) in self.laterals:
                feature = self.laterals[str(position)](feature)
            inputs.append(resample(feature, steps, self.padding))
        out: Tensor = self.norm(self.conv(F.silu(self.fuse(inputs))))
        return out


def resample(x: Tensor, steps: int, padding: Padding) -> Tensor:
    """[B, C, h, w] -> [B, C, h/2^steps, w/2^steps]: max-pooled, or nearest where steps is negative.

    h, w: multiples of 2^steps. Equal to `model.network.layers.resize_to` at these sizes.
    """
    if steps == 0:
        return x
    if steps < 0:
        factor = 2**-steps
        return F.interpolate(x, size=(x.shape[2] * factor, x.shape[3] * factor), mode="nearest")
    if steps == 1 and padding == "symmetric":
        # The far side's padding is never looked at; a repeated pixel changes no maximum.
        return F.max_pool2d(F.pad(x, (1, 0, 1, 0), mode="replicate"), 3, 2)
    return F.max_pool2d(x, 2**steps + 1, 2**steps, ceil_mode=True)


class FixedConv(nn.Module):
    """A strided convolution over sides that its stride divides: SAME or symmetric padding in pixels."""

    def __init__(self, conv: nn.Conv2d, before: tuple[int, int]) -> None:
        """before: pixels of padding (above, left of) the image; the rest, kernel - stride in all,
        comes after it.
        """
        super().__init__()
        self.conv = nn.Conv2d(
            conv.in_channels, conv.out_channels, cast("tuple[int, int]", conv.kernel_size),
            stride=cast("tuple[int, int]", conv.stride), groups=conv.groups,
            bias=conv.bias is not None,
        )  # fmt: skip
        self.conv.weight, self.conv.bias = conv.weight, conv.bias
        (above, left), (below, right) = (
            before,
            (k - s - p for k, s, p in zip(conv.kernel_size, conv.stride, before, strict=True)),
        )
        self.pads = (left, right, above, below)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.pads))
        return out


def with_fixed_padding(network: Module) -> Module:
    """Strided convolutions replaced by FixedConv, in place. Others have nothing to do with the size."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            before = _padding_before(child) if isinstance(child, nn.Conv2d) else None
            if before is not None:
                setattr(parent, name, FixedConv(cast(nn.Conv2d, child), before))
    return network


def _padding_before(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Pixels above and left; None for a convolution that stays what it is."""
    strided = all(1 < s <= k for s, k in zip(conv.stride, conv.kernel_size, strict=True))
    plain = type(conv) in (nn.Conv2d, Conv2dSame)  # others may do something to their weights
    if not (strided and plain) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return None
    totals = [k - s for k, s in zip(conv.kernel_size, conv.stride, strict=True)]
    if isinstance(conv, Conv2dSame):
        return totals[0] // 2, totals[1] // 2
    if isinstance(conv.padding, str):
        return None
    # What is padded after the image beyond kernel - stride - padding is never looked at.
    before = (int(conv.padding[0]), int(conv.padding[1]))
    divides = all(p <= total <= 2 * p for p, total in zip(before, totals, strict=True))
    return before if divides and any(before) else None
