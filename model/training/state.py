"""A checkpoint folder: written whole, verified before it is used, without pickles.

model.safetensors   weights and buffers
ema.safetensors     their moving average: what is evaluated and served
train_state.pt      step, momentum, running means of the log; loads with weights_only=True
config.json         the resolved configuration
classes.json        label, category id, name
meta.json           written last: step, metrics, size and sha256 of each file
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.data.index import ClassMap
from model.errors import CheckpointError
from model.network.scaling import NetworkSpec

FORMAT = 1
WEIGHTS, EMA_WEIGHTS, TRAIN_STATE = "model.safetensors", "ema.safetensors", "train_state.pt"
CONFIG, CLASSES, META = "config.json", "classes.json", "meta.json"
# Batch norm's counter of forward passes: of no use with a fixed momentum, and different on another
# number of workers. Torch fills it in where a file lacks it.
UNUSED = "num_batches_tracked"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: updates done, momentum by parameter name, sums of the open log interval.

    lr_factor: what the scheduled learning rate is multiplied by since the run had diverged.
    """

    step: int
    momentum: dict[str, Tensor]
    log_sums: Tensor
    lr_factor: float = 1.0


def write_checkpoint(
    folder: Path,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    progress: Progress,
    config: Mapping[str, Any],
    classes: ClassMap,
    metrics: Mapping[str, float],
) -> None:
    """Fill an existing empty folder; `meta.json` comes last and makes it valid."""
    for name, tensors in ((WEIGHTS, model), (EMA_WEIGHTS, ema)):
        kept = {
            key: t.detach().cpu().contiguous()
            for key, t in tensors.items()
            if not key.endswith(UNUSED)
        }
        save_file(kept, folder / name)
    state = {
        "step": progress.step,
        "momentum": {key: t.detach().cpu() for key, t in progress.momentum.items()},
        "log_sums": progress.log_sums.detach().cpu(),
        "lr_factor": progress.lr_factor,
    }
    torch.save(state, folder / TRAIN_STATE)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True))
    (folder / CLASSES).write_text(json.dumps(classes.to_json(), indent=1))
    files = (WEIGHTS, EMA_WEIGHTS, TRAIN_STATE, CONFIG, CLASSES)
    meta = {
        "format": FORMAT,
        "step": progress.step,
        "metrics": dict(metrics),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in files
        },
    }
    (folder / META).write_text(json.dumps(meta, indent=1))


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint's `meta.json` after every file in it proved whole.

    Raises:
        CheckpointError: no marker, a file missing, cut short or changed.
    """
    where = f"checkpoint {folder.name}"
    remedy = "use an older checkpoint"
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text())
        files: dict[str, dict[str, Any]] = meta["files"]
    except FileNotFoundError:
        raise CheckpointError(where, META, "none: it was never finished", remedy) from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(where, f"a readable {META}", str(error), remedy) from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            where, f"format {FORMAT}", str(meta.get("format")), "use the release that wrote it"
        )
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(where, name, "none", remedy)
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise CheckpointError(where, f"{facts['bytes']} bytes of {name}", str(size), remedy)
        if _sha256(path) != facts["sha256"]:
            raise CheckpointError(where, f"{name} as it was written", "changed bytes", remedy)
    return meta


def read_weights(folder: Path, module: nn.Module, *, ema: bool = False) -> None:
    """Load weights into a module of the same architecture; the folder must be verified."""
    tensors = load_file(folder / (EMA_WEIGHTS if ema else WEIGHTS))
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(
            f"checkpoint {folder.name}",
            "the weights of this network",
            first,
            "resume with the configuration it was trained with, or start a new run",
        ) from None


def read_progress(folder: Path) -> Progress:
    """Raises CheckpointError where the file holds anything but tensors and numbers."""
    try:
        state = torch.load(folder / TRAIN_STATE, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"checkpoint {folder.name}", f"tensors and numbers only in {TRAIN_STATE}",
            "something that would run code when loaded", "do not use it: we never wrote it",
        ) from None  # fmt: skip
    return Progress(
        int(state["step"]),
        dict(state["momentum"]),
        state["log_sums"],
        float(state.get("lr_factor", 1.0)),
    )


def read_metrics(folder: Path) -> dict[str, float]:
    """Metrics of the last evaluation before the checkpoint."""
    return dict(json.loads((folder / META).read_text())["metrics"])


def read_classes(folder: Path) -> ClassMap:
    return ClassMap.from_json(json.loads((folder / CLASSES).read_text()))


def network_config(spec: NetworkSpec) -> dict[str, Any]:
    """A spec as json, stored under "network" in config.json."""
    return asdict(spec)


def read_network(folder: Path) -> NetworkSpec:
    """The architecture a checkpoint's weights belong to."""
    fields = json.loads((folder / CONFIG).read_text())["network"]
    fields["aspect_ratios"] = tuple((w, h) for w, h in fields["aspect_ratios"])
    return NetworkSpec(**fields)


def momentum_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By name, so that a checkpoint does not depend on the order of parameter groups."""
    return {
        name: optimizer.state[p]["momentum_buffer"]
        for name, p in module.named_parameters()
        if optimizer.state[p].get("momentum_buffer") is not None
    }


def load_momentum(
    module: nn.Module, optimizer: torch.optim.Optimizer, momentum: Mapping[str, Tensor]
) -> None:
    for name, p in module.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(p).copy_(momentum[name])  # keeps p's memory format
            optimizer.state[p]["momentum_buffer"] = buffer


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
