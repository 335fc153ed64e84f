"""Command line of an export: which model, as what kind of file, in what precision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.config.cli import local_path, plain_parser
from orchestrator.errors import ConfigError

Format = Literal["onnx", "torchscript", "pt2", "effdet"]
Content = Literal["detections", "network"]
Precision = Literal["fp32", "fp16", "int8"]
Pixels = Literal["uint8", "float32"]
Nms = Literal["soft", "hard"]

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "torchscript": (".pt", ".ts"),
    "pt2": (".pt2",),
    "effdet": (".pth", ".safetensors"),
}
SIZE = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class ExportRequest:
    """model: any name of one; output: the file.

    content: of the graph: pixels to detections, or to the network's raw outputs. pixels: type of
    the images it takes. nms: None is what the run was evaluated with. size_hw: the one size it
    takes (None: any). calibrate: images that int8 ranges are measured on, calibration_images how
    many of them. data: dataset whose validation images the file is scored on, data_images how many
    of them (None: all); max_ap_loss: more than that against fp32 is refused.
    """

    model: str
    output: Path
    format: Format
    content: Content = "detections"
    precision: Precision = "fp32"
    pixels: Pixels = "uint8"
    nms: Nms | None = None
    size_hw: tuple[int, int] | None = None
    calibrate: tuple[str, ...] = ()
    calibration_images: int = 128
    data: str | None = None
    data_images: int | None = None
    max_ap_loss: float | None = None
    tracking_uri: str | None = None


@dataclass(frozen=True)
class ExportOptions:
    """benchmark: also time the file against PyTorch."""

    json: bool
    benchmark: bool = False


def parse_export(description: str, argv: Sequence[str]) -> tuple[ExportRequest, ExportOptions]:
    """What to write and where.

    Raises:
        ConfigError: anything that is not understood, or that does not go together.
    """
    parser = plain_parser("jobs/export.py", description)
    add, default = parser.add_argument, ExportRequest("", Path(), "onnx")
    add(
        "model", metavar="MODEL",
        help="a checkpoint, runs:/RUN_ID, models:/NAME@ALIAS or models:/NAME/VERSION",
    )  # fmt: skip
    add(
        "output",
        metavar="OUTPUT",
        help="the file; its suffix says the format: " + _suffixes(),
    )
    add("--format", choices=get_args(Format), help="where the suffix does not say it")
    add(
        "--content", choices=get_args(Content),
        help=f"pixels to detections, or to raw class logits and box codes ({default.content})",
    )  # fmt: skip
    add("--nms", choices=get_args(Nms), help="of the detections (as the run was evaluated)")
    add("--image-size", metavar="PX|HxW", help="take this size only (any multiple of 2^max_level)")
    add(
        "--input", choices=get_args(Pixels), help=f"type of the pixels, 0 to 255 ({default.pixels})"
    )
    add(
        "--precision", choices=get_args(Precision),
        help=f"of weights and activations ({default.precision}); others need --data",
    )  # fmt: skip
    add(
        "--calibrate", action="append", default=[], metavar="IMAGES",
        help="images for int8's ranges: file, folder, glob or URL; may be given several times",
    )  # fmt: skip
    add(
        "--calibration-images", type=int, metavar="N",
        help=f"how many of them, evenly chosen ({default.calibration_images})",
    )  # fmt: skip
    add(
        "--data",
        metavar="FOLDER",
        help="COCO-format dataset: measure AP of the file and of PyTorch",
    )
    add("--data-images", type=int, metavar="N", help="only those with the N lowest ids (all)")
    add("--max-ap-loss", type=float, metavar="X", help="refuse a file that loses more AP than this")
    add("--benchmark", action="store_true", help="time the file and PyTorch side by side")
    add("--tracking-uri", metavar="URI", help="MLflow server or database (MLFLOW_TRACKING_URI)")
    add("--json", action="store_true", help="last line of output: one json object")
    given = vars(parser.parse_args(argv))
    asked = {
        "content": given["content"],
        "precision": given["precision"],
        "pixels": given["input"],
        "nms": given["nms"],
        "size_hw": _size(given["image_size"]),
        "calibrate": tuple(given["calibrate"]),
        "calibration_images": given["calibration_images"],
        "data": given["data"],
        "data_images": given["data_images"],
        "max_ap_loss": given["max_ap_loss"],
    }
    asked = {name: value for name, value in asked.items() if value not in (None, ())}
    output = local_path(given["output"], "OUTPUT", "a local file", "export, then copy it there")
    kind = _format(output, given["format"])
    request = ExportRequest(
        given["model"], output, kind, tracking_uri=given["tracking_uri"], **asked
    )
    _check(request, asked, given["benchmark"])
    return request, ExportOptions(given["json"], given["benchmark"])


def _suffixes() -> str:
    return ", ".join(f"{' '.join(suffixes)} ({kind})" for kind, suffixes in SUFFIXES.items())


def _format(output: Path, asked: Format | None) -> Format:
    of_suffix = next((k for k, known in SUFFIXES.items() if output.suffix in known), None)
    if asked is None:
        if of_suffix is None:
            raise ConfigError(
                "OUTPUT", f"a suffix that says the format: {_suffixes()}",
                str(output), "correct it, or give --format",
            )  # fmt: skip
        return of_suffix
    if of_suffix not in (asked, None) or (of_suffix is None and asked == "effdet"):
        raise ConfigError(
            "OUTPUT", f"a {' or '.join(SUFFIXES[asked])} file, as --format {asked} is",
            str(output), "correct one of them",
        )  # fmt: skip
    return asked


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(
            "--image-size", "PX or HEIGHTxWIDTH", repr(text), "as in --image-size 512x768"
        )
    return int(found[1]), int(found[2] or found[1])


FLAGS = {
    "pixels": "--input",
    "size_hw": "--image-size",
    "calibration_images": "--calibration-images",
    "data_images": "--data-images",
    "max_ap_loss": "--max-ap-loss",
}


def _check(request: ExportRequest, asked: dict[str, Any], benchmark: bool) -> None:
    """Raises ConfigError: settings that do not go together, or have no such value."""
    if request.format == "effdet" and (asked or benchmark):
        name = next(iter(asked), "benchmark")
        raise ConfigError(
            FLAGS.get(name, f"--{name}"), "nothing beside --format effdet, which is weights only",
            str(asked.get(name, "given")), "leave it out, or choose another format",
        )  # fmt: skip
    int8, reduced = request.precision == "int8", request.precision != "fp32"
    loss, number = request.max_ap_loss, request.calibration_images
    for flag, wrong, expected, got, remedy in (
        ("--nms", bool(request.nms) and request.content == "network",
         "nothing beside --content network, which has no NMS", request.nms, "leave it out"),
        ("--precision", int8 and request.format != "onnx", "fp32 or fp16 for this format", "int8",
         "int8 is there for ONNX"),
        ("--calibrate", int8 and not request.calibrate, "images to measure int8's ranges on",
         "nothing", "a few hundred images like those it will see, best of the training data"),
        ("--calibrate", bool(asked.keys() & {"calibrate", "calibration_images"}) and not int8,
         "nothing but for --precision int8", "given", "leave it out"),
        ("--data", reduced and request.data is None, f"a dataset, to measure what {request.precision} loses",
         "nothing", "--data FOLDER"),
        ("--data-images", request.data_images is not None and request.data is None,
         "--data beside it", "none", "--data FOLDER"),
        ("--data-images", request.data_images is not None and request.data_images < 1, "at least 1",
         request.data_images, "correct it"),
        ("--max-ap-loss", loss is not None and request.data is None, "--data beside it", "none",
         "--data FOLDER"),
        ("--max-ap-loss", loss is not None and not 0 <= loss <= 1, "0 <= X <= 1", loss,
         "AP is between 0 and 1"),
        ("--calibration-images", number < 1, "at least 1", number, "correct it"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(flag, expected, str(got), remedy)
