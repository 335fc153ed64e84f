from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from model.errors import ConfigError
from model.network.fusion import FUSIONS
from model.network.scaling import (
    PHI_TABLE,
    FusionKind,
    ModelConfig,
    Phi,
    ScalingConfig,
    TopologyKind,
    resolve,
)
from model.network.topology import TOPOLOGIES

# width, depth, head, px, backbone, fusion, coarsest level, anchor scale, drop path
PUBLISHED = {
    "0": (64, 3, 3, 512, 0, "fast", 7, 4.0, 0.0),
    "1": (88, 4, 3, 640, 1, "fast", 7, 4.0, 0.2),
    "2": (112, 5, 3, 768, 2, "fast", 7, 4.0, 0.2),
    "3": (160, 6, 4, 896, 3, "fast", 7, 4.0, 0.2),
    "4": (224, 7, 4, 1024, 4, "fast", 7, 4.0, 0.2),
    "5": (288, 7, 4, 1280, 5, "fast", 7, 4.0, 0.2),
    "6": (384, 8, 5, 1280, 6, "sum", 7, 4.0, 0.2),
    "7": (384, 8, 5, 1536, 6, "sum", 7, 5.0, 0.2),
    "7x": (384, 8, 5, 1536, 7, "sum", 8, 4.0, 0.2),
}


@pytest.mark.parametrize("phi", get_args(Phi))
def test_phi_gives_the_published_model(phi: Phi) -> None:
    spec = resolve(ModelConfig(phi=phi), 90)
    width, depth, head, size, backbone, fusion, level, scale, drop = PUBLISHED[phi]
    assert (spec.fpn_channels, spec.fpn_repeats, spec.head_layers) == (width, depth, head)
    assert (spec.image_size_px, spec.backbone) == (size, f"tf_efficientnet_b{backbone}")
    assert (spec.fusion, spec.max_level, spec.anchor_scale) == (fusion, level, scale)
    assert spec.drop_path == drop


def test_literals_agree_with_the_tables() -> None:
    assert set(get_args(Phi)) == set(PHI_TABLE)
    assert set(get_args(FusionKind)) == set(FUSIONS)
    assert set(get_args(TopologyKind)) == set(TOPOLOGIES)


@pytest.mark.parametrize(
    ("phi", "scaling", "field", "expected"),
    [
        ("1", ScalingConfig(width=1.35), "fpn_channels", 88),  # 64 * 1.35 = 86.4
        ("2", ScalingConfig(width=1.2), "fpn_channels", 96),  # 92.2
        ("3", ScalingConfig(width=1.25), "fpn_channels", 128),  # 125
        ("0", ScalingConfig(width=1.45), "fpn_channels", 64),  # b^0 is 1 for any b
        ("7x", ScalingConfig(width=1.35), "fpn_channels", 520),  # exponent 7: 523.02
        ("2", ScalingConfig(depth=-1), "fpn_repeats", 4),
        ("2", ScalingConfig(head=2), "head_layers", 5),
        ("3", ScalingConfig(resolution=384), "image_size_px", 768),
        ("7", ScalingConfig(resolution=512), "image_size_px", 1408),
        ("3", ScalingConfig(backbone=-2), "backbone", "tf_efficientnet_b1"),
        ("6", ScalingConfig(backbone=1), "backbone", "tf_efficientnet_b7"),
    ],
)
def test_a_coefficient_moves_its_own_dimension_only(
    phi: Phi, scaling: ScalingConfig, field: str, expected: object
) -> None:
    spec = resolve(ModelConfig(phi=phi, scaling=scaling), 90)
    assert getattr(spec, field) == expected
    published = resolve(ModelConfig(phi=phi), 90)
    assert replace(spec, **{field: getattr(published, field)}) == published


def test_explicit_sizes_win_over_coefficients() -> None:
    config = ModelConfig(
        phi="3",
        scaling=ScalingConfig(width=1.45, depth=2, head=2, resolution=1024, backbone=1),
        fpn_channels=40,
        fpn_repeats=2,
        head_layers=1,
        image_size_px=256,
        backbone="resnet18",
        fusion="softmax",
        anchor_scale=3.0,
        max_level=6,
        drop_path=0.0,
    )
    spec = resolve(config, 7)
    assert (spec.fpn_channels, spec.fpn_repeats, spec.head_layers) == (40, 2, 1)
    assert (spec.image_size_px, spec.backbone, spec.fusion) == (256, "resnet18", "softmax")
    assert (spec.anchor_scale, spec.max_level, spec.drop_path) == (3.0, 6, 0.0)
    assert spec.num_classes == 7


@pytest.mark.parametrize(
    ("changes", "where", "hint"),
    [
        ({"image_size_px": 500}, "model.image_size_px", "384 and 512"),
        ({"image_size_px": 20}, "model.image_size_px", "128 and 256"),
        ({"image_size_px": 640, "max_level": 8}, "model.image_size_px", "512 and 768"),
        ({"image_size_px": 0}, "model.image_size_px", "128 and 256"),
        ({"scaling": ScalingConfig(resolution=500)}, "model.image_size_px", "384 and 512"),
        ({"scaling": ScalingConfig(backbone=-1)}, "model.scaling.backbone", "between 0 and 7"),
        ({"phi": "6", "scaling": ScalingConfig(backbone=2)}, "model.scaling.backbone", "-6 and 1"),
        ({"scaling": ScalingConfig(depth=-3)}, "model.fpn_repeats", "model.scaling"),
        ({"scaling": ScalingConfig(head=-3)}, "model.head_layers", "model.scaling"),
        ({"fpn_repeats": 0}, "model.fpn_repeats", "1..32"),
        ({"fpn_channels": 4}, "model.fpn_channels", "8..2048"),
        ({"max_level": 9}, "model.max_level", "6..8"),
        ({"anchor_octaves": 0}, "model.anchor_octaves", "1..8"),
        ({"anchor_scale": 0.0}, "model.anchor_scale", "positive"),
        ({"drop_path": 1.0}, "model.drop_path", "0 <= rate < 1"),
        ({"phi": "9"}, "model.phi", "0..7 or 7x"),
    ],
)
def test_impossible_dimensions_are_refused(changes: dict[str, Any], where: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ModelConfig(**changes), 90)
    assert caught.value.where == where
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nearest_sizes_of_the_error_text_work() -> None:
    with pytest.raises(ConfigError, match="384 and 512"):
        resolve(ModelConfig(image_size_px=500), 90)
    assert resolve(ModelConfig(image_size_px=384), 90).image_size_px == 384


def test_no_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one class"):
        resolve(ModelConfig(), 0)
