"""The network without questions about shapes computes what the one with them does."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from helpers.peer import randomise
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from model.network.detector import Detector
from model.network.exported import ExportedNetwork, FixedConv, resample, with_fixed_padding
from model.network.layers import resize_to
from model.network.scaling import FusionKind, ModelConfig, Padding, TopologyKind, Variant, resolve


def network(num_classes: int = 3, **changes: object) -> Detector:
    tiny = {
        "backbone": "test_efficientnet", "fpn_channels": 16, "fpn_repeats": 2, "head_layers": 1,
        "image_size_px": 128,
    }  # fmt: skip
    detector = Detector(resolve(ModelConfig(**(tiny | changes)), num_classes)).eval()  # type: ignore[arg-type]
    randomise(detector)
    return detector


def pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@torch.no_grad()
def assert_equal_outputs(detector: Detector, *shapes: tuple[int, int, int]) -> None:
    exported = ExportedNetwork(detector)
    for num_images, height, width in shapes:
        images = pixels(num_images, 3, height, width)
        for mine, theirs in zip(exported(images), detector(images), strict=True):
            assert theirs.std() > 0.01, "outputs that hardly vary would agree by accident"
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("topology", "fusion"),
    [
        *((topology, "fast") for topology in get_args(TopologyKind)),
        *(("bifpn", fusion) for fusion in get_args(FusionKind) if fusion != "fast"),
    ],
)
def test_every_topology_and_fusion_at_other_sizes(
    topology: TopologyKind, fusion: FusionKind
) -> None:
    detector = network(topology=topology, fusion=fusion, fpn_repeats=1)
    assert_equal_outputs(detector, (2, 128, 128), (1, 256, 128), (1, 128, 384))


@pytest.mark.parametrize(("min_level", "max_level"), [(2, 7), (3, 6), (3, 8)])
@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_level_range_and_padding(min_level: int, max_level: int, variant: Variant) -> None:
    detector = network(
        min_level=min_level, max_level=max_level, variant=variant, image_size_px=2**max_level
    )
    side = 2**max_level
    assert_equal_outputs(detector, (1, side, side), (1, 2 * side, side))


@pytest.mark.parametrize("backbone", ["tf_efficientnet_b0", "efficientnet_b0", "resnet18"])
def test_other_backbones(backbone: str) -> None:
    variant = "tf" if backbone.startswith("tf_") else "pytorch"
    assert_equal_outputs(network(backbone=backbone, variant=variant), (1, 128, 256))


def test_the_detector_stays_as_it_was() -> None:
    detector = network()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    ExportedNetwork(detector, torch.float16)
    after = detector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_float_pixels_are_the_same_pixels() -> None:
    exported, images = ExportedNetwork(network()), pixels(1, 3, 128, 128)
    with torch.no_grad():
        for mine, theirs in zip(exported(images), exported(images.float()), strict=True):
            assert torch.equal(mine, theirs)


def test_half_precision_is_near() -> None:
    detector, images = network(), pixels(1, 3, 128, 128)
    half = ExportedNetwork(detector, torch.float16)
    assert {tensor.dtype for tensor in half.backbone.state_dict().values()} <= {
        torch.float16, torch.int64,
    }  # fmt: skip
    with torch.no_grad():
        for mine, theirs in zip(half(images), detector(images), strict=True):
            assert mine.dtype == torch.float32
            assert 0 < (mine - theirs).abs().max() < 0.03 * theirs.abs().max()


@pytest.mark.parametrize("padding", get_args(Padding))
@pytest.mark.parametrize("steps", [-3, -1, 0, 1, 2, 4])
def test_resampling_by_steps_is_resizing_to_their_side(steps: int, padding: Padding) -> None:
    x = torch.randn(1, 2, 32, 48)
    side = (round(32 / 2**steps), round(48 / 2**steps))
    assert torch.equal(resample(x, steps, padding), resize_to(x, side, padding))


def convolution(kernel: int, stride: int, padding: int | None) -> nn.Conv2d:
    """padding: None is TensorFlow's SAME."""
    torch.manual_seed(0)
    if padding is None:
        same: nn.Conv2d = Conv2dSame(4, 4, kernel, stride=stride, groups=2)
        return same
    return nn.Conv2d(4, 4, kernel, stride=stride, padding=padding, groups=2, bias=False)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "replaced"),
    [
        (3, 2, None, True),
        (5, 2, None, True),
        (4, 4, None, True),
        (3, 2, 1, True),
        (5, 2, 2, True),
        (7, 4, 3, True),
        (3, 2, 0, False),  # gives a pixel less than half
        (1, 2, 0, False),
        (2, 2, 0, False),
        (3, 1, 1, False),
    ],
)
def test_fixed_padding(kernel: int, stride: int, padding: int | None, replaced: bool) -> None:
    conv, x = convolution(kernel, stride, padding), torch.randn(2, 4, 32, 16)
    fixed = with_fixed_padding(nn.Sequential(conv))
    assert isinstance(fixed[0], FixedConv) == replaced
    assert torch.equal(fixed(x), conv(x))
