"""Compound scaling: from `phi` and free coefficients to every dimension of the network.

`phi` is a literal table, not the paper's equations: the released models deviate from them
(D2 and D4 width, D5 to D7 depth and resolution, `sum` fusion from D6 on). Coefficients that
differ from the paper's are applied after the table.

Shape legend: W pyramid channels, D pyramid repeats, H head layers, R image size in pixels.
Source: arXiv 1911.09070v7 §4.2; google/automl `hparams_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from model.errors import ConfigError

Phi = Literal["0", "1", "2", "3", "4", "5", "6", "7", "7x"]
FusionKind = Literal["fast", "softmax", "unbounded", "sum"]
TopologyKind = Literal["bifpn", "fpn", "panet", "simplified_panet", "nas_fpn", "fully_connected"]
Variant = Literal["tf", "pytorch"]
Padding = Literal["same", "symmetric"]
Part = Literal["backbone", "pyramid", "class_head", "box_head"]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class PhiRow:
    """One published model: backbone index b0..b7 and the dimensions of its pyramid and heads."""

    backbone: int
    width: int
    depth: int
    head: int
    image_size_px: int
    fusion: FusionKind
    max_level: int = 7
    anchor_scale: float = 4.0


PHI_TABLE: dict[str, PhiRow] = {
    "0": PhiRow(0, 64, 3, 3, 512, "fast"),
    "1": PhiRow(1, 88, 4, 3, 640, "fast"),
    "2": PhiRow(2, 112, 5, 3, 768, "fast"),
    "3": PhiRow(3, 160, 6, 4, 896, "fast"),
    "4": PhiRow(4, 224, 7, 4, 1024, "fast"),
    "5": PhiRow(5, 288, 7, 4, 1280, "fast"),
    "6": PhiRow(6, 384, 8, 5, 1280, "sum"),
    "7": PhiRow(6, 384, 8, 5, 1536, "sum", anchor_scale=5.0),
    "7x": PhiRow(7, 384, 8, 5, 1536, "sum", max_level=8),
}


@dataclass(frozen=True)
class ScalingConfig:
    """Coefficients applied after the table; the defaults leave the published model as it is.

    width: base b of W = 64 * b**phi, rounded to a multiple of 8 (the paper searched 1.2 to 1.45).
    depth: pyramid repeats added to the table's.
    head: head layers added to the table's.
    resolution: base r of R = r + 128 * phi pixels.
    backbone: steps up or down the EfficientNet family b0..b7.
    """

    width: float | None = None
    depth: int = 0
    head: int = 0
    resolution: int | None = None
    backbone: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The network that is asked for; None means "as the phi table says".

    pretrained: ImageNet weights for the backbone; "auto" is yes for your data, no for the demo.
    init: weights to start from: a checkpoint of ours (folder or URI), an effdet weight file, or a
    name that effdet published, such as tf_efficientdet_d0.
    freeze: parts that stay as they are, their batch norms' statistics included.
    variant: "tf" is the released models (TensorFlow's SAME padding, a bias before each batch norm);
    "pytorch" is effdet's own efficientdet_dN (symmetric padding; up to D3 none of those biases).
    min_level, max_level: finest (2 or 3) and coarsest (6 to 8) level of the pyramid.
    drop_path: stochastic depth rate at the last block, linear from 0 at the first.
    backbone: the name of any timm network with features at strides 8, 16 and 32.
    fpn_channels, fpn_repeats, head_layers, image_size_px: explicit sizes that win over scaling.
    """

    phi: Phi = "0"
    pretrained: Literal["auto", "yes", "no"] = "auto"
    init: str | None = None
    freeze: tuple[Part, ...] = ()
    variant: Variant = "tf"
    fusion: FusionKind | None = None
    topology: TopologyKind = "bifpn"
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    image_size_px: int | None = None
    backbone: str | None = None
    fpn_channels: int | None = None
    fpn_repeats: int | None = None
    head_layers: int | None = None
    min_level: int | None = None
    max_level: int | None = None
    anchor_scale: float | None = None
    anchor_octaves: int = 3
    drop_path: float | None = None


@dataclass(frozen=True)
class NetworkSpec:
    """Every dimension of one network, nothing left to derive. Stored with each checkpoint."""

    phi: str
    num_classes: int
    backbone: str
    image_size_px: int
    fpn_channels: int
    fpn_repeats: int
    head_layers: int
    fusion: FusionKind
    topology: TopologyKind
    min_level: int
    max_level: int
    anchor_scale: float
    anchor_octaves: int
    drop_path: float
    aspect_ratios: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
    padding: Padding = "same"
    redundant_bias: bool = True
    backbone_bn_eps: float = 1e-3

    @property
    def num_levels(self) -> int:
        return self.max_level - self.min_level + 1

    @property
    def anchors_per_cell(self) -> int:
        return self.anchor_octaves * len(self.aspect_ratios)

    def level_sizes_px(self) -> dict[int, int]:
        """Side of the square feature map at each level 0..max_level (ceil division by 2)."""
        return level_sizes(self.image_size_px, self.max_level)


def level_sizes(image_size_px: int, max_level: int) -> dict[int, int]:
    sizes = {0: image_size_px}
    for level in range(1, max_level + 1):
        sizes[level] = (sizes[level - 1] - 1) // 2 + 1
    return sizes


def resolve(config: ModelConfig, num_classes: int) -> NetworkSpec:
    """Table, then coefficients, then explicit sizes.

    Raises:
        ConfigError: a dimension that no network can have.
    """
    if config.phi not in PHI_TABLE:
        raise ConfigError("model.phi", "0..7 or 7x", repr(config.phi))
    row, scale = PHI_TABLE[config.phi], config.scaling
    exponent = 7 if config.phi == "7x" else int(config.phi)

    width = row.width
    if scale.width is not None:
        width = max(8, round(64 * scale.width**exponent / 8) * 8)
    size = row.image_size_px
    if scale.resolution is not None:
        size = scale.resolution + 128 * exponent
    backbone_index = row.backbone + scale.backbone
    if not 0 <= backbone_index <= 7:
        raise ConfigError(
            "model.scaling.backbone",
            f"between {-row.backbone} and {7 - row.backbone} steps from b{row.backbone}",
            str(scale.backbone),
            "EfficientNet has b0 to b7",
        )
    pytorch_small = config.variant == "pytorch" and exponent <= 3
    prefix = "tf_" if config.variant == "tf" else ""
    # google/automl efficientnet_builder: survival 0.8 for b1 and up, none dropped for b0.
    drop_path = 0.0 if backbone_index == 0 else 0.2
    spec = NetworkSpec(
        phi=config.phi,
        num_classes=num_classes,
        backbone=config.backbone or f"{prefix}efficientnet_b{backbone_index}",
        image_size_px=_given(config.image_size_px, size),
        fpn_channels=_given(config.fpn_channels, width),
        fpn_repeats=_given(config.fpn_repeats, row.depth + scale.depth),
        head_layers=_given(config.head_layers, row.head + scale.head),
        fusion=config.fusion or row.fusion,
        topology=config.topology,
        min_level=_given(config.min_level, 3),
        max_level=_given(config.max_level, row.max_level),
        anchor_scale=_given(config.anchor_scale, row.anchor_scale),
        anchor_octaves=config.anchor_octaves,
        drop_path=_given(config.drop_path, drop_path),
        padding="symmetric" if pytorch_small else "same",
        redundant_bias=not pytorch_small,
        backbone_bn_eps=1e-3 if config.variant == "tf" else 1e-5,
    )
    _check(spec)
    return spec


def _given(explicit: Number | None, derived: Number) -> Number:
    """An explicit 0 is a mistake to report, not a wish for the default."""
    return derived if explicit is None else explicit


def _check(spec: NetworkSpec) -> None:
    for where, value, low, high in (
        ("model.fpn_channels", spec.fpn_channels, 8, 2048),
        ("model.fpn_repeats", spec.fpn_repeats, 1, 32),
        ("model.head_layers", spec.head_layers, 1, 32),
        ("model.min_level", spec.min_level, 2, 3),
        ("model.max_level", spec.max_level, 6, 8),
        ("model.anchor_octaves", spec.anchor_octaves, 1, 8),
    ):
        if not low <= value <= high:
            raise ConfigError(
                where, f"{low}..{high}", str(value), "check it and model.scaling, which moves it"
            )
    multiple = 2**spec.max_level
    if spec.image_size_px < multiple or spec.image_size_px % multiple:
        below = max(multiple, spec.image_size_px // multiple * multiple)
        raise ConfigError(
            "model.image_size_px",
            f"a multiple of {multiple} (2^max_level)",
            str(spec.image_size_px),
            f"the nearest that do are {below} and {below + multiple}",
        )
    if spec.topology == "nas_fpn" and spec.num_levels != 5:
        raise ConfigError(
            "model.topology",
            "five levels for nas_fpn, which was found on P3-P7",
            f"P{spec.min_level}-P{spec.max_level}",
            "choose another topology, or levels that are five",
        )
    if not 0.0 <= spec.drop_path < 1.0:
        raise ConfigError("model.drop_path", "0 <= rate < 1", str(spec.drop_path))
    if spec.anchor_scale <= 0:
        raise ConfigError("model.anchor_scale", "a positive number", str(spec.anchor_scale))
    if spec.num_classes < 1:
        raise ConfigError("data", "at least one class", str(spec.num_classes), "add categories")


assert tuple(PHI_TABLE) == get_args(Phi)
