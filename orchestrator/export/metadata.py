"""What a file says of itself: enough to run it, and to know where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model.data.index import ClassMap
from model.data.transforms import PAD_RGB
from model.imagenet import MEAN, STD
from model.training.state import EMA_WEIGHTS, META, network_config
from orchestrator.config.export_cli import Precision
from orchestrator.export.graph import IMAGES, SIZES, Graph
from orchestrator.export.torch_files import MOST_IMAGES, MOST_MULTIPLES

PACKAGES = ("torch", "timm", "onnx", "onnxruntime")
MEANING = {
    IMAGES: "[batch, 3, height, width], RGB, 0 to 255, not normalised",
    SIZES: "float32 [batch, 2]: height and width of the picture in its canvas; boxes end there",
    "boxes_xyxy": "float32 [batch, {n}, 4]: left, top, right, bottom in canvas pixels; best first",
    "scores": "float32 [batch, {n}], 0 to 1; 0 beyond count",
    "labels": "int64 [batch, {n}], position in classes; -1 beyond count",
    "count": "int64 [batch]: how many of the {n} were found",
    "class_logits": "float32 [batch, anchors, {k}]: before the sigmoid",
    "box_codes": "float32 [batch, anchors, 4]: ty, tx, th, tw relative to the anchors",
}
LETTERBOX = (
    "scale = the largest at which the picture fits its canvas; resized bilinear with antialiasing to "
    f"round(height * scale) x round(width * scale), top left on a canvas of RGB {PAD_RGB}; "
    "source pixel = canvas pixel / scale"
)


def describe(
    graph: Graph, classes: ClassMap, checkpoint: Path, precision: Precision
) -> dict[str, str]:
    """name -> text, json where it has a structure."""
    meta = json.loads((checkpoint / META).read_text())
    said: dict[str, Any] = {
        "producer": "efficientdet-on-ray",
        "content": graph.content,
        "precision": precision,
        "inputs": _meanings(graph, graph.inputs),
        "outputs": _meanings(graph, graph.outputs),
        "image_size_px": graph.spec.image_size_px,
        "size_hw": graph.native_hw,
        "sizes": sizes(graph),
        "preprocessing": {
            "letterbox": LETTERBOX,
            "pad_rgb": PAD_RGB,
            "normalisation": "in the graph: (pixel / 255 - mean) / std",
            "mean": MEAN,
            "std": STD,
        },
        "postprocessing": asdict(graph.config),
        "classes": classes.to_json(),
        "network": network_config(graph.spec),
        "checkpoint": {
            "step": meta["step"],
            "sha256": meta["files"][EMA_WEIGHTS]["sha256"],
            "metrics": meta["metrics"],
        },
        "versions": {name: _version(name) for name in PACKAGES},
    }
    return {name: v if isinstance(v, str) else json.dumps(v) for name, v in said.items()}


def sizes(graph: Graph) -> str:
    """The heights and widths that the file takes."""
    pt2 = graph.kind == "pt2"
    images = f", at most {MOST_IMAGES:,} images" if pt2 else ""
    if graph.size_hw is not None:
        return "{} x {} px".format(*graph.size_hw) + images
    least = ""
    if pt2:  # a torch.export program keeps that its coarsest level has more than one cell
        most = MOST_MULTIPLES * graph.multiple
        least = f" above {graph.multiple} x {graph.multiple}, up to {most} x {most}{images}"
    any_size = f"any multiples of {graph.multiple} px{least}"
    return f"{any_size}, trained at {graph.spec.image_size_px} x {graph.spec.image_size_px}"


def how_to_run(graph: Graph) -> list[tuple[str, str]]:
    """Rows of a table: each input and output, sizes and the letterbox rule."""
    rows = [("input", f"{name}: {text}") for name, text in _meanings(graph, graph.inputs).items()]
    rows += [
        ("output", f"{name}: {text}") for name, text in _meanings(graph, graph.outputs).items()
    ]
    return [*rows, ("sizes", sizes(graph)), ("letterbox", LETTERBOX)]


def _meanings(graph: Graph, names: tuple[str, ...]) -> Mapping[str, str]:
    numbers = {"n": graph.config.detections, "k": graph.spec.num_classes}
    found = {name: MEANING[name].format(**numbers) for name in names}
    if IMAGES in found:
        found[IMAGES] = f"{graph.pixels} {found[IMAGES]}"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
