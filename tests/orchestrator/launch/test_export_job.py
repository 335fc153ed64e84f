from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effdet import EfficientDet
from effdet.config import get_efficientdet_config
from safetensors.torch import load_file

from model.data.index import ClassMap
from model.network.detector import Detector
from model.network.scaling import FusionKind, ModelConfig, resolve
from model.training.state import Progress, network_config, write_checkpoint
from orchestrator.config.export_cli import ExportOptions, ExportRequest
from orchestrator.errors import UserError
from orchestrator.launch.export_job import run_export_job


def checkpoint(folder: Path, fusion: FusionKind = "fast") -> tuple[Path, Detector]:
    config = ModelConfig(
        backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1,
        image_size_px=128, fusion=fusion,
    )  # fmt: skip
    detector = Detector(resolve(config, 3))
    folder.mkdir()
    state = detector.state_dict()
    write_checkpoint(
        folder, model={k: torch.zeros_like(v) for k, v in state.items()}, ema=state,
        progress=Progress(1, {}, torch.zeros(6)), config={"network": network_config(detector.spec)},
        classes=ClassMap((1, 2, 3), ("a", "b", "c")), metrics={},
    )  # fmt: skip
    return folder, detector


def export(source: Path, output: Path) -> dict[str, Any]:
    request = ExportRequest(str(source), output, "effdet")
    return run_export_job(request, ExportOptions(json=False)).report


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_effdet_loads_the_average(tmp_path: Path, suffix: str) -> None:
    folder, detector = checkpoint(tmp_path / "step_00000001")
    output = tmp_path / "new" / f"weights{suffix}"
    assert export(folder, output)["num_classes"] == 3
    tensors = load_file(output) if suffix == ".safetensors" else torch.load(output)
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(
        backbone_name="test_efficientnet", backbone_args={}, image_size=(128, 128), num_classes=3,
        fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1,
    )  # fmt: skip
    peer = EfficientDet(config, pretrained_backbone=False)
    peer.load_state_dict(tensors, strict=True)
    assert torch.equal(
        peer.class_net.predict.conv_pw.weight, detector.class_head.predict.pointwise.weight
    )


@pytest.mark.parametrize(
    ("prepare", "output", "message"),
    [
        (lambda folder: folder, "weights.onnx", "a .pth or .safetensors file"),
        (
            lambda folder: folder.parent / "gone",
            "weights.pth",
            "MODEL: expected a checkpoint's folder or URI",
        ),
        (lambda folder: folder.parent, "weights.pth", "a checkpoint folder with meta.json"),
        (lambda folder: folder, "closed/weights.pth", "a file that can be written"),
    ],
)
def test_refusals(tmp_path: Path, prepare: Any, output: str, message: str) -> None:
    folder, _ = checkpoint(tmp_path / "step_00000001")
    (tmp_path / "closed").write_text("a file where a folder is needed")
    with pytest.raises(UserError, match=message):
        export(prepare(folder), tmp_path / output)


def test_what_effdet_cannot_compute_is_not_written(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "step_00000001", fusion="unbounded")
    with pytest.raises(UserError, match="unbounded"):
        export(folder, tmp_path / "weights.pth")
    assert not (tmp_path / "weights.pth").exists()
