"""timm backbones: features at strides 8, 16 and 32 (P3, P4, P5), and 4 (P2) where asked for.

Channels are read from timm's `feature_info` and checked against a forward pass's contract when
the network is built, because timm renames and re-tags models between releases.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from model.errors import ConfigError, nearest
from model.network.stochastic_depth import replace_drop_path

# The paper's backbones were trained on ImageNet-1k with AutoAugment; timm's default tag is NoisyStudent.
PRETRAINED_TAG = "aa_in1k"
LAST_LEVEL = 5


class Backbone(nn.Module):
    """images [B, 3, R, R] normalised -> [P_min, ..., P5], P_l: [B, channels[l], R/2^l, R/2^l]."""

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool,
        drop_path: float,
        min_level: int = 3,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.network = _create(name, pretrained, drop_path, min_level)
        info = cast("timm.models.FeatureInfo", self.network.feature_info)
        strides = tuple(2**level for level in range(min_level, LAST_LEVEL + 1))
        if tuple(info.reduction()) != strides:
            raise ConfigError(
                "model.backbone",
                f"features at strides {strides}",
                f"{name} with strides {tuple(info.reduction())}",
                "choose an EfficientNet-like timm network",
            )
        self.channels: tuple[int, ...] = tuple(info.channels())
        replace_drop_path(self.network)
        if recompute:
            _recompute_stages(self.network, name)

    def forward(self, images: Tensor) -> list[Tensor]:
        return cast("list[Tensor]", self.network(images))


def _create(name: str, pretrained: bool, drop_path: float, min_level: int) -> nn.Module:
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise ConfigError(
            "model.backbone", "a timm network", repr(name), nearest(name.split(".")[0], known)
        )
    if not pretrained:
        return _features(name.split(".")[0], False, drop_path, min_level)
    tagged = name if "." in name else f"{name}.{PRETRAINED_TAG}"
    if tagged not in timm.list_pretrained(f"{name.split('.')[0]}*"):
        tagged = name
    # The hub client logs every retry of its own; one line of ours says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return _features(tagged, True, drop_path, min_level)
    except (OSError, RuntimeError) as error:
        # RuntimeError too: timm's message for a model without weights, httpx's for a closed client.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            "model.pretrained",
            f"ImageNet weights of {tagged}",
            f"none could be fetched ({reason})",
            "connect to the hub, fill its cache (HF_HOME), or choose --pretrained no "
            "to train the backbone from random weights",
        ) from error


def _features(name: str, pretrained: bool, drop_path: float, min_level: int) -> nn.Module:
    kwargs: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path > 0 else {}
    try:
        network = timm.create_model(
            name,
            pretrained=pretrained,
            features_only=True,
            out_indices=tuple(range(min_level - 1, LAST_LEVEL)),
            **kwargs,
        )
    except IndexError:
        raise ConfigError(
            "model.backbone",
            f"features at strides up to {2**LAST_LEVEL}",
            f"{name} with fewer than five stages",
            "choose an EfficientNet-like timm network",
        ) from None
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ConfigError(
            "model.drop_path",
            f"0, as {name} has no stochastic depth",
            str(drop_path),
            "set it to 0",
        ) from None
    if not isinstance(network, nn.Module):
        raise TypeError(f"timm.create_model returned {type(network)}")
    return network


def _recompute_stages(network: nn.Module, name: str) -> None:
    switch = getattr(network, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(
            "train.checkpoint_activations",
            "a backbone that can",
            f"{name}, which timm gives no stages to compute again",
            "set it to no, or choose an EfficientNet",
        )
    switch(True)


def init_batch_norm(module: nn.Module, *, momentum: float, eps: float) -> None:
    """Set the detector's batch-norm constants everywhere, backbone included (TF's .99 and 1e-3)."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum, layer.eps = momentum, eps


@torch.no_grad()
def num_parameters(module: nn.Module) -> int:
    """Trainable values, as the paper counts them (buffers excluded)."""
    return sum(p.numel() for p in module.parameters())
