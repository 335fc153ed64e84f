"""Weights to start from: a checkpoint of ours or an effdet file, fitted to the classes at hand.

Shape legend: A anchors a cell, K classes of the data, K' classes of the source, W channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.data.coco_classes import COCO_NAMES
from model.data.index import ClassMap
from model.errors import ConfigError
from model.network.detector import Detector
from model.network.effdet_format import from_effdet, is_effdet, unwrap
from model.training.state import EMA_WEIGHTS, META, UNUSED, read_classes, verify_checkpoint

WHERE = "model.init"
COCO_OUTPUTS = 90
CLASS_PREDICTOR = "class_head.predict.pointwise."
BOX_PREDICTOR = "box_head.predict.pointwise."
ANEW = "starts anew"
"""In a note: a predictor keeps nothing of the source."""


def load_initial(detector: Detector, path: Path, classes: ClassMap) -> list[str]:
    """Fill `detector` from a checkpoint folder or a weight file; what there is to say about it.

    The class predictor is kept row by row where the source's classes are known by name and hold
    all of ours, and starts anew where they do not; so does the box predictor for other anchors.

    Raises:
        ConfigError: unreadable, or the weights of another network.
        CheckpointError: a damaged checkpoint.
    """
    tensors, names = _read(path)
    state = detector.state_dict()
    if is_effdet(tensors):
        tensors = from_effdet(tensors, state, detector.spec)
    notes = [f"{len(tensors)} tensors of {path.name}"]
    notes += _fit_classes(tensors, names, detector, classes)
    if _outputs(tensors, BOX_PREDICTOR) not in (None, 4 * detector.spec.anchors_per_cell):
        _drop(tensors, BOX_PREDICTOR)
        notes.append(f"box predictor {ANEW}: other anchors")
    fresh = tuple(
        name for name in (CLASS_PREDICTOR, BOX_PREDICTOR) if f"{name}weight" not in tensors
    )
    _check(tensors, state, fresh, detector)
    detector.load_state_dict(tensors, strict=False)
    return notes


def _read(path: Path) -> tuple[dict[str, Tensor], Sequence[str | None] | None]:
    """Tensors as they are named there, and the name of each class output if it is known."""
    if path.is_dir():
        if not (path / META).is_file():
            steps = sorted(p.parent.name for p in path.glob(f"step_*/{META}"))
            remedy = f"name one of its checkpoints, such as {steps[-1]}" if steps else "correct it"
            raise ConfigError(WHERE, f"a checkpoint (with {META})", f"the folder {path}", remedy)
        verify_checkpoint(path)
        return load_file(path / EMA_WEIGHTS), read_classes(path).names
    try:
        if path.suffix == ".safetensors":
            tensors = unwrap(load_file(path))
        else:
            tensors = unwrap(torch.load(path, weights_only=True, map_location="cpu"))
    except Exception as error:  # reading what is no weight file may fail in any way
        raise ConfigError(
            WHERE, "a weight file: .pth with tensors only, or .safetensors",
            f"{path} ({(str(error) or type(error).__name__).splitlines()[0]})", "correct the path, or convert the file",
        ) from None  # fmt: skip
    outputs, anchors = (
        tensors.get(f"{net}.predict.conv_pw.bias") for net in ("class_net", "box_net")
    )
    if outputs is None or anchors is None:
        return tensors, None
    known = len(outputs) * 4 == COCO_OUTPUTS * len(anchors)
    names = [COCO_NAMES.get(number) for number in range(1, COCO_OUTPUTS + 1)]
    return tensors, names if known else None


def _fit_classes(
    tensors: dict[str, Tensor],
    names: Sequence[str | None] | None,
    detector: Detector,
    classes: ClassMap,
) -> list[str]:
    """Make the class predictor's tensors fit K classes, or take them out."""
    outputs, spec = _outputs(tensors, CLASS_PREDICTOR), detector.spec
    if outputs is None or outputs % spec.anchors_per_cell:
        _drop(tensors, CLASS_PREDICTOR)
        return [f"class predictor {ANEW}: other anchors"]
    there = outputs // spec.anchors_per_cell
    if names is not None and set(classes.names) <= set(names):
        if tuple(names) == classes.names:
            return [f"all {there} classes are the same"]
        rows = torch.tensor([names.index(name) for name in classes.names])
        for part in ("weight", "bias"):
            tensor = tensors[CLASS_PREDICTOR + part]
            by_class = tensor.unflatten(0, (spec.anchors_per_cell, there))
            tensors[CLASS_PREDICTOR + part] = by_class[:, rows].flatten(0, 1).contiguous()
        return [f"class predictor: {len(rows)} of {there} classes kept by name"]
    if names is None and there == classes.num_classes:
        return [f"class predictor: {there} classes there and here, taken in order of category id"]
    _drop(tensors, CLASS_PREDICTOR)
    return [f"class predictor {ANEW}: {there} classes there, {classes.num_classes} here"]


def _check(
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    fresh: tuple[str, ...],
    detector: Detector,
) -> None:
    spec = detector.spec
    ours = f"EfficientDet-D{spec.phi} with {spec.backbone}, {spec.fpn_channels} channels"
    remedy = "choose the --phi, variant and sizes it was trained with"
    for name, tensor in state.items():
        if name.endswith(UNUSED) or (fresh and name.startswith(fresh)):
            continue
        if name not in tensors:
            raise ConfigError(WHERE, f"the weights of {ours}", f"a file without {name}", remedy)
        if tensors[name].shape != tensor.shape:
            shapes = f"{name} {list(tensors[name].shape)}, not {list(tensor.shape)}"
            raise ConfigError(WHERE, f"the weights of {ours}", shapes, remedy)
    unknown = next((name for name in tensors if name not in state), None)
    if unknown is not None:
        raise ConfigError(WHERE, f"the weights of {ours}", f"a file with {unknown}", remedy)


def _outputs(tensors: Mapping[str, Tensor], predictor: str) -> int | None:
    bias = tensors.get(f"{predictor}bias")
    return None if bias is None else len(bias)


def _drop(tensors: dict[str, Tensor], predictor: str) -> None:
    for part in ("weight", "bias"):
        tensors.pop(predictor + part, None)
