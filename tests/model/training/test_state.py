"""Checkpoint folders: round trip, damage, no pickles."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from model.data.index import ClassMap
from model.errors import CheckpointError
from model.network.scaling import ModelConfig, resolve
from model.training import state

CLASSES = ClassMap((3, 90), ("cat", "dog"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(4, 2, 2, 2)).square().mean().backward()
    optimizer.step()
    progress = state.Progress(7, state.momentum_by_name(net, optimizer), torch.arange(6.0))
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    spec = resolve(ModelConfig(), 2)
    state.write_checkpoint(
        folder,
        model=net.state_dict(),
        ema=net.state_dict(),
        progress=progress,
        config={"network": state.network_config(spec)},
        classes=CLASSES,
        metrics={"val/AP": 0.25},
    )
    return folder


def test_round_trip(checkpoint: Path) -> None:
    meta = state.verify_checkpoint(checkpoint)
    assert (meta["step"], meta["metrics"]) == (7, {"val/AP": 0.25})
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    state.read_weights(checkpoint, net)
    progress = state.read_progress(checkpoint)
    assert progress.step == 7
    assert torch.equal(progress.log_sums, torch.arange(6.0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state.load_momentum(net, optimizer, progress.momentum)
    again = state.momentum_by_name(net, optimizer)
    assert all(torch.equal(again[name], value) for name, value in progress.momentum.items())
    assert len(again) == 4
    assert state.read_classes(checkpoint) == CLASSES
    assert state.read_network(checkpoint) == resolve(ModelConfig(), 2)


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_found(checkpoint: Path, name: str, damage: str) -> None:
    path = checkpoint / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="use an older checkpoint"):
        state.verify_checkpoint(checkpoint)


def test_without_marker_it_is_none(checkpoint: Path) -> None:
    (checkpoint / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        state.verify_checkpoint(checkpoint)


def test_a_pickle_is_refused(checkpoint: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("code of a stranger",)

    (checkpoint / "train_state.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="run code when loaded"):
        state.read_progress(checkpoint)


def test_other_architecture_is_one_line(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="resume with the configuration"):
        state.read_weights(checkpoint, nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))


def test_nothing_written_holds_code(checkpoint: Path) -> None:
    """Everything but train_state.pt is json or safetensors, and that loads with weights_only."""
    assert sorted(json.loads((checkpoint / "meta.json").read_text())["files"]) == sorted(
        path.name for path in checkpoint.iterdir() if path.name != "meta.json"
    )
    torch.load(checkpoint / "train_state.pt", weights_only=True)
