"""Command line of an evaluation: which model, which data, how it is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.config import codec
from orchestrator.config.cli import Flag, add_overrides, local_path, plain_parser
from orchestrator.errors import ConfigError

SplitName = Literal["train", "val"]
SECTIONS = ("data", "evaluation", "model")

EVALUATE_FLAGS = (
    Flag("--data", "data.root", "folder or URL of a COCO-format dataset, or shapes; else the data "
         "that MODEL was validated with", "FOLDER", text=True),
    Flag("--nms", "evaluation.nms", "suppression: soft or hard", "KIND"),
    Flag("--score", "evaluation.score", "keep detections above it", "X"),
    Flag("--detections", "evaluation.detections", "keep the best N of an image", "N"),
    Flag("--batch-size", "evaluation.batch_size", "images at once in each process", "N"),
    Flag("--phi", "model.phi", "size of the network, where MODEL is a weight file that does not "
         "tell: 0 to 7, or 7x", "N"),
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateRequest:
    """model, against: any names of models. changes: of the models' own configurations, as a tree.

    split: None is val, and train where there is no val. scales, flip: further views of each image.
    workers: processes on a cluster; 0 is this one. gpus_per_worker: None is 1 where there are GPUs.
    threads: of torch in each; None is all cores here, and on a cluster those of a worker.
    output: None is named after what is evaluated.
    """

    model: str
    against: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    split: SplitName | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    workers: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    threads: int | None = None
    resamples: int = 1000
    seed: int = 0
    figures: bool = True
    output: Path | None = None
    tracking_uri: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.model,) if self.against is None else (self.model, self.against)


@dataclass(frozen=True)
class EvaluateOptions:
    json: bool


def parse_evaluate(
    description: str, argv: Sequence[str]
) -> tuple[EvaluateRequest, EvaluateOptions]:
    """What is asked for.

    Raises:
        ConfigError: anything that is not understood.
    """
    parser = plain_parser("jobs/evaluate.py", description)
    add, default = parser.add_argument, EvaluateRequest("")
    add(
        "model", metavar="MODEL",
        help="a checkpoint, runs:/RUN_ID, models:/NAME@ALIAS, or weights: a .pth or .safetensors "
        "file, or a name such as tf_efficientdet_d0",
    )  # fmt: skip
    add("--against", metavar="MODEL", help="compare it with another one, on the same images")
    add("--split", choices=get_args(SplitName), help="images to look at (val)")
    add_overrides(
        parser, EVALUATE_FLAGS, "any other setting in data, evaluation or model, by its path"
    )
    add(
        "--scales", metavar="A,B,…", default="1",
        help="look at each image at several sizes, as in 0.8,1,1.2; the views' boxes are put "
        "together before suppression",
    )  # fmt: skip
    add("--flip", action="store_true", help="look at each view mirrored too")
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes on a Ray cluster (0: this one)",
    )
    add("--cpus-per-worker", type=float, default=1.0, metavar="X", help="cores of each (1)")
    add(
        "--gpus-per-worker",
        type=float,
        metavar="X",
        help="0 works on the CPU (1 where there are GPUs)",
    )
    add(
        "--threads-per-worker", type=int, metavar="N",
        help="of torch in each process (the cores it has); for equal last digits keep it equal",
    )  # fmt: skip
    add(
        "--resamples", type=int, default=default.resamples, metavar="N",
        help=f"of the images, for the interval of a comparison ({default.resamples})",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the resamples (0)")
    add("--no-figures", action="store_true", help="write numbers and detections only")
    add("--output", metavar="FOLDER", help="(runs/evaluations/NAME)")
    add("--tracking-uri", metavar="URI", help="MLflow server or database (MLFLOW_TRACKING_URI)")
    add("--json", action="store_true", help="last line of output: one json object")
    given = parser.parse_args(argv)
    for name, value, least in (("--resamples", given.resamples, 1), ("--seed", given.seed, 0)):
        if value < least:
            raise ConfigError(name, f"at least {least}", str(value))
    output = given.output
    if output is not None:
        output = local_path(output, "--output", "a local folder", "copy it to there afterwards")
    request = EvaluateRequest(
        given.model, given.against, _changes(given.overrides or []), given.split,
        _scales(given.scales), given.flip, given.workers, given.cpus_per_worker,
        given.gpus_per_worker, given.threads_per_worker, given.resamples, given.seed, not given.no_figures,
        output, given.tracking_uri,
    )  # fmt: skip
    return request, EvaluateOptions(given.json)


def _changes(overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for path, value in overrides:
        if path.partition(".")[0] not in SECTIONS or "." not in path:
            raise ConfigError(
                "--set", "a path in data, evaluation or model", repr(path),
                "nothing else matters to an evaluation",
            )  # fmt: skip
        changes = codec.merge(changes, codec.nest(path, value))
    return changes


def _scales(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(math.isfinite(scale) and scale > 0 for scale in found):
        raise ConfigError(
            "--scales", "positive numbers, separated by commas", repr(text), "as in 0.8,1,1.2"
        )
    return found
