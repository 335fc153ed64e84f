"""EfficientDet: backbone, pyramid, heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.imagenet import MEAN, STD
from model.network.backbone import Backbone, init_batch_norm
from model.network.head import Head, class_bias
from model.network.pyramid import Pyramid
from model.network.scaling import NetworkSpec

BATCH_NORM_EPS = 1e-3


class Detector(nn.Module):
    """images uint8 [B, 3, R, R] -> class logits [B, A, K], box codes [B, A, 4], both float32.

    Box codes are (ty, tx, th, tw) relative to `model.detection.anchors`. Normalisation is part of
    the network, on its device, so that uint8 is all that ever crosses the bus.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        pretrained: bool = False,
        bn_momentum: float = 0.01,
        recompute: bool = False,
    ) -> None:
        """recompute: keep only what passes between stages; the backward pass computes the rest."""
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(
            spec.backbone,
            min_level=spec.min_level,
            pretrained=pretrained,
            drop_path=spec.drop_path,
            recompute=recompute,
        )
        self.pyramid = Pyramid(spec, self.backbone.channels, recompute=recompute)

        def head(out_per_anchor: int, bias: float) -> Head:
            return Head(
                width=spec.fpn_channels,
                layers=spec.head_layers,
                num_levels=spec.num_levels,
                anchors_per_cell=spec.anchors_per_cell,
                out_per_anchor=out_per_anchor,
                bias=bias,
                redundant_bias=spec.redundant_bias,
                recompute=recompute,
            )

        self.class_head = head(spec.num_classes, class_bias())
        self.box_head = head(4, 0.0)
        init_batch_norm(self, momentum=bn_momentum, eps=BATCH_NORM_EPS)
        init_batch_norm(self.backbone, momentum=bn_momentum, eps=spec.backbone_bn_eps)
        for name, value in (("mean", MEAN), ("std", STD)):
            scaled = torch.tensor(value).view(1, 3, 1, 1) * 255.0
            self.register_buffer(name, scaled, persistent=False)

    def stages(self) -> dict[str, nn.Module]:
        """The parts that are computed again as one where activations are not kept."""
        blocks = getattr(self.backbone.network, "blocks", None)
        backbone = list(blocks) if blocks is not None else [self.backbone]
        named = {f"backbone.{index}": stage for index, stage in enumerate(backbone)}
        named |= {f"pyramid.{index}": cell for index, cell in enumerate(self.pyramid.cells)}
        return named | {"class_head": self.class_head, "box_head": self.box_head}

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 or float pixels in 0..255 [B, 3, H, W] -> float32, ImageNet mean 0 and std 1."""
        return (images.float() - self.mean) / self.std

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.pyramid(self.backbone(self.normalise(images)))
        return self.class_head(features).float(), self.box_head(features).float()
