"""Command line of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from orchestrator.config.cli import plain_parser
from orchestrator.errors import ConfigError

ResultFormat = Literal["json", "parquet"]


@dataclass(frozen=True)
class PredictRequest:
    """model: any name of one; images: files, folders, globs, URLs; output: a folder or URL.

    score: detections above it are kept. batch_size: images at once. draw: also draw them; None: where
    they are few. format: of the results. frames_every, every_s: which frames of a video are looked at.

    workers: processes of a Ray cluster; 0: this process; None: as many as there is room for, this
    process where the images are few. threads_per_worker: of PyTorch, also in this process; None: as many
    as a worker reserves cores. gpus_per_worker: None: one each where there are GPUs. max_failures: deaths of
    workers that are made good.
    """

    model: str
    images: tuple[str, ...]
    output: str = "runs/predictions"
    score: float = 0.3
    batch_size: int = 8
    draw: bool | None = None
    format: ResultFormat = "json"
    frames_every: int = 1
    every_s: float | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    threads_per_worker: int | None = None
    max_failures: int = 3
    tracking_uri: str | None = None


@dataclass(frozen=True)
class PredictOptions:
    """fresh: replace what another prediction left in the output folder."""

    json: bool
    fresh: bool = False


def parse_predict(description: str, argv: Sequence[str]) -> tuple[PredictRequest, PredictOptions]:
    """Which model looks at which images, who does it, and where the results go.

    Raises:
        ConfigError: anything that is not understood.
    """
    parser = plain_parser("jobs/predict.py", description)
    add, default = parser.add_argument, PredictRequest("", ())
    add(
        "model", metavar="MODEL",
        help="a checkpoint, runs:/RUN_ID, models:/NAME@ALIAS or models:/NAME/VERSION",
    )  # fmt: skip
    add(
        "images", metavar="IMAGES", nargs="+",
        help="images and videos: files, folders, globs or URLs (s3://…)",
    )  # fmt: skip
    add("--output", default=default.output, metavar="FOLDER", help=f"or a URL ({default.output})")
    add(
        "--score", type=float, default=default.score, metavar="X",
        help=f"keep detections above it ({default.score})",
    )  # fmt: skip
    add(
        "--format", choices=get_args(ResultFormat), default=default.format,
        help="COCO results or a table (json)",
    )  # fmt: skip
    add(
        "--batch-size", type=int, default=default.batch_size, metavar="N",
        help=f"images at once ({default.batch_size})",
    )  # fmt: skip
    drawing = parser.add_mutually_exclusive_group()
    drawing.add_argument(
        "--draw", action="store_true", help="draw all of them (drawn where they are at most 1000)"
    )
    drawing.add_argument("--no-draw", action="store_true", help="draw none")
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument(
        "--frames-every", type=int, default=default.frames_every, metavar="N",
        help="each N-th frame of a video (1)",
    )  # fmt: skip
    sampling.add_argument("--every-s", type=float, metavar="S", help="a frame of each S seconds")
    add(
        "--workers", default="auto", metavar="N",
        help="processes of a Ray cluster; 0: none but this one (auto: as many as there is room for; "
        "0 where the images are few)",
    )  # fmt: skip
    add(
        "--cpus-per-worker", type=float, default=default.cpus_per_worker, metavar="X",
        help=f"cores reserved for each ({default.cpus_per_worker:g})",
    )  # fmt: skip
    add(
        "--gpus-per-worker", type=float, metavar="X",
        help="a part lets workers share one, 0 predicts on the CPU (1 where there are any)",
    )  # fmt: skip
    add("--threads-per-worker", type=int, metavar="N", help="of PyTorch (as many as cores)")
    add(
        "--max-failures", type=int, default=default.max_failures, metavar="N",
        help=f"workers that may die ({default.max_failures})",
    )  # fmt: skip
    add("--fresh", action="store_true", help="replace what another prediction left in the output")
    add("--tracking-uri", metavar="URI", help="MLflow server or database (MLFLOW_TRACKING_URI)")
    add("--json", action="store_true", help="last line of output: one json object")
    given = parser.parse_args(argv)
    if given.batch_size < 1:
        raise ConfigError("--batch-size", "at least 1", str(given.batch_size))
    if not 0.0 <= given.score < 1.0:
        raise ConfigError("--score", "0 <= X < 1", str(given.score))
    request = PredictRequest(
        model=given.model, images=tuple(given.images), output=given.output, score=given.score,
        batch_size=given.batch_size, draw=_draw(given.draw, given.no_draw), format=given.format,
        frames_every=given.frames_every, every_s=given.every_s, workers=_workers(given.workers),
        cpus_per_worker=given.cpus_per_worker, gpus_per_worker=given.gpus_per_worker,
        threads_per_worker=given.threads_per_worker, max_failures=given.max_failures,
        tracking_uri=given.tracking_uri,
    )  # fmt: skip
    return request, PredictOptions(json=given.json, fresh=given.fresh)


def _draw(*flags: bool) -> bool | None:
    yes, no = flags
    return True if yes else False if no else None


def _workers(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ConfigError("--workers", "auto, 0 or a number of processes", repr(text))
    return int(text)
