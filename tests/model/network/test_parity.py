"""Our network against the peer's, on the same random weights with randomised statistics."""

from __future__ import annotations

import pytest
import torch
from effdet import EfficientDet
from effdet.config import get_efficientdet_config
from helpers.peer import flat, randomise
from torch import Tensor

from model.network.detector import Detector
from model.network.effdet_format import PUBLISHED, from_effdet, to_effdet
from model.network.scaling import ModelConfig, NetworkSpec, TopologyKind, resolve

# Native sizes would take minutes: the smallest image whose coarsest level is more than one cell.
SIZES = {"7x": 512}


def pair(name: str, size_px: int, num_classes: int = 90) -> tuple[Detector, EfficientDet]:
    """Ours and theirs; theirs from its own published configuration, but for the image size."""
    published = PUBLISHED[name]
    config = get_efficientdet_config(name)
    config.update(image_size=(size_px, size_px), num_classes=num_classes)
    torch.manual_seed(0)
    peer = EfficientDet(config, pretrained_backbone=False).eval()
    model = ModelConfig(phi=published.phi, variant=published.variant, image_size_px=size_px)
    return Detector(resolve(model, num_classes)).eval(), peer


def assert_equal_outputs(ours: Detector, peer: EfficientDet, size_px: int, classes: int) -> None:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (1, 3, size_px, size_px), dtype=torch.uint8)
    with torch.no_grad():
        found = ours(images)
        theirs = [
            flat(levels, width)
            for levels, width in zip(peer(ours.normalise(images)), (classes, 4), strict=True)
        ]
    for mine, other in zip(found, theirs, strict=True):
        scale = other.abs().max()
        assert other.std() > 0.01 * scale, "outputs that hardly vary would agree by accident"
        assert ((mine - other).abs().max() / scale).item() <= 1e-4


@pytest.mark.parametrize(
    "name",
    [
        *(f"tf_efficientdet_d{phi}" for phi in ("0", "1", "2")),
        "efficientdet_d0",
        *(
            pytest.param(name, marks=pytest.mark.integration)
            for name in ("tf_efficientdet_d3", "tf_efficientdet_d7x", "efficientdet_d3")
        ),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("tf_efficientdet_d4", "efficientdet_d4")
        ),
    ],
)
def test_outputs_equal_effdet(name: str) -> None:
    """effdet's weights in, its outputs out, to 1e-4 of the largest; and the names come back."""
    size_px = SIZES.get(PUBLISHED[name].phi, 256)
    ours, peer = pair(name, size_px)
    randomise(peer)
    theirs = peer.state_dict()
    tensors = from_effdet(theirs, ours.state_dict(), ours.spec)
    ours.load_state_dict(tensors, strict=True)
    assert_equal_outputs(ours, peer, size_px, 90)
    assert to_effdet(ours.state_dict(), ours.spec).keys() == theirs.keys()


@pytest.mark.parametrize(("topology", "theirs"), [("panet", "pan_fa"), ("bifpn", "bifpn_fa")])
def test_topologies_that_effdet_has(topology: TopologyKind, theirs: str) -> None:
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(image_size=(128, 128), num_classes=3, fpn_name=theirs, fpn_cell_repeats=2)
    peer = EfficientDet(config, pretrained_backbone=False).eval()
    randomise(peer)
    spec = resolve(ModelConfig(topology=topology, fpn_repeats=2, image_size_px=128), 3)
    ours = Detector(spec).eval()
    ours.load_state_dict(from_effdet(peer.state_dict(), ours.state_dict(), spec), strict=True)
    assert_equal_outputs(ours, peer, 128, 3)


@pytest.mark.parametrize(("min_level", "max_level"), [(2, 7), (2, 6), (3, 8)])
def test_level_ranges(min_level: int, max_level: int) -> None:
    """effdet takes them too, by its backbone_indices."""
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(
        image_size=(256, 256),
        num_classes=3,
        fpn_cell_repeats=1,
        min_level=min_level,
        max_level=max_level,
        num_levels=max_level - min_level + 1,
        backbone_indices=tuple(range(min_level - 1, 5)),
    )
    peer = EfficientDet(config, pretrained_backbone=False).eval()
    randomise(peer)
    model = ModelConfig(fpn_repeats=1, image_size_px=256, min_level=min_level, max_level=max_level)
    ours = Detector(resolve(model, 3)).eval()
    ours.load_state_dict(from_effdet(peer.state_dict(), ours.state_dict(), ours.spec), strict=True)
    assert_equal_outputs(ours, peer, 256, 3)


def test_our_weights_run_in_effdet() -> None:
    spec: NetworkSpec = resolve(ModelConfig(image_size_px=128, fpn_repeats=2), 7)
    torch.manual_seed(2)
    ours = Detector(spec).eval()
    randomise(ours)
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(image_size=(128, 128), num_classes=7, fpn_cell_repeats=2)
    peer = EfficientDet(config, pretrained_backbone=False).eval()
    exported: dict[str, Tensor] = to_effdet(ours.state_dict(), spec)
    peer.load_state_dict(exported, strict=True)
    assert_equal_outputs(ours, peer, 128, 7)
