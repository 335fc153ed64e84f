"""A checkpoint as a file that other programs read."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.network.effdet_format import to_effdet
from model.training.state import EMA_WEIGHTS, META, read_classes, read_network, verify_checkpoint
from orchestrator.config.cli import ExportOptions, ExportRequest
from orchestrator.errors import ConfigError
from orchestrator.storage.weights import open_initial


@dataclass(frozen=True)
class ExportOutcome:
    code: int
    report: dict[str, Any]


def run_export_job(request: ExportRequest, options: ExportOptions) -> ExportOutcome:
    """Write the checkpoint's averaged weights, the ones that are evaluated.

    Raises:
        UserError: no checkpoint, a damaged one, or an output that cannot be written.
    """
    if request.output.suffix not in (".pth", ".safetensors"):
        raise ConfigError("output", "a .pth or .safetensors file", str(request.output))
    with open_initial(request.checkpoint, "checkpoint") as folder:
        if not (folder / META).is_file():
            raise ConfigError("checkpoint", f"a folder with {META}", request.checkpoint)
        verify_checkpoint(folder)
        spec, classes = read_network(folder), read_classes(folder)
        tensors = to_effdet(load_file(folder / EMA_WEIGHTS), spec)
    try:
        request.output.parent.mkdir(parents=True, exist_ok=True)
        if request.output.suffix == ".pth":
            torch.save(tensors, request.output)
        else:
            save_file(tensors, request.output)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's word for a closed folder
        raise ConfigError(
            "output", "a file that can be written", f"{request.output} ({error})"
        ) from None
    said = f"{len(tensors)} tensors of EfficientDet-D{spec.phi}, {classes.num_classes} classes"
    print(f"{request.output}: {said}, effdet's names", file=sys.stdout)
    report = {"status": "finished", "output": str(request.output), "tensors": len(tensors)}
    return ExportOutcome(0, report | {"num_classes": classes.num_classes})
