"""One core a test run: tiny tensors gain nothing from threads."""

from __future__ import annotations

import pytest
import torch

from model.network.scaling import ModelConfig, NetworkSpec, resolve


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> NetworkSpec:
    """A network of 90,000 parameters that still has every part."""
    return resolve(
        ModelConfig(
            backbone="test_efficientnet",
            fpn_channels=16,
            fpn_repeats=2,
            head_layers=1,
            image_size_px=128,
        ),
        num_classes=3,
    )
